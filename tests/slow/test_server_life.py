"""Servers that are ended at any moment, and servers on a cluster where others live, too."""

import json
import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when Ray is imported or a process of it starts; see tests/ray/conftest.py.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import ray
import yaml
from support.api_server import ENGINE, MODEL, engine_flags
from support.byte_llama import save_tiny_llama
from support.server import (
    Server,
    fetch,
    free_port,
    half_sent_requests,
    running_server,
    starting_server,
    wait_until_up,
)

logger = logging.getLogger(__name__)

# Importing Ray Serve (2.60) warns of its own use of pydantic.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

NUM_MOMENTS = 6
NUM_HALF_SENT = 200
END_SECONDS = 10.0  # of a server that has nothing to do
BODY_SECONDS = 5.0
WAIT_SECONDS = 240.0
KILLED_EARLY = -15  # before Python has come to our first line, there is nothing to clean up


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def start_seconds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a server takes until it answers."""
    log = tmp_path_factory.mktemp("first") / "log"
    started = time.monotonic()
    flags = ["--body-timeout-seconds", str(BODY_SECONDS)]
    with running_server(log, *engine_flags(model), *flags) as server:
        seconds = time.monotonic() - started
        bodies_that_never_come_get_408(server)
        asked = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - asked < END_SECONDS
        said = log.read_text()
        assert "raylet" not in said
        assert "failed" not in said.lower()
    return seconds


def bodies_that_never_come_get_408(server: Server) -> None:
    with half_sent_requests(server, NUM_HALF_SENT) as connections:
        for connection in connections:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.timeout(1800)
def test_sigterm_ends_a_server_at_any_moment_of_its_start(
    model: Path, tmp_path: Path, start_seconds: float
) -> None:
    seed = time.time_ns()
    moments = random.Random(seed)
    for number in range(NUM_MOMENTS):
        delay = moments.uniform(number, number + 1) / NUM_MOMENTS * start_seconds
        where = f"moment {number} of seed {seed}: {delay:.2f} of {start_seconds:.2f} s"
        log = tmp_path / f"log-{number}"
        with starting_server(log, *engine_flags(model)) as server:
            time.sleep(delay)
            asked = time.monotonic()
            status = server.stop()
            logger.info("%s: status %d after %.2f s", where, status, time.monotonic() - asked)
            said = log.read_text()
            assert status == 0 or (status == KILLED_EARLY and not said), f"{where}\n{said}"
            assert "Traceback" not in said, f"{where}\n{said}"


def test_a_replica_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    """Its own words, once; Serve would try again and again, and say that it failed to."""
    flags = [*engine_flags(model), "--tokenizer", str(tmp_path / "none")]
    with starting_server(tmp_path / "log", *flags) as server:
        assert server.process.wait(WAIT_SECONDS) != 0
        error = server.log.read_text().splitlines()[-1]
        assert error.startswith("error: ")
        assert "tokenizer" in error
        assert str(tmp_path / "none") in error


def application_states() -> dict[str, str]:
    """Serve's applications and what they are doing."""
    from ray import serve  # its import warns, an error while tests are collected

    return {name: app.status.value for name, app in serve.status().applications.items()}


def applications() -> set[str]:
    """The names of Serve's applications that are not about to go."""
    return {name for name, state in application_states().items() if state != "DELETING"}


def run_alien() -> None:
    """Run somebody else's application."""
    from ray import serve

    class Alien:  # here, so that it is pickled by value: Ray's workers cannot import the tests
        async def __call__(self, request: Any) -> str:
            return "alien"

    alien = serve.deployment(Alien).options(ray_actor_options={"num_cpus": 0})
    serve.run(alien.bind(), name="alien", route_prefix="/alien")


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray that is not the servers' own."""
    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(tmp_path_factory.mktemp("r")),
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.mark.timeout(1800)
def test_servers_of_one_cluster_leave_each_other_and_others_alone(
    cluster: str, model: Path, tmp_path: Path
) -> None:
    flags = engine_flags(model)
    port = free_port()
    with starting_server(tmp_path / "a", *flags, port=port, ray_address=cluster) as first:
        wait_until_up(first)
        [app] = applications()
        refused_where_another_has_the_route(tmp_path / "r", flags, app, cluster)

        prefixed = [*flags, "--route-prefix", "/b"]
        with starting_server(tmp_path / "b", *prefixed, ray_address=cluster) as second:
            url = f"http://127.0.0.1:{port}"
            wait_for_log(second, f"serving {MODEL} at {url}/b/v1")
            assert f"port={second.port} has no effect" in second.log.read_text()
            run_alien()
            for base in (url, f"{url}/b"):
                assert answers(base)
            spec = json.loads(fetch(f"{url}/b/openapi.json").text)
            assert spec["servers"] == [{"url": "/b"}]

            assert first.stop() == 0
            assert app not in applications()
            assert not answers(url)
            assert answers(f"{url}/b")
            assert fetch(f"{url}/alien").text == "alien"

            waits_for_room_until_asked_to_end(tmp_path, model, cluster)
            assert answers(f"{url}/b")
            assert second.stop() == 0
        assert fetch(f"{url}/alien").text == "alien"
        assert applications() == {"alien"}


def refused_where_another_has_the_route(
    log: Path, flags: list[str], owner: str, cluster: str
) -> None:
    with starting_server(log, *flags, ray_address=cluster) as server:
        assert server.process.wait(WAIT_SECONDS) == 1
        last = log.read_text().splitlines()[-1]
        assert last.startswith(f"error: the application {owner!r} has the route / ")
        assert "--route-prefix" in last


def waits_for_room_until_asked_to_end(folder: Path, model: Path, cluster: str) -> None:
    args = {
        "model_loading_config": {"model_id": MODEL, "model_source": str(model)},
        "engine_kwargs": ENGINE,
        "deployment_config": {"ray_actor_options": {"num_cpus": 64}},
    }
    application = {"name": "big", "route_prefix": "/big", "import_path": "-", "args": args}
    file = folder / "big.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    with starting_server(folder / "big", str(file), ray_address=cluster) as server:
        wait_for_log(server, "it asks for CPU: 64; free in all: CPU: ")
        assert server.stop() == 0
        states = [state for name, state in application_states().items() if name.startswith("big")]
        assert set(states) <= {"DELETING"}  # Serve gives up a waiting replica slowly


def wait_for_log(server: Server, text: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while text not in server.log.read_text():
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.2)


def answers(base: str) -> bool:
    """Whether a server of ours is there and generates."""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
    return fetch(f"{base}/v1/completions", "POST", body=body).status == 200
