"""The books of sequences out of their slots, on a replica without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from saqqara.workers.plan import NewSequence, StepPlan

if TYPE_CHECKING:
    from .fake_replica import FakeReplica, FakeSlot, FakeWorker

Rows = dict[tuple[int, int], int]


@dataclass
class FakeParked:
    """A sequence: the tokens that were fed, and its rows and their shared pages on each rank."""

    tokens: list[int]
    on_host: bool
    rows: dict[int, Rows] = field(default_factory=dict)
    shared: dict[int, dict[int, int]] = field(default_factory=dict)


class FakeParkedSequences:
    """What is parked on all workers; asserts that plans name what is there."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._parked: dict[int, FakeParked] = {}
        self.num_resumed = 0

    def __len__(self) -> int:
        return len(self._parked)

    def pages(self, rank: int) -> int:
        """Pages that they hold on a worker, but for those of blocks."""
        return sum(
            -(-length // self._page_tokens) - parked.shared.get(rank, {}).get(row[0], 0)
            for parked in self._parked.values()
            if not parked.on_host
            for row, length in parked.rows.get(rank, {}).items()
        )

    def park(self, plan: StepPlan, replica: "FakeReplica") -> None:
        """Take over the rows of the slots that a plan parks; their slots are freed, too."""
        for parking in plan.park:
            assert parking.slot in plan.free, "a parked sequence keeps no slot"
            assert parking.parked_id not in self._parked
            held: FakeSlot = replica.slots[parking.slot]
            assert held.prefilled_layers == replica.num_layers
            parked = FakeParked(held.tokens[: held.fed], parking.to_host)
            for worker in replica.fakes:
                assert parking.slot not in worker.refused
                parked.rows[worker.info.rank] = worker.rows.pop(parking.slot)
                parked.shared[worker.info.rank] = worker.shared.pop(parking.slot, {})
            self._parked[parking.parked_id] = parked

    def drop(self, plan: StepPlan) -> None:
        """Forget what a plan drops; a worker passes over what it does not have."""
        for parked_id in plan.drop:
            self._parked.pop(parked_id, None)
        for parked_id in plan.offload:
            self._parked[parked_id].on_host = True

    def resume(self, new: NewSequence, workers: "Sequence[FakeWorker]") -> None:
        """Give a new sequence the rows that it resumes, cut where fewer tokens are fed."""
        if new.resumes is None:
            return
        parked, tokens = self._parked.pop(new.resumes), new.tokens().tolist()
        num = new.resumed_tokens
        assert new.prefix is None
        assert new.shares_prefill_with is None
        assert 0 < num <= len(parked.tokens)
        assert parked.tokens[:num] == tokens[:num], "other tokens were fed"
        self.num_resumed += 1
        for worker in workers:
            rows = parked.rows[worker.info.rank]
            if num < len(parked.tokens):
                assert {*rows.values()} == {len(parked.tokens)}, "rows that lack tokens are cut"
                rows = dict.fromkeys(rows, num)
            worker.rows[new.slot] = rows
            worker.shared[new.slot] = parked.shared[worker.info.rank]
