"""The books of sequences out of their slots, on a replica without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from saqqara.workers.plan import NewSequence, StepPlan

if TYPE_CHECKING:
    from .fake_replica import FakeReplica, FakeSlot, FakeWorker

Rows = dict[tuple[int, int], int]


@dataclass
class FakeParked:
    """A sequence: what was known of its slot, and its rows and their shared pages on each rank."""

    held: "FakeSlot"
    on_host: bool
    rows: dict[int, Rows] = field(default_factory=dict)
    shared: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Those that were fed."""
        return self.held.tokens[: self.held.fed]


class FakeParkedSequences:
    """What is parked on all workers; asserts that plans name what is there."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._parked: dict[int, FakeParked] = {}
        self.num_resumed = 0  # with part of a prompt to come
        self.num_back = 0  # that go on decoding
        self.num_from_host = 0  # of those with part of a prompt to come

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def slots(self) -> "dict[int, FakeSlot]":
        """What was known of the slots of all, by numbers that no slot has."""
        return {-n: parked.held for n, parked in self._parked.items()}

    def pages(self, rank: int, *, on_host: bool = False) -> int:
        """Pages that they hold on a worker, or take of its host, but for those of blocks."""
        return sum(
            -(-length // self._page_tokens) - parked.shared.get(rank, {}).get(row[0], 0)
            for parked in self._parked.values()
            if parked.on_host == on_host
            for row, length in parked.rows.get(rank, {}).items()
        )

    def park(self, plan: StepPlan, replica: "FakeReplica") -> None:
        """Take over the rows of the slots that a plan parks; their slots are freed, too."""
        for parking in plan.park:
            assert parking.slot in plan.free, "a parked sequence keeps no slot"
            assert parking.parked_id not in self._parked
            held: FakeSlot = replica.slots[parking.slot]
            assert held.prefilled_layers == replica.num_layers
            parked = FakeParked(held, parking.to_host)
            for worker in replica.fakes:
                if parking.slot not in worker.refused:
                    parked.rows[worker.info.rank] = worker.rows.pop(parking.slot)
                    parked.shared[worker.info.rank] = worker.shared.pop(parking.slot, {})
            self._parked[parking.parked_id] = parked

    def drop(self, plan: StepPlan) -> None:
        """Forget what a plan drops; a worker passes over what it does not have."""
        for parked_id in plan.drop:
            self._parked.pop(parked_id, None)

    def offload(self, plan: StepPlan) -> None:
        """Move what a plan says from pages to the host."""
        for parked_id in plan.offload:
            assert not self._parked[parked_id].on_host, "it lies there"
            self._parked[parked_id].on_host = True

    def lose(self, rank: int) -> None:
        """A worker's host had no memory for any of them."""
        for parked in self._parked.values():
            parked.rows.pop(rank, None)

    def resume(self, new: NewSequence, workers: "Sequence[FakeWorker]") -> tuple[int, ...]:
        """Give a new sequence the rows that it resumes, cut where fewer tokens are fed.

        Ranks without room for all that comes from their host refuse it, and keep it.

        Returns:
            the blocks whose pages its rows hold.
        """
        assert new.resumes is not None
        parked, tokens = self._parked[new.resumes], new.tokens().tolist()
        num = new.resumed_tokens
        assert new.prefix is None
        assert new.shares_prefill_with is None
        assert 0 < num <= len(parked.tokens)
        assert parked.tokens[:num] == tokens[:num], "other tokens were fed"
        self.num_resumed += 1
        self.num_from_host += parked.on_host
        for worker in workers:
            rank = worker.info.rank
            if rank not in parked.rows:  # it refused the slot that these were to come from
                worker.give_up(new.slot)
                continue
            rows = parked.rows[rank]
            worker.shared[new.slot] = parked.shared[rank]
            if parked.on_host:
                worker.try_add(new.slot, rows)
            else:
                del parked.rows[rank]
                worker.rows[new.slot] = rows
            if new.slot in worker.refused:
                continue
            parked.rows.pop(rank, None)
            if num < len(parked.tokens):
                assert {*rows.values()} == {len(parked.tokens)}, "rows that lack tokens are cut"
                rows = dict.fromkeys(rows, num)
            worker.rows[new.slot] = rows
        if not parked.rows:
            del self._parked[new.resumes]
        return parked.held.blocks

    def put_back(self, new: NewSequence, workers: "Sequence[FakeWorker]") -> "FakeSlot":
        """Let a sequence go on decoding as it was; ranks without room refuse it and keep it."""
        assert new.resumes is not None
        parked, tokens = self._parked[new.resumes], new.tokens().tolist()
        held = parked.held
        assert (new.retention, new.score) == (held.new.retention, held.new.score)
        assert new.prompt_tokens == held.new.prompt_tokens
        assert new.prefix is None
        assert tokens == held.tokens, "it goes on with other tokens"
        assert new.resumed_tokens == held.fed < len(tokens), "its last token is not fed yet"
        self.num_back += 1
        for worker in workers:
            rank = worker.info.rank
            if rank not in parked.rows:  # the host had no memory for it
                worker.give_up(new.slot)
                continue
            worker.shared[new.slot] = parked.shared[rank]
            worker.try_add(new.slot, parked.rows[rank])
            if new.slot not in worker.refused:
                del parked.rows[rank]
        if not parked.rows:
            del self._parked[new.resumes]
        return replace(held, new=replace(new, prefix=held.new.prefix), tokens=tokens, group=())

    def check(self, workers: "Sequence[FakeWorker]") -> None:
        """No worker takes more of the host's memory than it may."""
        for worker in workers:
            pages = self.pages(worker.info.rank, on_host=True)
            assert pages * worker.info.page_bytes <= worker.info.host_kv_bytes
