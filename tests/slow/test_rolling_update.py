"""Settings of a server are changed while it streams: no stream is cut, and no request refused."""

import json
import math
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
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

NUM_TOKENS = (500, 700, 900, 1100)  # of the streams of four clients, which end at different times
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


class Client:
    """Reads one stream after the other until it is told to end; a cut or a refused one raises.

    Args:
        url: of the server.
        num_tokens: of each stream.
        is_over: whether no other stream is to be begun.
    """

    def __init__(self, url: str, num_tokens: int, is_over: threading.Event) -> None:
        self._url = url
        self._num_tokens = num_tokens
        self._is_over = is_over
        self.has_begun = threading.Event()
        self.spans: list[tuple[float, float]] = []

    def read(self) -> None:
        """Check each stream to its end; `spans` says when its first and last event came."""
        while not self._is_over.is_set():
            self.spans.append(self._read_one())

    def _read_one(self) -> tuple[float, float]:
        body = {
            "model": MODEL,
            "prompt": "hello",
            "max_tokens": self._num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        events: list[str] = []
        begun = math.inf
        with urllib.request.urlopen(request, timeout=CHANGE_SECONDS) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    events.append(line.decode().strip().removeprefix("data: "))
                    begun = min(begun, time.monotonic())
                    self.has_begun.set()
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] == self._num_tokens
        assert json.loads(events[-3])["choices"][0]["finish_reason"] == "length"
        return begun, time.monotonic()


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
    is_over = threading.Event()
    clients = [Client(url, num_tokens, is_over) for num_tokens in NUM_TOKENS]
    with ThreadPoolExecutor(len(clients)) as threads:
        reading = [threads.submit(client.read) for client in clients]
        try:
            for client in clients:
                assert client.has_begun.wait(60)
            deploy(model, deployment, max_n=2)
            statuses = [ask(url, 2)]
            while statuses[-1] != 200:
                assert time.monotonic() < deadline, statuses
                statuses.append(ask(url, 2))
                time.sleep(0.05)
            changed = time.monotonic()
            while not is_running():
                assert time.monotonic() < deadline
                time.sleep(0.5)
        finally:
            is_over.set()
        for future in reading:
            future.result()
    assert set(statuses) == {200, 400}, "each was answered, by the old or by the new"
    spans = [span for client in clients for span in client.spans]
    assert any(begun < changed < ended for begun, ended in spans), "no stream outlived its settings"
    assert {ask(url, 2) for _ in range(10)} == {200}


def is_running() -> bool:
    """Whether Serve has replaced all that it has to."""
    from ray import serve

    app = serve.status().applications[APP]
    return app.status.value == "RUNNING" and all(
        deployment.status.value == "HEALTHY" for deployment in app.deployments.values()
    )
