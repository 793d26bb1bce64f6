"""What a simulation reports: percentiles, goodput, and how replicas add up."""

import numpy as np
import pytest

from saqqara.cluster.simulation.measures import (
    Gaps,
    Objective,
    ReplicaRun,
    attains,
    measured,
)


def test_gaps_are_counted_within_half_a_percent() -> None:
    gaps = Gaps()
    values = np.random.default_rng(0).lognormal(-3, 1, 40_000)
    gaps.add(values[:10_000])
    gaps.add(values[10_000:])
    for percent in (1, 50, 90, 99, 99.9):
        assert gaps.percentile(percent) == pytest.approx(np.percentile(values, percent), rel=0.011)
    ends, shares = gaps.shares()
    assert shares[-1] == 1.0
    below = np.searchsorted(ends, 0.05)
    assert shares[below] == pytest.approx((values <= ends[below]).mean(), abs=1e-9)
    assert np.isnan(Gaps().percentile(50))


def test_an_objective_is_the_first_token_and_the_mean_of_the_rest() -> None:
    objective = Objective(ttft_seconds=2.0, itl_seconds=0.1)
    ttft = np.array([2.0, 2.1, 1.0, 1.0, 1.0, np.nan])
    decode = np.array([0.9, 0.9, 0.91, 0.0, 0.1, np.nan])
    tokens = np.array([10, 10, 10, 1, 2, 0])
    found = attains(objective, ttft, decode, tokens)
    assert found.tolist() == [True, False, False, True, True, False]


def a_run(
    arrived: list[float], first: list[float], last: list[float], **more: object
) -> ReplicaRun:
    made = ReplicaRun(
        np.array(arrived), np.array(first), np.array(last), np.array([5] * len(last)), 1.0
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_replicas_add_up() -> None:
    one = a_run([0, 1], [1, 4], [2, 8], seconds=8.0, busy_seconds=12.0, running_seconds=10.0)
    one.tokens_by_bin, one.page_seconds, one.peak_pages = [1, 2], 4.0, 0.75
    two = a_run([0], [np.nan], [np.nan], seconds=3.0, down_seconds=4.0, refused=1, recoveries=1)
    two.tokens_by_bin, two.preemptions, two.tokens[0] = [0, 0, 7], 3, 2
    found = measured([one, two], np.array([10, 20, 40]), Objective(2.0, 1.0), num_stages=2)
    told = found.summary
    assert (told.requests, told.finished, told.refused) == (3, 2, 1)
    assert (told.prompt_tokens, told.new_tokens, told.seconds) == (30, 10, 8.0)
    assert told.tokens_per_second == 10 / 8
    assert told.ttft_seconds["p50"] == 2.0  # of 1 and 3
    assert told.attained == pytest.approx(1 / 3)
    assert told.goodput_tokens_per_second == 5 / 8
    assert told.utilisation == 12 / (2 * 8 * 2)  # busy over replicas x seconds x stages
    assert told.unavailable == 4 / 16
    assert told.running == 10 / 8
    assert (told.pages_used, told.pages_peak) == (4 / 16, 0.75)
    assert (told.preemptions, told.recoveries) == (3, 1)
    assert found.tokens_per_second.tolist() == [1, 2, 7]
