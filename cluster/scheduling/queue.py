"""The queue of sequences without a slot."""

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import chain

from .sequence import Key, Sequence, Status

_MAX_RUN = 1024
_USUAL_OUTPUT_TOKENS = 256  # of an answer that may be longer: few clients say how long it will be


def _key(sequence: Sequence) -> Key:
    return sequence.key


@dataclass(slots=True)
class _Level:
    """One priority while sequences of it wait: how far it has come, and its owners, in tokens.

    `latest` are the owners' latest turns, `next_` where their next ones are.
    """

    now: int
    num_waiting: int = 0
    latest: dict[str, int] = field(default_factory=dict)
    next_: dict[str, int] = field(default_factory=dict)


class Shares:
    """Whose turn it is among the owners of one priority: start-time fair queueing by tokens.

    Source: Goyal, Vin and Cheng, "Start-Time Fair Queuing", SIGCOMM 1996. Each sequence gets a
    turn when it comes: where its owner's sequence before it is expected to end, in tokens, or where
    the priority has come to if that is later. So owners with much and with little to do advance
    alike, and a first request of an owner is next, however many of another one wait. What a
    sequence takes beyond what was expected is charged to its owner's later ones.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._furthest = 0  # where a priority begins in which nobody waits

    def enter(self, sequence: Sequence) -> None:
        """Count a sequence that begins to wait; it keeps the turn that it may have already."""
        request = sequence.request
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = _Level(self._furthest)
        level.num_waiting += 1
        if sequence.turn is None:
            earliest = max(level.now, level.latest.get(request.owner, 0))
            turn = max(earliest, level.next_.get(request.owner, 0))
            sequence.turn = level.latest[request.owner] = turn
            level.next_[request.owner] = turn + _expected_tokens(sequence)

    def leave(self, sequence: Sequence, *, was_its_turn: bool) -> None:
        """A sequence waits no more; `was_its_turn`: none of its priority was before it."""
        level = self._levels[sequence.request.priority]
        level.num_waiting -= 1
        if was_its_turn:
            level.now = max(level.now, sequence.turn or 0)
            self._furthest = max(self._furthest, level.now)
        if level.num_waiting == 0:  # nobody waits, so nobody is owed anything
            # Who has passed others may come back, and has had its turn before all that come later.
            self._furthest = max([self._furthest, *level.latest.values()])
            del self._levels[sequence.request.priority]

    def settle(self, sequence: Sequence, *, has_run: bool) -> None:
        """A sequence has ended: charge what it has taken instead of what was expected."""
        request = sequence.request
        level = self._levels.get(request.priority)
        if sequence.turn is None or level is None or request.owner not in level.next_:
            return  # it was never charged, or nobody is owed anything
        taken = _expected_tokens(sequence, len(sequence.output_token_ids)) if has_run else 0
        level.next_[request.owner] += taken - _expected_tokens(sequence)


def _expected_tokens(sequence: Sequence, num_output: int = _USUAL_OUTPUT_TOKENS) -> int:
    """What a sequence takes: its output, and its prompt, which the choices of a request share."""
    if sequence.is_score:
        num_output = len(sequence.known_after_prompt)
    prompt = sequence.prompt_tokens if sequence.index == 0 else 0
    return prompt + min(num_output, sequence.max_output_tokens)


class WaitingQueue:
    """Waiting sequences by priority, then by their owners' turns, then by arrival.

    Owners share what a priority gets by tokens (see `Shares`); the sequences of one owner go in
    order of arrival. A preempted sequence had its turn before any of its priority that still waits,
    so it comes to the front by the same rule.

    They stand in sorted runs of bounded length: to add or remove one costs the logarithm of their
    number, and moves no more than a run.
    """

    def __init__(self) -> None:
        self._runs: list[list[Sequence]] = []
        self._firsts: list[Key] = []  # of each run
        self._num = 0
        self._shares = Shares()

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._runs)

    @property
    def head(self) -> Sequence | None:
        """The sequence whose turn it is."""
        return self._runs[0][0] if self._runs else None

    def add(self, sequence: Sequence) -> None:
        """Put a sequence where its priority, its owner's turn and its arrival say."""
        self._shares.enter(sequence)
        self._num += 1
        if not self._runs:
            self._runs, self._firsts = [[sequence]], [sequence.key]
            return
        index = max(bisect_right(self._firsts, sequence.key) - 1, 0)
        run = self._runs[index]
        insort(run, sequence, key=_key)
        self._firsts[index] = run[0].key
        if len(run) > _MAX_RUN:
            half = len(run) // 2 if index + 1 < len(self._runs) else _MAX_RUN
            self._runs[index : index + 1] = [run[:half], run[half:]]
            self._firsts.insert(index + 1, run[half].key)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        index = bisect_right(self._firsts, sequence.key) - 1
        run = self._runs[index]
        place = bisect_left(run, sequence.key, key=_key)
        assert run[place] is sequence, "the sequence is not waiting"
        before = run[place - 1] if place else self._runs[index - 1][-1] if index else None
        is_first = before is None or before.request.priority != sequence.request.priority
        self._shares.leave(sequence, was_its_turn=is_first)
        self._num -= 1
        del run[place]
        if not run:
            del self._runs[index], self._firsts[index]
        elif place == 0:
            self._firsts[index] = run[0].key

    def settle(self, sequence: Sequence, *, has_run: bool) -> None:
        """A sequence has ended: its owner is charged what it has taken, not what was expected."""
        self._shares.settle(sequence, has_run=has_run)


class SharedPrompts:
    """Finds, among sequences at the front of the queue, those that can share a prefill."""

    def __init__(self, sequences: Many[Sequence]) -> None:
        self._sequences = sequences
        self._by_prompt: defaultdict[int, list[Sequence]] = defaultdict(list)  # when first asked

    def followers(self, leader: Sequence) -> list[Sequence]:
        """Those that still wait, by their place in the queue, without the leader itself."""
        if not self._by_prompt:
            for sequence in self._sequences:
                self._by_prompt[sequence.prompt_hash].append(sequence)
        return [
            sequence
            for sequence in self._by_prompt[leader.prompt_hash]
            if sequence is not leader
            and sequence.status is Status.WAITING
            and sequence.num_in_flight == 0
            and sequence.can_share_prefill(leader)
        ]
