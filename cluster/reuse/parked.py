"""Host memory: which preempted sequences and conversations lie there, and what is free. Integers.

A sequence that has to make room leaves its slot with all that is remembered of it, as a parked id,
if the host's memory has room on every worker; when its turn comes again its rows are put back as
they were. Else, and where its copy is lost, it is computed again. What conversations keep moves
there from its pages where these are short.

Shapes: W workers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.workers.plan import StepResult

Ints = NDArray[np.int64]

_IDS = itertools.count(1)


def next_parked_id() -> int:
    """A number that nothing else of this process is parked under."""
    return next(_IDS)


@dataclass(slots=True)
class Counts:
    """What has come of parked sequences since the start.

    `copied_bytes` are those of all workers, to the host and back, conversations' too.
    """

    parked: int = 0
    resumed: int = 0
    dropped: int = 0
    copied_bytes: int = 0


class Prices:
    """What copies and prefill have cost so far, as workers report it; decides which is cheaper.

    Seconds are of all workers together. Tokens that would be replayed count as prefilled ones,
    which is the least that they cost. As long as one of the two was not measured, copies are
    taken to be cheaper; each time that they are not, half of what is known of them is forgotten, so
    that they are tried again if they were slow for another reason.
    """

    def __init__(self) -> None:
        self._copied_bytes = self._copy_seconds = 0.0
        self._layer_tokens = self._prefill_seconds = 0.0

    def note(
        self, copied_bytes: int, copy_seconds: float, layer_tokens: int, prefill_seconds: float
    ) -> None:
        """What a step has copied and prefilled, and what time that took."""
        self._copied_bytes += copied_bytes
        self._copy_seconds += copy_seconds
        if layer_tokens:
            self._layer_tokens += layer_tokens
            self._prefill_seconds += prefill_seconds

    def copy_pays(self, num_bytes: int, layer_tokens: int) -> bool:
        """Whether it is cheaper to copy so many bytes, there and back, than to prefill again."""
        if not (self._copied_bytes and self._layer_tokens):
            return True
        copy = 2 * num_bytes * self._copy_seconds / self._copied_bytes
        again = layer_tokens * self._prefill_seconds / self._layer_tokens
        if copy > again:
            self._copied_bytes, self._copy_seconds = self._copied_bytes / 2, self._copy_seconds / 4
        return copy <= again


class HostMemory:
    """The host's memory for parked sequences and conversations, on all workers of a replica.

    Plans drop first of all, so what is given up is free at once. Who resumes leaves after others
    have come: what that frees counts only once the plan that says so is complete.

    Args:
        bytes_W: that each worker has for them, int64 [W]; 0: nothing is parked.
        counts: goes on where workers have been replaced.

    Attributes:
        counts: see `Counts`.
        prices: of copies and prefill.
    """

    def __init__(self, bytes_W: Ints, counts: Counts) -> None:
        self.counts = counts
        self.prices = Prices()
        self._noted_bytes = counts.copied_bytes
        self._all_W = bytes_W
        self._free_W = bytes_W.copy()
        self._held: dict[int, Ints] = {}
        self._quiet: dict[int, Ints] = {}
        self._copied: dict[int, int] = {}  # bytes, of those that came by the plan in the making
        self._returned_W = np.zeros_like(bytes_W)
        self._dropped: list[int] = []

    @property
    def num_parked(self) -> int:
        """Sequences that are parked here."""
        return len(self._held)

    @property
    def used_bytes(self) -> int:
        """Bytes that they take, on all workers."""
        return int(sum(bytes_W.sum() for bytes_W in self._held.values()))

    @property
    def num_quiet(self) -> int:
        """Conversations that wait here for their next turn."""
        return len(self._quiet)

    @property
    def quiet_bytes(self) -> int:
        """Bytes that conversations take, on all workers."""
        return int(sum(bytes_W.sum() for bytes_W in self._quiet.values()))

    @property
    def free_bytes(self) -> Ints:
        """Bytes that nothing takes, int64 [W]."""
        return self._free_W.copy()

    def __contains__(self, parked_id: int) -> bool:
        return parked_id in self._held or parked_id in self._quiet

    @property
    def has_dropped(self) -> bool:
        """Whether the workers have yet to be told of sequences that were dropped."""
        return bool(self._dropped)

    def is_worth(self, bytes_W: Ints, layer_tokens: int) -> bool:
        """Whether so much, int64 [W], could lie here, and whether that is cheaper than prefill.

        Args:
            bytes_W: that it takes, at most.
            layer_tokens: tokens that all workers' layers would compute again.
        """
        is_small = bool((bytes_W <= self._all_W).all())
        return is_small and self.prices.copy_pays(int(bytes_W.sum()), layer_tokens)

    def put(self, bytes_W: Ints) -> int | None:
        """Set memory aside for a sequence, int64 [W]; its parked id; None: there is too little."""
        if (bytes_W > self._free_W).any():
            return None
        parked_id = next_parked_id()
        self._held[parked_id] = bytes_W
        self._free_W -= bytes_W
        return parked_id

    def begin(self, parked_id: int) -> None:
        """The plan in the making parks it."""
        self.counts.parked += 1
        self._copy(parked_id, self._held[parked_id])

    def offload(self, parked_id: int, bytes_W: Ints) -> None:
        """The plan in the making moves a conversation here, for which there is room."""
        assert (bytes_W <= self._free_W).all(), "the host's memory is promised twice"
        self._quiet[parked_id] = bytes_W
        self._free_W -= bytes_W
        self._copy(parked_id, bytes_W)

    def bring_back(self, parked_id: int) -> None:
        """The plan in the making lets a conversation go on."""
        bytes_W = self._quiet.pop(parked_id)
        self._returned_W += bytes_W
        self.counts.copied_bytes += int(bytes_W.sum())

    def cancel(self, parked_id: int) -> None:
        """It is not parked after all; no plan has said so."""
        self._free_W += self._held.pop(parked_id)

    def resume(self, parked_id: int) -> None:
        """The plan in the making lets it go on."""
        bytes_W = self._held.pop(parked_id)
        self._returned_W += bytes_W
        self.counts.resumed += 1
        self.counts.copied_bytes += int(bytes_W.sum())

    def drop(self, parked_id: int) -> None:
        """Give a parked sequence up."""
        self._free_W += self._held.pop(parked_id)
        self._forget_copy(parked_id)
        self._dropped.append(parked_id)
        self.counts.dropped += 1

    def drop_quiet(self, parked_id: int) -> None:
        """Give up a conversation; whoever does so has workers drop it."""
        self._free_W += self._quiet.pop(parked_id)
        self._forget_copy(parked_id)

    def forget(self, parked_id: int) -> None:
        """Have workers forget a sequence that could not be put back into pages everywhere."""
        self._dropped.append(parked_id)

    def note(self, results: Sequence[StepResult], copied_bytes: int) -> None:
        """Take in what a step, which copied so many bytes, took on all workers."""
        seconds = [result.seconds for result in results]
        self.prices.note(
            copied_bytes,
            sum(s.get("park", 0.0) + s.get("resume", 0.0) for s in seconds),
            sum(result.prefill_layer_tokens for result in results),
            sum(s.get("prefill", 0.0) for s in seconds),
        )

    def take_copied(self) -> int:
        """Bytes that the plan in the making copies."""
        copied = self.counts.copied_bytes - self._noted_bytes
        self._noted_bytes = self.counts.copied_bytes
        return copied

    def take_dropped(self) -> list[int]:
        """Parked ids for the plan in the making to drop."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def settle(self) -> None:
        """The plan in the making is complete: what it gives up is free for the next."""
        self._free_W += self._returned_W
        self._returned_W[:] = 0
        self._copied.clear()
        assert (self._free_W <= self._all_W).all(), "given back twice"

    def _copy(self, parked_id: int, bytes_W: Ints) -> None:
        self._copied[parked_id] = int(bytes_W.sum())
        self.counts.copied_bytes += self._copied[parked_id]

    def _forget_copy(self, parked_id: int) -> None:
        """It is given up by the plan that would have brought it here."""
        self.counts.copied_bytes -= self._copied.pop(parked_id, 0)
