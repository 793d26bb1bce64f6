"""Random values in every field of a request: no engine death, no 5xx, and those in bounds finish.

A slice of what `make prove` runs 20,000 of (`tests/slow/test_many_random_requests.py`).
"""

import asyncio
import json
from random import Random
from typing import Any

import pytest
from support.api_server import MODEL
from support.random_requests import EDGES, HUGE, NUMBERS, PROFILE, at_edge, batches, random_request
from support.random_runs import UNFORESEEN, Door, RandomRuns

from saqqara.cluster.batch.lines import BadLine, RowParser
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.scores import SCORES
from saqqara.compression.shapes import SHAPES

SIZE, NUM_AIMED = 12, 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RandomRuns:
    return RandomRuns(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("door", ["python", "http"])
def test_no_request_ends_the_engine_or_is_answered_with_a_failure(
    runs: RandomRuns, door: Door
) -> None:
    """Each door gets half of the edges; `make prove` sends all to both."""
    edges = EDGES[door == "http" :: 2]
    num_batches = -(-len(edges) // NUM_AIMED)
    runs.run(door, 3, num_batches, size=SIZE, num_aimed=NUM_AIMED, edges=edges)
    tally = runs.tallies[door]
    assert {*map(str, edges)} <= {*tally.tried}
    # Half of what is sent aims at edges, most of which are to be refused.
    assert tally.num_finished >= 0.45 * tally.counts.total(), tally.counts
    assert all(UNFORESEEN in error for error in tally.errors)


def test_requests_are_those_of_the_seed() -> None:
    """So that a batch that failed can be sent again."""
    first, second, other = (repr(next(batches(seed, 20, 10))) for seed in (1, 1, 2))
    assert first == second != other


def test_values_beyond_bounds_are_beyond_them() -> None:
    """Else a valid request would be expected to be refused, or the reverse."""
    for name, bound in NUMBERS.items():
        for side in ("least", "most", "below", "above"):
            assert bound.accepts(at_edge(bound, side)) == (side in ("least", "most")), name
        assert any(not bound.accepts(value) for value in HUGE)


def test_a_request_is_wrong_where_it_was_aimed_beyond() -> None:
    for edge in EDGES:
        drawn = random_request(Random(1), edge)
        assert edge in drawn.tried
        assert drawn.is_wrong == edge.is_wrong, drawn


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
        runs.engine.add(Request("r", body["prompt"], retention=retention))
    setting = str(error.value).removeprefix("retention: ").partition(":")[0]
    assert reply["error"]["message"].startswith(f"retention: {setting}")
    line = RowParser("m", {}).parse(1, json.dumps(body))
    if isinstance(line, BadLine):
        assert line.field == "retention"
        assert line.message.startswith(f"retention: {setting}")
        return
    [request] = line.requests  # known to be wrong once there is a model
    with pytest.raises(ValueError, match=r"^retention: "):
        runs.engine.add(Request("r", request.prompt, retention=request.retention))


def test_a_wide_pooling_is_that_of_the_prompt(runs: RandomRuns) -> None:
    retention = {"method": "snapkv", "budget": "50%", "window": 4, "sinks": 0}
    for kernel_size in (181, 2**24 - 1):  # all of 90 tokens, and far beyond
        runs.engine.add(
            Request(
                f"k{kernel_size}",
                list(range(90)),
                SamplingParams(temperature=0, max_tokens=4),
                retention={**retention, "kernel_size": kernel_size},
            )
        )
    ended: list[Any] = []
    while runs.engine.has_unfinished():
        ended += [output for output in runs.engine.step() if output.finished]
    first, second = (output.outputs[0].token_ids for output in ended)
    assert first == second


@pytest.mark.parametrize("shape", [name for name in SHAPES if SHAPES[name].heads_differ])
@pytest.mark.parametrize("score", ["streaming", "knorm", "random", "h2o"])
def test_rows_whose_share_is_nothing_are_compacted_to_nothing(
    runs: RandomRuns, score: str, shape: str
) -> None:
    """Without a window and sinks a head may keep no token, after prefill and while decoding."""
    retention: dict[str, Any] = {"score": score, "shape": shape, "sinks": 0, "budget": 1}
    if SCORES[score].fixed_window is None:
        retention["window"] = 0
    if shape == "profile":
        retention |= {"profile": {**PROFILE, "0-0": [100.0], "1-0": [100.0]}, "head_beta": 1e6}
    runs.engine.add(
        Request(
            "r",
            list(range(40)),
            SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
            retention={**retention, "decode": {"slack_pages": 1}},
        )
    )
    ended: list[Any] = []
    while runs.engine.has_unfinished():
        ended += [output for output in runs.engine.step() if output.finished]
    assert [output.error for output in ended] == [None]
    assert len(ended[0].outputs[0].token_ids) == 24
