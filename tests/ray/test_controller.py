"""An engine behind a Ray actor answers as one in this process does, and says so when it dies."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.errors import ControllerLostError, EngineDeadError
from saqqara.cluster.on_ray.controller import (
    CONTROLLER_LOG,
    ControllerClient,
    connect,
    start_controller,
)
from saqqara.cluster.on_ray.placement import PlacementError
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
NOTICE_SECONDS = 15.0


@pytest.fixture
def client(tiny_config: EngineConfig, request: pytest.FixtureRequest) -> Iterator[ControllerClient]:
    """An engine of two stages; of as many as a test is parametrised with."""
    stages = getattr(request, "param", 2)
    config = tiny_config.model_copy(update={"pipeline_parallel_size": stages, "metrics_port": 0})
    client = start_controller(config)
    yield client
    client.shutdown()
    assert_gone(client)


def test_requests_run_and_a_bad_one_costs_only_itself(
    client: ControllerClient, tiny_config: EngineConfig
) -> None:
    facts = client.describe()
    assert [(w.rank, w.pipeline_rank) for w in facts.workers] == [(0, 0), (1, 1)]
    assert facts.log_dir == tiny_config.log_dir
    assert facts.start_seconds > 0
    assert client.metrics_address() == facts.metrics_address
    assert str(facts.metrics_address).startswith("127.0.0.1:"), "not open to the network"

    rejections = client.submit(
        [
            Request("a", prompt="The pyramid", sampling_params=GREEDY),
            Request("bad", prompt=(5, 10**6), sampling_params=GREEDY),
            Request(
                "b",
                prompt=tuple(range(100)),
                sampling_params=GREEDY,
                retention="snapkv",
                budget=48,
            ),
            Request("s", prompt="The", score_continuation=" step"),
        ]
    )
    assert [r.request_id for r in rejections] == ["bad"]
    assert "1000000" in rejections[0].error
    outputs = collect(client, {"a", "b", "s"})
    for name in ("a", "b"):
        output = outputs[name]
        assert isinstance(output, RequestOutput)
        assert len(output.outputs[0].token_ids) == 6
        assert output.outputs[0].finish_reason == "length"
    assert isinstance(outputs["s"], ScoreOutput)
    assert len(outputs["s"].logprobs) == len(" step")

    report = client.report()
    assert report.generation_tokens == 12
    assert sum(report.dropped_tokens_by_layer) == 4 * 2 * (100 - 48), "layers x kv heads"
    assert report.pages_leaked == 0
    client.reset_stats()
    assert client.report().generation_tokens == 0

    client.submit([Request("long", prompt="x", sampling_params=_long())])
    client.abort(["long", "unknown"])
    assert collect(client, {"long"})["long"].outputs[0].finish_reason == "abort"  # type: ignore[union-attr]

    client.submit([Request("stream", prompt="x", sampling_params=GREEDY, stream=True)])
    lengths: list[int] = []
    while not lengths or lengths[-1] < 6:
        for output in client.poll(10):
            assert isinstance(output, RequestOutput)
            lengths.append(len(output.outputs[0].token_ids))
    assert lengths == sorted(lengths)
    assert len(lengths) > 1


@pytest.mark.parametrize("client", [1], indirect=True)
def test_a_killed_rank_costs_time_and_nothing_else(client: ControllerClient) -> None:
    """It is the only one: `executor: ray` keeps it in a process of its own."""

    def ask(name: str) -> Request:
        return Request(name, prompt="x", sampling_params=_long())

    assert len(client.describe().workers) == 1
    client.submit([ask("before")])
    expected = collect(client, {"before"})["before"]
    client.submit([ask("a")])
    os.kill(client.describe().workers[0].pid, signal.SIGKILL)
    client.submit([ask("b")])
    outputs = collect(client, {"a", "b"})
    assert isinstance(expected, RequestOutput)
    for output in outputs.values():
        assert isinstance(output, RequestOutput)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    report = client.report()
    assert report.recoveries == {"died": 1}
    assert report.down_seconds > 0
    assert report.pages_leaked == 0


@pytest.mark.parametrize(
    ("signum", "what"),
    [(signal.SIGKILL, "has died: .*"), (signal.SIGSTOP, "has fallen silent; .*")],
)
def test_a_lost_controller_fails_its_client_and_takes_its_ranks_along(
    client: ControllerClient, signum: signal.Signals, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert client._own is not None
    os.kill(client._own[1].pid, signum)
    started = time.monotonic()
    with pytest.raises(ControllerLostError, match=f"the controller {what}{CONTROLLER_LOG}"):
        client.poll(NOTICE_SECONDS)
    assert time.monotonic() - started < NOTICE_SECONDS
    client.shutdown()
    with pytest.raises(EngineDeadError, match="was shut down"):
        client.poll()
    assert "the controller did not shut down cleanly" in caplog.text
    assert_gone(client, seconds=0.5)


def test_settings_that_do_not_fit_are_value_errors_and_leave_nothing(
    tiny_config: EngineConfig, tmp_path: Path
) -> None:
    before = len(_held())
    with pytest.raises(ValueError, match=r"layer_split=\[3, 3\]"):
        start_controller(
            tiny_config.model_copy(update={"pipeline_parallel_size": 2, "layer_split": (3, 3)})
        )
    with pytest.raises(PlacementError, match="device=cuda"):
        start_controller(
            tiny_config.model_copy(update={"device": "cuda"}), placement_timeout_seconds=0
        )
    assert len(_held()) == before


def test_connect_keeps_a_connection_that_there_is() -> None:
    assert connect() is False
    assert ray.is_initialized()


def collect(client: EngineClient, ids: Iterable[str]) -> dict[str, RequestOutput | ScoreOutput]:
    """Poll until every request has finished."""
    missing = set(ids)
    outputs = {}
    deadline = time.monotonic() + 60
    while missing:
        assert time.monotonic() < deadline, f"no answer to {missing}"
        for output in client.poll(timeout_seconds=1):
            outputs[output.request_id] = output
            missing.remove(output.request_id)
    return outputs


def assert_gone(client: ControllerClient, seconds: float = 10.0) -> None:
    """No process and no placement group of the engine is left."""
    deadline = time.monotonic() + seconds
    pids = [worker.pid for worker in client.describe().workers]
    while any(map(psutil.pid_exists, pids)) or _held():
        assert time.monotonic() < deadline, "something of the engine is left"
        time.sleep(0.05)


def _held() -> list[str]:
    groups = ray.util.placement_group_table().values()
    return [group["placement_group_id"] for group in groups if group["state"] != "REMOVED"]


def _long() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
