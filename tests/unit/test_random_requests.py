"""Random values in every field of a request: no engine death, no 5xx, and those in bounds finish.

A slice of what `make prove` runs 20,000 of (`tests/slow/test_random_requests.py`).
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.api_server import MODEL
from support.random_requests import Drawn, requests
from support.random_runs import RandomRuns

from saqqara.cluster.batch_input import BadLine, RowParser
from saqqara.cluster.request import SamplingParams

BATCHES = st.lists(requests(), min_size=8, max_size=8)
slice_of_them = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RandomRuns:
    return RandomRuns(tmp_path_factory.mktemp("model"))


@slice_of_them
@given(batch=BATCHES)
def test_no_request_ends_the_engine(runs: RandomRuns, batch: Sequence[Drawn]) -> None:
    runs.python(batch)


@slice_of_them
@given(batch=BATCHES)
def test_no_body_is_answered_with_a_failure(runs: RandomRuns, batch: Sequence[Drawn]) -> None:
    runs.http(batch)


def test_half_of_them_finish(runs: RandomRuns) -> None:
    """Else the tests above would say little; run after them."""
    total = runs.counts.total()
    if total == 0:
        pytest.skip("the tests above did not run")
    assert runs.num_finished >= total / 2, runs.counts
    assert not runs.errors


CASES: dict[str, dict[str, Any]] = {
    "slack beyond int64": {"method": "snapkv", "decode": {"slack_pages": 2**70}},
    "pooling wider than any prompt": {"method": "snapkv", "kernel_size": 1_000_000_001},
    "profile that is a list": {"method": "headkv", "profile": []},
    "profile whose sum overflows": {"method": "headkv", "profile": {"0-0": [1e308, 1e308]}},
    "profile of another model": {"method": "headkv", "profile": {"0-0": [1.0]}},
    "a layer that is none": {"method": "knorm", "skip_layers": [4]},
    "a window of all memory": {"method": "streaming", "window": 2**40},
    "a seed of 65 bits": {"method": "random", "seed": 2**64},
    "propagation beyond the layers": {
        "method": "fastkv",
        "propagate": {"kind": "once", "layer": 4},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_retention_that_cannot_be_met_is_refused_at_every_door(
    runs: RandomRuns, name: str
) -> None:
    """HTTP says 400 and the field; a batch line and Python name the same setting."""
    retention = {**CASES[name], "budget": "25%"}
    body: dict[str, Any] = {
        "prompt": "The quick brown fox " * 4,
        "max_tokens": 2,
        "retention": retention,
    }
    post = runs.server.post("/v1/completions", {"model": MODEL, **body})
    status, reply = asyncio.run(post)
    assert (status, reply["error"]["param"]) == (400, "retention")
    with pytest.raises(ValueError, match=": ") as error:
        runs.engine.add_request("r", body["prompt"], retention=retention)
    setting = str(error.value).removeprefix("retention: ").partition(":")[0]
    assert reply["error"]["message"].startswith(f"retention: {setting}")
    line = RowParser("m", {}).parse(1, json.dumps(body))
    if isinstance(line, BadLine):
        assert line.field == "retention"
        assert line.message.startswith(f"retention: {setting}")
        return
    [request] = line.requests  # known to be wrong once there is a model
    with pytest.raises(ValueError, match=r"^retention: "):
        runs.engine.add_request("r", request.prompt, retention=request.retention)


def test_a_wide_pooling_is_that_of_the_prompt(runs: RandomRuns) -> None:
    retention = {"method": "snapkv", "budget": "50%", "window": 4, "sinks": 0}
    for kernel_size in (181, 2**24 - 1):  # all of 90 tokens, and far beyond
        runs.engine.add_request(
            f"k{kernel_size}",
            list(range(90)),
            SamplingParams(temperature=0, max_tokens=4),
            retention={**retention, "kernel_size": kernel_size},
        )
    ended: list[Any] = []
    while runs.engine.has_unfinished():
        ended += [output for output in runs.engine.step() if output.finished]
    first, second = (output.outputs[0].token_ids for output in ended)
    assert first == second
