"""When workers are started again, how often, and whose fault it was."""

import random

import pytest
from support.fake_clock import FakeClock

from saqqara.cluster.recovery.attempts import Attempts, RecoveryLimits
from saqqara.cluster.recovery.suspects import Suspects


def order(suspects: Suspects) -> list[str]:
    return list(suspects.order)


def test_the_first_start_comes_at_once_and_the_next_ones_wait_longer_each() -> None:
    clock = FakeClock()
    attempts = Attempts(RecoveryLimits(max_attempts=8), clock)
    waits = []
    while not attempts.is_hopeless:
        waits.append(attempts.wait_seconds)
        clock.time += attempts.wait_seconds
        attempts.begin()
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]


def test_a_new_token_makes_up_for_all_attempts() -> None:
    attempts = Attempts(RecoveryLimits(max_attempts=2), FakeClock())
    for _ in range(20):
        attempts.begin()
        assert not attempts.is_hopeless
        attempts.forget()
    attempts.begin()
    attempts.begin()
    assert attempts.is_hopeless


def test_attempts_long_ago_do_not_count() -> None:
    clock = FakeClock()
    attempts = Attempts(RecoveryLimits(max_attempts=2, window_seconds=100), clock)
    attempts.begin()
    clock.time += 60
    attempts.begin()
    assert attempts.num_recent == 2
    assert attempts.is_hopeless
    clock.time += 41
    assert attempts.num_recent == 1, "the first was 101 s ago"
    assert attempts.wait_seconds == 1


def test_being_there_at_two_losses_is_no_guilt() -> None:
    suspects = Suspects()
    for _ in range(2):
        assert suspects.lost(["a", "b"], "died") is None
    assert order(suspects) == ["a", "b"]
    for _ in range(10):
        assert suspects.lost(["a", "b", "c"], "died") is None, "nobody was alone"
    assert order(suspects) == ["a", "b", "c"]


def test_who_is_lost_alone_is_guilty_if_the_workers_work_for_others() -> None:
    suspects = Suspects()
    suspects.lost(["a", "b"], "died")
    suspects.lost(["a", "b"], "died")
    assert suspects.lost(["a"], "died") is None
    assert order(suspects) == ["b", "a"], "the others have their turn first"
    assert suspects.progress("b")
    assert suspects.lost(["a"], "died") is None, "twice may be chance"
    assert suspects.lost(["a"], "died") == "a"
    assert order(suspects) == []


def test_nobody_is_guilty_where_workers_are_lost_with_anybody() -> None:
    suspects = Suspects()
    suspects.lost(["a", "b"], "died")
    suspects.lost(["a", "b"], "died")
    for _ in range(5):
        assert suspects.lost(["a"], "failed") is None
        assert suspects.lost(["b"], "hung") is None
    suspects.forget("b")
    assert suspects.lost(["a"], "died") == "a", "there is nobody left to show more"


def test_one_that_was_at_no_loss_shows_whether_the_workers_work() -> None:
    suspects = Suspects()
    everybody = ["a", "b", "c"]
    assert suspects.turn(everybody) is None
    for running in (["a", "b"], ["a", "b"], ["a"], ["b"]):
        suspects.lost(running, "died")
    assert suspects.turn(["a", "b"]) == "a", "there is no control"
    assert suspects.turn(everybody) == "c"
    assert suspects.progress("c"), "it is the suspects' turn again"
    assert suspects.turn(everybody) == "a"
    assert [suspects.lost([name], "died") for name in "abab"] == [None, None, "a", "b"]


def test_a_control_that_is_lost_shows_nothing() -> None:
    suspects = Suspects()
    for running in (["a"], ["a"], ["a"], ["b"]):
        suspects.lost(running, "died")
    assert suspects.turn(["a", "b", "c"]) == "c"
    suspects.lost(["c"], "died")
    assert suspects.turn(["a", "b", "c"]) == "a"


def test_who_happens_to_be_alone_is_not_guilty_before_it_is_a_suspect() -> None:
    suspects = Suspects()
    assert [suspects.lost(["a"], "died") for _ in range(5)] == [*[None] * 4, "a"]


def test_who_runs_on_workers_that_were_stopped_or_cut_off_has_not_done_it() -> None:
    suspects = Suspects()
    assert [suspects.lost(["a"], "unreachable") for _ in range(9)] == [None] * 9
    assert order(suspects) == []


def test_a_new_token_clears_its_request_and_no_other() -> None:
    suspects = Suspects()
    suspects.lost(["a", "b"], "died")
    assert not suspects.progress("a"), "one loss makes no suspect"
    suspects.lost(["a", "b"], "died")
    assert order(suspects) == ["b"]
    suspects.lost(["b"], "died")
    assert suspects.progress("b")
    assert [suspects.lost(["b"], "died") for _ in range(5)] == [*[None] * 4, "b"], "from the start"


@pytest.mark.parametrize("seed", range(20))
def test_the_poison_is_found_among_many_and_nobody_else_is_blamed(seed: int) -> None:
    """Requests run as they are told to; one of them ends a worker whenever it runs."""
    rng = random.Random(seed)
    left = [f"r{i}" for i in range(12)]
    poison = rng.choice(left)
    suspects = Suspects()
    num_losses = 0
    while poison in left:
        running = [suspects.order[0]] if suspects.order else left
        by_itself = not suspects.order and rng.random() < 0.2
        if poison in running or by_itself:
            num_losses += 1
            guilty = suspects.lost(running, "died")
            assert guilty in (None, poison)
            left = [request for request in left if request != guilty]
        else:
            for request in running:
                suspects.progress(request)
    assert num_losses < 40
