"""The books of parked sequences on a replica without a model: what real workers would trip over."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from saqqara.workers.plan import NewSequence, Parking, StepPlan

if TYPE_CHECKING:
    from .fake_replica import FakeSlot, FakeWorker

Rows = dict[tuple[int, int], int]


@dataclass
class FakeParked:
    """Sequences in the host's memory of all workers.

    Attributes:
        slots: what is known of them, by parked id.
        rows: of each, with its pages of blocks by layer, by rank; none of ranks that refused it.
        num_resumed: sequences that came back.
    """

    slots: "dict[int, FakeSlot]" = field(default_factory=dict)
    rows: dict[int, dict[int, tuple[Rows, dict[int, int]]]] = field(default_factory=dict)
    num_resumed: int = 0

    def park(
        self,
        parking: Parking,
        slots: "Mapping[int, FakeSlot]",
        workers: "list[FakeWorker]",
        num_layers: int,
    ) -> None:
        """Take a sequence out of its slot, which the same plan frees."""
        held = slots[parking.slot]
        assert parking.to_host
        assert parking.parked_id not in self.slots, "an id is used twice"
        assert held.prefilled_layers == num_layers, "its prefill has not ended"
        self.slots[parking.parked_id] = held
        self.rows[parking.parked_id] = {
            worker.info.rank: (
                worker.rows.pop(parking.slot),
                worker.shared.pop(parking.slot, {}),
            )
            for worker in workers
            if parking.slot not in worker.refused
        }

    def drop(self, plan: StepPlan) -> None:
        """Forget what the plan says; of what was resumed, only what some ranks still have."""
        for parked_id in plan.drop:
            self.slots.pop(parked_id, None)
            self.rows.pop(parked_id, None)

    def resume(self, new: NewSequence, workers: "list[FakeWorker]") -> "FakeSlot":
        """Put a sequence into a slot as it was; ranks without room refuse it, and keep theirs."""
        parked_id = new.resumes
        assert parked_id is not None
        held, tokens = self.slots.pop(parked_id), new.tokens().tolist()
        assert new.retention == held.new.retention
        assert new.prompt_tokens == held.new.prompt_tokens
        assert tokens == held.tokens, "it resumes with other tokens"
        assert new.resumed_tokens == held.fed < len(tokens), "all but the last tokens were fed"
        for worker in workers:
            rows, shared = self.rows[parked_id][worker.info.rank]
            worker.shared[new.slot] = shared
            worker.try_add(new.slot, rows)
            if new.slot not in worker.refused:
                del self.rows[parked_id][worker.info.rank]
        self.num_resumed += 1
        return replace(held, new=replace(new, prefix=held.new.prefix), tokens=tokens, group=())

    def check(self, workers: "list[FakeWorker]") -> None:
        """No worker has more on the host than it may have."""
        for worker in workers:
            size, pages = worker.info.page_tokens, 0
            for by_rank in self.rows.values():
                rows, shared = by_rank.get(worker.info.rank, ({}, {}))
                pages += sum(-(-n // size) - shared.get(row[0], 0) for row, n in rows.items())
            assert pages * worker.info.page_bytes <= worker.info.host_kv_bytes
