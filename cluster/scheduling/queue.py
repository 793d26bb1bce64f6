"""The queue of sequences without a slot."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Many

from .sequence import Sequence, Status


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.key


class WaitingQueue:
    """Waiting sequences by priority, then arrival.

    A preempted sequence arrived before any of its priority that never ran, so it comes to the front
    by the same rule.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence | None:
        """The sequence whose turn it is."""
        return self._sequences[0] if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        """Put a sequence where its priority and arrival say."""
        insort(self._sequences, sequence, key=_key)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        place = bisect_left(self._sequences, sequence.key, key=_key)
        assert self._sequences[place] is sequence, "the sequence is not waiting"
        del self._sequences[place]


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
