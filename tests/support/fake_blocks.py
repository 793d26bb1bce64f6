"""The books of cached prefixes on a replica without a model: what real workers would trip over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from saqqara.workers.plan import NewSequence, StepPlan, WorkerInfo

if TYPE_CHECKING:
    from .fake_replica import FakeSlot


@dataclass
class FakeBlock:
    """A block: the tokens from the prompt's start to its end, and the step that filled it.

    Above the layer `cut` it has no keys and values.
    """

    tokens: tuple[int, ...]
    cut: int | None = None
    filled_at: int | None = None
    on: set[int] = field(default_factory=set)  # ranks that hold it


class FakeBlocks:
    """The blocks of all workers; asserts that plans use only what is filled and still there."""

    def __init__(self, workers: Sequence[WorkerInfo]) -> None:
        self._page_tokens = workers[0].page_tokens
        self._num_layers = workers[-1].stop_layer
        self._rows = [
            (w.stop_layer - w.start_layer) * (w.stop_head - w.start_head) for w in workers
        ]
        self._blocks: dict[int, FakeBlock] = {}
        self.num_hits = 0  # blocks, of leaders

    def __len__(self) -> int:
        return len(self._blocks)

    def pages(self, rank: int) -> int:
        """Pages that blocks take on a worker."""
        return sum(rank in block.on for block in self._blocks.values()) * self._rows[rank]

    def evict(self, plan: StepPlan, slots: "Mapping[int, FakeSlot]", num_layers: int) -> None:
        """Give up what a plan evicts; nobody who is there may still need it."""
        gone = set(plan.evict)
        assert len(gone) == len(plan.evict)
        for held in slots.values():
            assert not gone & {*held.blocks}, "rows hold its pages"
            prefix = held.new.prefix
            if prefix is None:
                continue
            in_prefill = held.prefilled_layers < num_layers
            assert not (in_prefill and gone & {*prefix.cached, *prefix.stored}), "still filling"
        for block in plan.evict:
            del self._blocks[block]

    def take(self, new: NewSequence, leader: NewSequence, pages_free: Sequence[int]) -> list[int]:
        """Begin with what a new sequence has of blocks; returns the ranks that refuse it."""
        prefix, size = new.prefix, self._page_tokens
        if prefix is None:
            return []
        tokens = tuple(new.tokens()[: new.prompt_tokens].tolist())
        propagate = new.retention.propagate
        cut = None
        if propagate is not None:
            cut = propagate.first_cut(new.prompt_tokens, self._num_layers)
        for place, block in enumerate(prefix.cached):
            held = self._blocks[block]
            assert held.tokens == tokens[: size * (place + 1)], "a block of another prompt"
            assert held.cut == cut, "a block of another cut"
            assert held.filled_at is not None, "a block that is not filled is used"
            assert len(held.on) == len(self._rows), "a worker lacks a block"
        least = max(1, new.retention.num_window_queries(new.prompt_tokens))
        if propagate is not None:
            least = max(least, propagate.recent_tokens(new.prompt_tokens))
        assert size * len(prefix.cached) <= new.prompt_tokens - least, "too little is computed"
        if new is not leader:
            assert not prefix.stored, "a follower stores nothing"
            assert leader.prefix is not None
            assert leader.prefix.cached == prefix.cached, "a family has one hit"
            return []
        self.num_hits += len(prefix.cached)
        refusing = []
        for rank, rows in enumerate(self._rows):
            if len(prefix.stored) * rows > pages_free[rank]:
                refusing.append(rank)
        for place, block in enumerate(prefix.stored, start=len(prefix.cached)):
            assert size * (place + 1) <= new.prompt_tokens, "a block of no full page"
            on = {*range(len(self._rows))} - {*refusing}
            self._blocks[block] = FakeBlock(tokens[: size * (place + 1)], cut, on=on)
        return refusing

    def fill(self, new: NewSequence, step: int) -> None:
        """A prefill is through all layers."""
        for block in new.prefix.stored if new.prefix else ():
            self._blocks[block].filled_at = step
