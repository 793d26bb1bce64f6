"""How long a step may take: from the steps before it, never less than the work can need."""

import math
import random

import pytest
from support.plans import new_sequence

from saqqara.cluster.recovery.deadline import (
    FLOOR_SECONDS,
    MOST_SECONDS,
    NOTHING,
    SLACK,
    WARM_UP_SECONDS,
    Features,
    StepDeadline,
    Workload,
    together,
)
from saqqara.workers.plan import DecodeItem, PrefillGroup, StepPlan


def test_the_work_of_a_plan_is_prefill_by_layers_and_decode_by_positions() -> None:
    workload = Workload(layers=10)
    first = StepPlan(
        0,
        new=(new_sequence(0, list(range(6))), new_sequence(1, list(range(4)))),
        prefill=(PrefillGroup((0, 1), 0, 3),),
    )
    assert workload.features(first) == (1, 3 * 10, 3 * (36 + 16), 0, 0)
    second = StepPlan(
        1, prefill=(PrefillGroup((0, 1), 3, 10),), decode=(DecodeItem(2, 9), DecodeItem(3, 19, 2))
    )
    assert workload.features(second) == (1, 7 * 10, 7 * 52, 3, 10 + 2 * 20)
    assert workload.features(StepPlan(2, free=(0, 1))) == NOTHING
    assert together([(1, 1, 2, 3, 4), (1, 10, 20, 30, 40)]) == (1, 11, 22, 33, 44)


def test_who_shares_a_prefill_is_no_work() -> None:
    leader = new_sequence(0, list(range(6)))
    follower = new_sequence(1, list(range(6)), shares_prefill_with=0)
    plan = StepPlan(0, new=(leader, follower), prefill=(PrefillGroup((0, 1), 0, 1),))
    assert Workload(layers=4).features(plan) == (1, 6, 36, 0, 0)


def test_a_first_step_of_its_sort_may_take_long_and_then_the_floor_holds() -> None:
    deadline = StepDeadline(compiles=False)
    prefill, decode = (1.0, 1e4, 1e7, 0.0, 0.0), (1.0, 0.0, 0.0, 8.0, 8e3)
    assert deadline.seconds(prefill) == MOST_SECONDS
    deadline.note(prefill, 0.2)
    assert deadline.seconds(prefill) == FLOOR_SECONDS
    assert deadline.seconds(decode) == MOST_SECONDS, "it tells nothing of decode"
    deadline.note(decode, 0.01)
    assert deadline.seconds(decode) == FLOOR_SECONDS
    assert deadline.seconds(together([prefill, decode])) == MOST_SECONDS, "never seen together"


def test_a_long_prefill_is_no_hang() -> None:
    """The cost of attention grows with the square of a prompt, and short ones do not show it."""
    deadline = StepDeadline(compiles=False)
    num_layers, short, long = 32, 1_000, 100_000
    deadline.note((1.0, num_layers * short, num_layers * short**2, 0.0, 0.0), 0.1)
    seconds = 0.1 * (long / short) ** 2  # all of it was attention
    allowed = deadline.seconds((1.0, num_layers * long, num_layers * long**2, 0.0, 0.0))
    assert seconds > 100 * FLOOR_SECONDS / SLACK
    assert allowed == min(SLACK * seconds, MOST_SECONDS)


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_holds_whatever_the_parts_of_a_step_cost(seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.choice([0.0, 10 ** rng.uniform(-6, 0)]) for _ in NOTHING]

    def work() -> Features:
        return (1.0, *(rng.choice([0.0, rng.uniform(1, 1e5)]) for _ in costs[1:]))

    def needs(features: Features) -> float:
        return sum(cost * feature for cost, feature in zip(costs, features, strict=True))

    deadline = StepDeadline(compiles=False)
    for _ in range(100):
        features = work()
        assert deadline.seconds(features) >= min(SLACK * needs(features) * 0.999, MOST_SECONDS)
        deadline.note(features, needs(features))


def test_one_slow_step_raises_the_deadline_of_its_like_for_a_while_only() -> None:
    deadline = StepDeadline(compiles=False)
    decode = (1.0, 0.0, 0.0, 8.0, 8e3)
    deadline.note(decode, 3.0)
    assert deadline.seconds(decode) == 3 * SLACK
    for _ in range(8):
        deadline.note(decode, 0.01)
    assert deadline.seconds(decode) == FLOOR_SECONDS


def test_a_deadline_that_was_passed_is_longer_until_a_step_ends() -> None:
    deadline = StepDeadline(compiles=False)
    deadline.note(NOTHING, 0.01)
    deadline.passed()
    deadline.passed()
    assert deadline.seconds(NOTHING) == 4 * FLOOR_SECONDS
    for _ in range(20):
        deadline.passed()
    assert deadline.seconds(NOTHING) == MOST_SECONDS
    deadline.note(NOTHING, 0.01)
    assert deadline.seconds(NOTHING) == FLOOR_SECONDS


def test_where_kernels_are_compiled_a_new_kind_of_step_has_time_for_it() -> None:
    deadline = StepDeadline(compiles=True)
    small, large = (1.0, 0.0, 0.0, 8.0, 8e3), (1.0, 0.0, 0.0, 64.0, 64e3)
    deadline.note(small, 30.0)  # it was compiled
    for _ in range(8):
        deadline.note(small, 0.01)
    assert deadline.seconds(small) == FLOOR_SECONDS
    assert WARM_UP_SECONDS < deadline.seconds(large) < WARM_UP_SECONDS + FLOOR_SECONDS
    deadline.note(large, 0.05)
    assert deadline.seconds(large) == FLOOR_SECONDS
    deadline.restart()
    assert deadline.seconds(large) > WARM_UP_SECONDS, "the new processes compile again"


def test_what_is_remembered_is_bounded() -> None:
    deadline = StepDeadline(compiles=False)
    for i in range(500):
        deadline.note((1.0, 2.0 ** (i % 50), 2.0 ** (i // 10), 1.0, 1.0), 1.0)
    assert len(deadline._samples) <= 64
    assert math.isfinite(deadline.seconds((1.0, 1.0, 1.0, 1.0, 1.0)))
