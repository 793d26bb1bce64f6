"""Owners share the queue by tokens; within one owner, and with one alone, arrival decides."""

import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.queue import WaitingQueue
from saqqara.cluster.scheduling.sequence import Sequence, TokenRequest
from saqqara.compression.retention import Retention
from saqqara.workers.plan import SamplingSpec

FULL = Retention.parse("full")
SAMPLING = SamplingParams(max_tokens=10**6)
SPEC: SamplingSpec = SAMPLING.spec(0)


def make(
    arrival: int,
    owner: str = "",
    priority: int = 0,
    prompt_tokens: int = 10,
    max_tokens: int = 100,
    index: int = 0,
) -> Sequence:
    request = TokenRequest(
        str(arrival), (7,) * prompt_tokens, SAMPLING, FULL, priority=priority, owner=owner
    )
    return Sequence(
        request=request,
        index=index,
        arrival=arrival,
        spec=SPEC,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        max_output_tokens=max_tokens,
    )


def take(queue: WaitingQueue, count: int = 10**9) -> list[Sequence]:
    """The sequences in the order of their turns, as slots become free."""
    taken: list[Sequence] = []
    while len(taken) < count and (head := queue.head) is not None:
        queue.remove(head)
        taken.append(head)
    return taken


def owners(sequences: list[Sequence]) -> str:
    return "".join(s.request.owner for s in sequences)


def test_a_key_with_a_thousand_requests_does_not_stall_another_ones() -> None:
    queue = WaitingQueue()
    for arrival in range(1000):
        queue.add(make(arrival, "a"))
    assert owners(take(queue, 5)) == "aaaaa"
    queue.add(make(1000, "b"))
    queue.add(make(1001, "b"))
    assert owners(take(queue, 6)) in ("abaaba", "ababaa", "baabaa", "babaaa")
    assert len(queue) == 991


def test_owners_that_wait_advance_alike_in_tokens() -> None:
    """One asks for ten times as many tokens a request, so it has a tenth of the requests."""
    queue = WaitingQueue()
    for arrival in range(500):
        queue.add(make(arrival, "l", prompt_tokens=800, max_tokens=200))
    for arrival in range(500, 1000):
        queue.add(make(arrival, "s", prompt_tokens=60, max_tokens=40))
    counts = Counter(owners(take(queue, 220)))
    assert counts == {"s": 200, "l": 20}


def test_an_owner_that_comes_back_has_saved_nothing_up() -> None:
    queue = WaitingQueue()
    queue.add(make(0, "b"))
    take(queue)
    for arrival in range(1, 101):
        queue.add(make(arrival, "a"))
    take(queue, 50)
    for arrival in range(101, 151):
        queue.add(make(arrival, "b"))
    first = owners(take(queue, 20))
    assert abs(Counter(first)["a"] - 10) <= 1


def test_a_lower_priority_of_the_same_owner_costs_it_no_turn() -> None:
    queue = WaitingQueue()
    for arrival in range(100):
        queue.add(make(arrival, "a", priority=5))
    queue.add(make(100, "b"))
    queue.add(make(101, "a"))
    queue.add(make(102, "b"))
    assert [s.arrival for s in take(queue, 3)] == [100, 101, 102]


def test_what_was_taken_beyond_what_was_expected_is_charged_later() -> None:
    """Both may answer at length; only one of them does."""
    queue = WaitingQueue()
    pending = {"a": 0, "b": 0}
    counts = Counter("")
    arrival = 0
    for _ in range(300):
        for owner in pending:
            while pending[owner] < 4:
                queue.add(make(arrival, owner, max_tokens=5000))
                arrival += 1
                pending[owner] += 1
        [sequence] = take(queue, 1)
        owner = sequence.request.owner
        pending[owner] -= 1
        counts[owner] += 1
        sequence.output_token_ids += [7] * (2040 if owner == "a" else 400)
        queue.settle(sequence, has_run=True)
    assert 3.5 < counts["b"] / counts["a"] < 6.5  # 2,050 tokens against 410


