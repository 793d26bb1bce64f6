"""What the ranks of a simulated replica hold and report: numbers of tokens and pages, no tensors.

They keep every row as it is expected: of heads that divide a layer's tokens among themselves, each
has its even part. Pages are counted here on their own, so the ledger's check after each step, that
the ranks hold what it says, is one.

Shapes: S slots, L layers, H kv heads of the model, W ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.scheduling.demand import (
    Demand,
    SlotPageCounts,
    demand_of,
    global_layers,
    rows_per_worker,
)
from saqqara.cluster.scheduling.pages import SlotPages
from saqqara.compression.retention import Retention
from saqqara.workers.plan import (
    KeptCounts,
    NewSequence,
    PrefillGroup,
    SampledToken,
    StepPlan,
    StepResult,
    WorkerInfo,
    layers_of,
)

Ints = NDArray[np.int64]
NextToken = Callable[[int], int]
_REMEMBERED = 16384


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    """What is kept of a prompt.

    Attributes:
        demand: as the ledger expects it.
        counts: kept tokens of each rank's rows, int32 [L, H] of its own; `counts_bytes` those.
        pages_LW: of the layers below each, int64 [L + 1, W].
    """

    demand: Demand
    counts: tuple[NDArray[np.int32], ...]
    counts_bytes: tuple[bytes, ...]
    pages_LW: Ints


@dataclass(frozen=True, slots=True, eq=False)
class _Parked:
    """A sequence in the host's memory: as its slot was told of it, and its pages."""

    new: NewSequence
    books: SlotPageCounts
    held_W: Ints


