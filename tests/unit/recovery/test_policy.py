"""When workers are started again, how often, and whose fault it was: policy on a clock of its own."""

import random

import pytest

from saqqara.cluster.recovery.attempts import Attempts, RecoveryLimits
from saqqara.cluster.recovery.suspects import Suspects


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_start_comes_at_once_and_the_next_ones_wait_longer_each() -> None:
    clock = Clock()
    attempts = Attempts(RecoveryLimits(max_attempts=8), clock)
    waits = []
    while not attempts.is_hopeless:
        waits.append(attempts.wait_seconds)
        clock.now += attempts.wait_seconds
        attempts.begin()
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]


def test_a_new_token_makes_up_for_all_attempts() -> None:
    attempts = Attempts(RecoveryLimits(max_attempts=2), Clock())
    for _ in range(20):
        attempts.begin()
        assert not attempts.is_hopeless
        attempts.forget()
    attempts.begin()
    attempts.begin()
    assert attempts.is_hopeless


def test_attempts_long_ago_do_not_count() -> None:
    clock = Clock()
    attempts = Attempts(RecoveryLimits(max_attempts=2, window_seconds=100), clock)
    attempts.begin()
    clock.now += 60
    attempts.begin()
    assert attempts.is_hopeless
    clock.now += 41
    assert not attempts.is_hopeless, "the first was 101 s ago"
    assert attempts.wait_seconds == 1


def test_being_there_at_two_losses_is_no_guilt() -> None:
    suspects = Suspects()
    for _ in range(2):
        assert suspects.lost({"a", "b"}) is None
    assert suspects.order == ("a", "b")
    for _ in range(10):
        assert suspects.lost({"a", "b", "c"}) is None, "nobody was alone"
    assert suspects.order == ("a", "b", "c")


def test_who_is_lost_alone_twice_is_guilty() -> None:
    suspects = Suspects()
    suspects.lost({"a", "b"})
    suspects.lost({"a", "b"})
    assert suspects.lost({"a"}) is None
    assert suspects.order == ("b", "a"), "the others have their turn first"
    assert suspects.clear("b")
    assert suspects.lost({"a"}) == "a"
    assert suspects.order == ()


def test_who_happens_to_be_alone_is_not_guilty_before_it_is_a_suspect() -> None:
    suspects = Suspects()
    assert [suspects.lost({"a"}) for _ in range(4)] == [None, None, None, "a"]


def test_a_new_token_clears_its_request_and_no_other() -> None:
    suspects = Suspects()
    suspects.lost({"a", "b"})
    assert not suspects.clear("a"), "one loss makes no suspect"
    suspects.lost({"a", "b"})
    assert suspects.order == ("b",)
    suspects.lost({"b"})
    assert suspects.clear("b")
    assert [suspects.lost({"b"}) for _ in range(4)] == [None, None, None, "b"], "from the start"


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
            guilty = suspects.lost(running)
            assert guilty in (None, poison)
            left = [request for request in left if request != guilty]
        else:
            for request in running:
                suspects.clear(request)
    assert num_losses < 60
