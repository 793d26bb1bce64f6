"""The arithmetic behind the server's figures, by hand."""

import importlib
from typing import Any

import pytest


@pytest.fixture(scope="module")
def figures() -> Any:
    return importlib.import_module("harness.server_figures")


def test_ratios_are_taken_within_a_round(figures: Any) -> None:
    rounds = [{"offline": 100.0, "server": 90.0}, {"offline": 50.0, "server": 50.0}]
    assert figures.ratios(rounds, "server", "offline") == [0.9, 1.0]


def test_each_of_three_comes_first_once_in_three_rounds(figures: Any) -> None:
    orders = [figures.rotated(("a", "b", "c"), number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_gaps_lie_between_pieces(figures: Any) -> None:
    assert figures.gaps([1.0, 1.5, 3.0]) == [0.5, 1.5]
    assert figures.gaps([1.0]) == []


def test_percentiles_interpolate(figures: Any) -> None:
    assert figures.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert figures.percentile([0.0, 1.0], 0.99) == pytest.approx(0.99)
    assert figures.percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 0.5)


SCRAPE = """# TYPE vllm:gap_seconds histogram
vllm:gap_seconds_bucket{le="0.1",model_name="m"} 10.0
vllm:gap_seconds_bucket{le="0.2",model_name="m"} 30.0
vllm:gap_seconds_bucket{le="+Inf",model_name="m"} 40.0
vllm:gap_seconds_sum{model_name="m"} 5.0
vllm:other_seconds_bucket{le="0.1",model_name="m"} 99.0
"""


def test_quantiles_are_of_what_came_between_two_scrapes(figures: Any) -> None:
    after = figures.buckets(SCRAPE, "vllm:gap_seconds")
    assert after == {0.1: 10.0, 0.2: 30.0, float("inf"): 40.0}
    assert figures.histogram_quantile({}, after, 0.25) == pytest.approx(0.1)
    assert figures.histogram_quantile({}, after, 0.5) == pytest.approx(0.15)
    assert figures.histogram_quantile({}, after, 0.99) == 0.2, "beyond the last bound"
    before = {0.1: 10.0, 0.2: 10.0, float("inf"): 10.0}
    assert figures.histogram_quantile(before, after, 0.5) == pytest.approx(0.1 + 0.1 * 15 / 20)
    with pytest.raises(ValueError, match="nothing was observed"):
        figures.histogram_quantile(after, after, 0.5)


def test_what_http_and_serve_cost_alone_is_told_from_what_is_ours(figures: Any) -> None:
    first = figures.FirstTokens(client=[0.075], engine=[0.060], idle=[0.009])
    assert first.overhead == [pytest.approx(0.015)]
    assert first.ours == [pytest.approx(0.006)]


@pytest.mark.parametrize(
    ("ratio", "client", "gap", "met"),
    [
        (0.96, 0.069, 0.140, [True, True, True, True]),
        (0.94, 0.071, 0.160, [False, False, False, False]),
    ],
)
def test_targets_are_met_or_missed(
    figures: Any, ratio: float, client: float, gap: float, met: list[bool]
) -> None:
    rounds = [{"offline": 100.0, "server": 100 * ratio, "server, streamed": 100 * ratio}]
    first = figures.FirstTokens(client=[client], engine=[0.060], idle=[0.0])
    found = list(figures.targets(rounds, first, [gap], 0.1))
    assert [is_met for *_, is_met in found] == met