class Ranks:
    """All ranks of a replica; plans must come in order, and are carried out at once.

    Args:
        workers: the ranks.
        max_num_seqs: slots.
        next_token: of the sequence in a slot.
    """

    def __init__(
        self, workers: Sequence[WorkerInfo], max_num_seqs: int, next_token: NextToken
    ) -> None:
        self._workers = tuple(workers)
        self._max_num_seqs = max_num_seqs
        self._next_token = next_token
        self._num_layers = max(w.stop_layer for w in workers)
        self._num_heads = max(w.stop_head for w in workers)
        self._page_tokens = workers[0].page_tokens
        self._num_pages = np.array([w.num_pages for w in workers], dtype=np.int64)
        self._rows_W = rows_per_worker(workers)
        self._global_LW = self._global_rows()
        self._samplers = [w.stop_layer == self._num_layers and w.tensor_rank == 0 for w in workers]
        self._prompt = lru_cache(maxsize=_REMEMBERED)(self._prompt_of)
        self.start()

    def start(self) -> None:
        """Begin with nothing."""
        self._books = SlotPages(self._max_num_seqs, self._workers)
        self._held_W: Ints = np.zeros(len(self._workers), dtype=np.int64)
        self._held_SW: Ints = np.zeros((self._max_num_seqs, len(self._workers)), dtype=np.int64)
        self._new: dict[int, NewSequence] = {}
        self._layers: dict[int, int] = {}  # prefilled so far, by slot
        self._parked: dict[int, _Parked] = {}
        self._blocks: set[int] = set()

    def execute(self, plan: StepPlan) -> list[StepResult]:
        """What each rank reports of a plan."""
        for parked_id in plan.drop:
            del self._parked[parked_id]
        for parking in plan.park:
            self._parked[parking.parked_id] = self._copy_of(parking.slot)
        for slot in plan.free:
            self._free(slot)
        self._blocks.difference_update(plan.evict)
        for new in plan.new:
            self._new[new.slot], self._layers[new.slot] = new, 0
            if new.resumes is not None:
                self._resume(new.slot, new.resumes)
            if new.prefix is not None:
                self._blocks.update(new.prefix.stored)
        sampled = [token for group in plan.prefill for token in self._prefill(group)]
        self._feed(plan)
        sampled += [
            SampledToken(item.slot, item.position + item.num_tokens, self._next_token(item.slot))
            for item in plan.decode
            if item.sample
        ]
        free_W = (self._num_pages - self._held_W - len(self._blocks) * self._rows_W).tolist()
        assert min(free_W) >= 0, f"pages were promised twice: {free_W} free"
        return [
            StepResult(
                step=plan.step,
                rank=worker.rank,
                sampled=tuple(sampled) if samples else (),
                kept=self._kept(worker, plan.prefill),
                pages_free=free,
            )
            for worker, samples, free in zip(self._workers, self._samplers, free_W, strict=True)
        ]

    def _copy_of(self, slot: int) -> _Parked:
        return _Parked(self._new[slot], self._books.copy_of(slot), self._held_SW[slot].copy())

    def _resume(self, slot: int, parked_id: int) -> None:
        """Put a sequence that was parked in the host's memory into a slot."""
        parked = self._parked.pop(parked_id)
        self._new[slot] = replace(self._new[slot], prefix=parked.new.prefix)
        self._books.restore(slot, parked.books)
        self._held_SW[slot] = parked.held_W
        self._held_W += parked.held_W
        self._layers[slot] = self._num_layers

    def _free(self, slot: int) -> None:
        new, layers = self._new.pop(slot), self._layers.pop(slot)
        if layers == self._num_layers:
            self._held_W -= self._held_SW[slot]
            self._books.close(slot)
        else:
            self._held_W -= self._pages_of(new)[layers]

    def _prefill(self, group: PrefillGroup) -> list[SampledToken]:
        """Write a range of layers; the first tokens of those that are through and have none."""
        first: list[SampledToken] = []
        for slot in group.slots:
            new = self._new[slot]
            kept, pages_LW = self._kept_of(new), self._pages_of(new)
            self._held_W += pages_LW[group.stop_layer] - pages_LW[group.start_layer]
            self._layers[slot] = group.stop_layer
            if group.stop_layer < self._num_layers:
                continue
            self._books.open(slot, kept.demand, 0)
            for rank, counts in enumerate(kept.counts):
                self._books.set_kept(slot, rank, counts)
            self._held_SW[slot] = pages_LW[-1]
            if len(new.token_ids) == 4 * new.prompt_tokens:
                first.append(SampledToken(slot, new.prompt_tokens, self._next_token(slot)))
        return first

    def _feed(self, plan: StepPlan) -> None:
        if not plan.decode:
            return
        slots = np.array([item.slot for item in plan.decode], dtype=np.int64)
        num_tokens = np.array([item.num_tokens for item in plan.decode], dtype=np.int64)
        self._books.feed(slots, num_tokens)
        held_NW = self._books.held(slots)
        for place, item in enumerate(plan.decode):
            held_NW[place] -= self._shared_of(self._new[item.slot])[-1]
        self._held_W += (held_NW - self._held_SW[slots]).sum(axis=0)
        self._held_SW[slots] = held_NW

    def _kept(self, worker: WorkerInfo, groups: Sequence[PrefillGroup]) -> tuple[KeptCounts, ...]:
        return tuple(
            KeptCounts(slot, self._kept_of(self._new[slot]).counts_bytes[worker.rank])
            for group in groups
            if group.start_layer < worker.stop_layer <= group.stop_layer
            for slot in group.slots
        )

    def _kept_of(self, new: NewSequence) -> _Prompt:
        return self._prompt(new.retention, new.prompt_tokens)

    def _pages_of(self, new: NewSequence) -> Ints:
        """Pages of its own that a prompt has in the layers below each, int64 [L + 1, W]."""
        own: Ints = self._kept_of(new).pages_LW - self._shared_of(new)
        return own

    def _shared_of(self, new: NewSequence) -> Ints:
        """Those that are pages of blocks, in the layers below each, int64 [L + 1, W]."""
        prefix = new.prefix
        shares = prefix is not None and prefix.is_shared
        return self._global_LW * (len(prefix.cached) if prefix is not None and shares else 0)

    def _global_rows(self) -> Ints:
        """Rows that see all tokens in the layers below each, int64 [L + 1, W]."""
        rows_LW = np.zeros((self._num_layers + 1, len(self._workers)), dtype=np.int64)
        for worker, sees_all in zip(self._workers, global_layers(self._workers), strict=True):
            layers = slice(worker.start_layer + 1, worker.stop_layer + 1)
            rows_LW[layers, worker.rank] = sees_all * (worker.stop_head - worker.start_head)
        return np.cumsum(rows_LW, axis=0)

    def _prompt_of(self, retention: Retention, prompt_tokens: int) -> _Prompt:
        rows = retention.row_tokens(prompt_tokens, layers_of(self._workers), self._num_heads)
        counts = tuple(
            np.ascontiguousarray(
                rows[w.start_layer : w.stop_layer, w.start_head : w.stop_head], dtype=np.int32
            )
            for w in self._workers
        )
        pages_LW = np.zeros((self._num_layers + 1, len(self._workers)), dtype=np.int64)
        for worker, mine in zip(self._workers, counts, strict=True):
            layers = slice(worker.start_layer + 1, worker.stop_layer + 1)
            pages_LW[layers, worker.rank] = (-(-mine // self._page_tokens)).sum(axis=1)
        demand = demand_of(retention, prompt_tokens, self._workers)
        return _Prompt(
            demand, counts, tuple(mine.tobytes() for mine in counts), np.cumsum(pages_LW, axis=0)
        )
