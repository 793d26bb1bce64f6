"""Settings of a server are changed while it streams: no stream is cut, and no request refused."""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Read when Ray is imported or a process of it starts; see tests/ray/conftest.py.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import ray
from support.api_server import ENGINE, MODEL
from support.byte_llama import save_tiny_llama
from support.server import fetch, free_port

# Importing Ray Serve (2.60) warns of its own use of pydantic.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

NUM_STREAMS = 4
NUM_TOKENS = 6_000  # of each stream: more than come while a replica starts
CHANGE_SECONDS = 400.0
APP = "saqqara"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a Serve listens that runs nothing yet."""
    from ray import serve

    folder = tmp_path_factory.mktemp("r")
    ray.init(
        address="local",
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(folder),
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder, max_position=2**15, num_hidden_layers=8)
    return folder


def deploy(model: Path, deployment: dict[str, Any], max_n: int) -> None:
    from ray import serve

    from saqqara.cluster.on_ray.serve import build_app

    args = {
        "model_loading_config": {"model_id": MODEL, "model_source": str(model)},
        "engine_kwargs": {**ENGINE, "max_num_seqs": 8, "retention": "streaming", "budget": 64},
        "deployment_config": deployment,
        "limits": {"max_n": max_n},
    }
    [_] = serve.run_many(
        [serve.RunTarget(build_app(args), name=APP, route_prefix="/")],
        wait_for_applications_running=False,
    )


class Stream:
    """A stream, read as it comes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.has_begun = threading.Event()
        self.has_ended = False

    def read(self) -> list[str]:
        """The data of its events."""
        body = {
            "model": MODEL,
            "prompt": "hello",
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        events = []
        with urllib.request.urlopen(request, timeout=CHANGE_SECONDS) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    events.append(line.decode().strip().removeprefix("data: "))
                    self.has_begun.set()
        self.has_ended = True
        return events


def ask(url: str, n: int) -> int:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 1, "n": n}
    return fetch(f"{url}/v1/completions", "POST", body=body).status


@pytest.mark.parametrize(
    "deployment",
    [
        {"num_replicas": 1, "max_surge_percent": 100},
        {"num_replicas": 2},
    ],
    ids=["one replica and one beside it", "two replicas"],
)
def test_streams_go_on_and_requests_are_answered_while_replicas_are_replaced(
    url: str, model: Path, deployment: dict[str, Any]
) -> None:
    deploy(model, deployment, max_n=1)
    deadline = time.monotonic() + CHANGE_SECONDS
    while not is_running() or ask(url, 1) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert ask(url, 2) == 400, "the old settings"
    streams = [Stream(url) for _ in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        reading = [threads.submit(stream.read) for stream in streams]
        for stream in streams:
            assert stream.has_begun.wait(60)
        deploy(model, deployment, max_n=2)
        statuses = [ask(url, 2)]
        while statuses[-1] != 200:
            assert time.monotonic() < deadline, statuses
            statuses.append(ask(url, 2))
            time.sleep(0.05)
        num_open = sum(not stream.has_ended for stream in streams)
        assert set(statuses) == {200, 400}, "each was answered, by the old or by the new"
        assert num_open > 0, "the streams were too short to show anything"
        for events in (future.result() for future in reading):
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["usage"]["completion_tokens"] == NUM_TOKENS
            assert json.loads(events[-3])["choices"][0]["finish_reason"] == "length"
    while not is_running():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert {ask(url, 2) for _ in range(10)} == {200}


def is_running() -> bool:
    """Whether Serve has replaced all that it has to."""
    from ray import serve

    app = serve.status().applications[APP]
    return app.status.value == "RUNNING" and all(
        deployment.status.value == "HEALTHY" for deployment in app.deployments.values()
    )
