"""The queue of sequences without a slot."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from .request import Sequence


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