def test_what_ends_before_it_waits_earns_its_owner_nothing() -> None:
    """As a request does that is left while its grammar is compiled."""
    queue = WaitingQueue()
    for arrival in range(4):
        queue.add(make(arrival, "ab"[arrival % 2]))
    queue.settle(make(4, "a"), has_run=True)
    queue.settle(make(5, "a"), has_run=False)
    for arrival in range(6, 8):
        queue.add(make(arrival, "ba"[arrival % 2]))
    assert owners(take(queue)) == "ababba"


def test_who_has_been_preempted_is_the_first_again() -> None:
    queue = WaitingQueue()
    for arrival in range(10):
        queue.add(make(arrival, "a"))
    first, second = take(queue, 2)
    for arrival in range(10, 14):
        queue.add(make(arrival, "bc"[arrival % 2]))
    queue.add(second)
    queue.add(first)
    assert take(queue, 2) == [first, second]


def test_a_preempted_sequence_is_first_also_after_the_queue_was_empty() -> None:
    queue = WaitingQueue()
    for arrival in range(10):
        queue.add(make(arrival, "a"))
    last = take(queue)[-1]
    queue.add(make(10, "b"))
    queue.add(last)
    assert queue.head is last


def test_who_has_passed_others_is_first_also_after_the_queue_was_empty() -> None:
    """As a sequence does behind one that waits for a prefix; it is preempted later."""
    queue = WaitingQueue()
    passed, passing = make(0, "a"), make(1, "a")
    queue.add(passed)
    queue.add(passing)
    queue.remove(passing)
    queue.remove(passed)
    queue.add(make(2, "a"))
    queue.add(passing)
    queue.add(make(3, "b"))
    assert [s.arrival for s in take(queue)] == [1, 2, 3]


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "pop", "drop", "again"]), st.integers(0, 10**6)),
    max_size=120,
)


@settings(deadline=None)
@given(OPERATIONS, st.integers(1, 3), st.integers(1, 4))
def test_the_queue_is_a_sorted_list(
    operations: list[tuple[str, int]], num_owners: int, run_length: int
) -> None:
    """Whatever comes and goes, against a list that is sorted anew; runs are short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saqqara.cluster.scheduling.queue._MAX_RUN", run_length)
        queue = WaitingQueue()
        waiting: list[Sequence] = []
        gone: list[Sequence] = []
        arrival = 0
        for name, number in operations:
            if name == "add":
                owner = "abc"[number % num_owners]
                waiting.append(make(arrival, owner, number % 3, 1 + number % 50, index=number % 2))
                arrival += 1
                queue.add(waiting[-1])
            elif name == "again" and gone:
                waiting.append(gone.pop(number % len(gone)))
                queue.add(waiting[-1])
            elif name != "again" and waiting:
                waiting.sort(key=lambda s: s.key)
                place = 0 if name == "pop" else number % len(waiting)
                gone.append(waiting.pop(place))
                queue.remove(gone[-1])
            waiting.sort(key=lambda s: s.key)
            assert list(queue) == waiting
            assert len(queue) == len(waiting)
            assert queue.head is (waiting[0] if waiting else None)
        for owner in "abc"[:num_owners]:
            for priority in range(3):
                mine = [s for s in waiting if s.request.owner == owner]
                mine = [s for s in mine if s.request.priority == priority]
                assert [s.arrival for s in mine] == sorted(s.arrival for s in mine)


def test_nothing_is_kept_of_owners_and_priorities_that_wait_no_more() -> None:
    queue = WaitingQueue()
    for arrival in range(2000):
        queue.add(make(arrival, str(arrival % 50), priority=arrival))
    take(queue)
    assert vars(vars(queue)["_shares"])["_levels"] == {}


def test_many_waiting_cost_an_arrival_hardly_more_than_few() -> None:
    """Against a sorted list, whose arrivals in front move all the others; in counts, not times."""
    queue = WaitingQueue()
    rng = random.Random(0)
    num = 20_000
    for arrival in range(num):
        queue.add(make(arrival, str(rng.randrange(20))))
    runs = vars(queue)["_runs"]
    assert max(map(len, runs)) <= 1024
    assert len(runs) < 60
    assert sum(map(len, runs)) == len(queue) == num
    assert [s.key for s in islice(queue, 100)] == sorted(s.key for s in queue)[:100]
