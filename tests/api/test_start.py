"""A server that is asked to end before it runs, or that cannot start."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.api_server import engine_flags
from support.server import Server, starting_server

# Importing Ray Serve (2.60) warns of its own use of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

START_SECONDS = 240.0


def children(server: Server) -> list[str]:
    """The command lines of what a server has started."""
    lines = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return lines


def wait_for_child(server: Server, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not any(name in line for line in children(server)):
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, f"there is no {name}"
        time.sleep(0.05)


@pytest.mark.parametrize("child", ["gcs_server", "ray::ServeReplica"])
def test_a_server_that_starts_ends_when_it_is_asked_to(
    byte_model: Path, tmp_path: Path, child: str
) -> None:
    """While Ray starts, and while its replica loads the model; no process is left."""
    with starting_server(tmp_path / "log", *engine_flags(byte_model)) as server:
        wait_for_child(server, child)
        assert server.stop() == 0, server.log.read_text()
        assert "asked to end before the server was ready" in server.log.read_text()
        assert "serving" not in server.log.read_text()


SERVES_MESSAGE = """A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica:saqqara:engine.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "/x/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
{error}
"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "RuntimeError: Traceback (most recent call last):\n"
            "saqqara.cluster.on_ray.serve_start.ReplicaStartError: rank 1 died: out of memory",
            "rank 1 died: out of memory",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "OutOfMemoryError: CUDA out of"),
        ("KeyError", "KeyError"),
    ],
)
def test_the_reason_is_taken_out_of_what_serve_says(error: str, reason: str) -> None:
    from saqqara.cluster.on_ray.serve_start import failure, reason_of

    message = SERVES_MESSAGE.format(error=error)
    assert reason_of(message).startswith(reason)
    details = {"status": "DEPLOYING", "deployments": {"engine": {"message": message}}}
    assert failure(details) == reason_of(message)
    waits = {"engine": {"status": "UPDATING", "message": "has taken more than 30s to start"}}
    assert failure({"status": "DEPLOYING", "deployments": waits}) is None


def test_a_failure_without_a_trace_is_told_as_it_is() -> None:
    from saqqara.cluster.on_ray.serve_start import failure

    details = {"status": "DEPLOY_FAILED", "message": "no\n  node", "deployments": {}}
    assert failure(details) == "no node"


@pytest.mark.parametrize(
    ("engine", "options", "total"),
    [
        ({}, {"num_cpus": 3, "resources": {"disk": 1}}, {"CPU": 3, "disk": 1}),
        ({"pipeline_parallel_size": 2}, {"num_cpus": 3}, {"CPU": 3.02}),
    ],
)
def test_what_a_replica_asks_for_is_counted_with_its_ranks(
    engine: dict[str, Any], options: dict[str, Any], total: dict[str, float]
) -> None:
    from saqqara.cluster.on_ray.serve import plan_replica
    from saqqara.cluster.on_ray.serve_run import total_of
    from saqqara.cluster.server.api_keys import ApiKeys
    from saqqara.cluster.settings import serve_config, served_engine

    config = serve_config(
        {
            "model_loading_config": {"model_id": "tiny"},
            "engine_kwargs": {"device": "cpu", **engine},
            "deployment_config": {"ray_actor_options": options},
        }
    )
    asked = total_of(plan_replica(config, served_engine(config), ApiKeys()))
    assert asked == pytest.approx(total)
