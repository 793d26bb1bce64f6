"""Slots: who holds which, what it is charged for, and when it is free again."""

import heapq
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many

import numpy as np

from saqqara.workers.plan import StepResult, WorkerInfo

from .demand import Demand, Ints, OutputLengths
from .ledger import Ledger
from .sequence import Sequence

WATERMARK = 100  # a newcomer leaves one page in this many free, unless it is alone


class Seats:
    """The slots of a replica, with the ledger of what their holders take up.

    A slot that is vacated stays charged until `release` puts it into a plan: workers free slots at
    the start of a step, so from then on slot and pages can be given away.
    """

    def __init__(self, workers: Many[WorkerInfo], num_slots: int, lengths: OutputLengths) -> None:
        self._lengths = lengths
        self.ledger = Ledger(workers, num_slots)
        self._holders: dict[int, Sequence] = {}
        self._vacated: list[int] = []
        self._free = list(range(num_slots))

    @property
    def num_seated(self) -> int:
        """Sequences that have a slot."""
        return len(self._holders) - len(self._vacated)

    @property
    def is_empty(self) -> bool:
        """Whether every slot is free, on the workers, too."""
        return not self._holders

    @property
    def holders(self) -> Iterable[Sequence]:
        """Sequences that hold a slot or held one that is not released yet."""
        return self._holders.values()

    def has_room(self, sequence: Sequence) -> bool:
        """Whether there is a slot, and on every worker the pages expected, and some to spare.

        They are those of the prompt, and for those who are seated with it, what all of them are
        expected to grow by until one after the other has ended.
        """
        if not self._free:
            return False
        ledger = self.ledger
        need = self.need(sequence, sequence.num_replay)
        if ledger.num_held == 0:
            spare = np.zeros_like(need)
        elif sequence.num_preemptions == 0:
            spare = ledger.num_pages // WATERMARK
        else:
            # Once more for nothing would cost a prefill: let all grow by a page per row first.
            spare = (ledger.num_held + 1) * ledger.rows_per_worker + sequence.num_refusals * need
        fits = bool((need + spare <= ledger.free).all())
        return fits and (ledger.num_held == 0 or self._fits_later(sequence))

    def _fits_later(self, sequence: Sequence) -> bool:
        """Whether a newcomer and those who are seated are expected to fit until they have ended."""
        seated = [holder for holder in self._holders.values() if holder.slot is not None]
        slots = np.array([holder.slot for holder in seated], dtype=np.int64)
        expected = self._expected_tokens([*seated, sequence])
        left = np.maximum(expected[:-1] - self.ledger.fed_tokens(slots), 0)
        demand = self._demand(sequence)
        peak = self.ledger.peak_ahead(slots, left, demand, int(expected[-1]))
        return bool((peak <= self.ledger.num_pages).all())

    def _expected_tokens(self, sequences: Many[Sequence]) -> Ints:
        """Tokens that will have been fed to each after its prompt when it ends, int64 [N]."""
        known = np.array([sequence.num_replay for sequence in sequences], dtype=np.int64)
        most = np.array([sequence.max_output_tokens for sequence in sequences], dtype=np.int64)
        scores = np.array([sequence.is_score for sequence in sequences], dtype=np.bool_)
        # Nothing follows the last token, so it is not fed.
        return np.where(scores, known, self._lengths.expected(known, most) - 1)

    def take(self, sequence: Sequence) -> None:
        """Give a sequence a slot and charge what it is expected to need."""
        slot = heapq.heappop(self._free)
        demand = self._demand(sequence)
        self.ledger.admit(slot, demand, sequence.prompt_tokens, sequence.num_replay)
        self._holders[slot] = sequence
        sequence.slot = slot

    def vacate(self, sequence: Sequence) -> None:
        """Take a sequence's slot away; the next plan frees it."""
        assert sequence.slot is not None
        self._vacated.append(sequence.slot)
        sequence.slot = None

    def release(self) -> list[int]:
        """Slots for the plan in the making to free; they and their pages can be used at once."""
        for slot in self._vacated:
            self.ledger.release(slot)
            del self._holders[slot]
            heapq.heappush(self._free, slot)
        released, self._vacated = self._vacated, []
        return released

    def note(
        self, sequences: Mapping[int, Sequence], results: Many[StepResult]
    ) -> tuple[list[int], list[Sequence]]:
        """Bring the ledger up to date with a step that worked on `sequences`, by slot.

        Returns:
            slots that some worker refused, and sequences all of whose rows are known now.
        """
        refused: dict[int, None] = {}
        known: list[Sequence] = []
        for result in results:
            for slot in result.refused:
                refused[slot] = None
                if self._holders.get(slot) is sequences[slot]:
                    self.ledger.set_refused(slot, result.rank)
            for kept in result.kept:
                sequence = sequences[kept.slot]
                if self._holders.get(kept.slot) is not sequence:
                    continue  # freed by a plan that is still in flight
                self.ledger.set_kept(kept.slot, result.rank, kept.counts)
                if sequence.slot is not None and self.ledger.is_exact(kept.slot):
                    known.append(sequence)
        return list(refused), known

    def need(self, sequence: Sequence, fed_tokens: int) -> Ints:
        """Pages, int64 [W], that a sequence is expected to need once so much is fed to it."""
        return self._demand(sequence).most(fed_tokens)

    def too_large(self, need: Ints) -> str:
        """The error of a sequence that needs more than the whole pool."""
        rank = int(np.argmax(need - self.ledger.num_pages))
        return (
            f"the KV cache of this sequence alone does not fit: worker {rank} has "
            f"{self.ledger.num_pages[rank]} pages, about {need[rank]} are needed; raise "
            "kv_memory_gib, or lower budget or the length"
        )

    def _demand(self, sequence: Sequence) -> Demand:
        return self.ledger.demand(sequence.request.retention, sequence.prompt_tokens)
