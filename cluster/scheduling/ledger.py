"""Pages promised on every worker, known without asking: integers only.

What a slot holds is counted in `pages.py`; the ledger says who is charged for it and what is left.
A step that compacts is charged what it holds at its peak, and `settle`, at the end of the plan,
gives back what the compaction returns. The ring of queries that a sequence may have
(`workers/state/rings.py`) and its sums of attention lie outside the pool: they are charged no
pages. The bytes of its ring are counted in `usage`.

Shapes: S slots, L layers, H kv heads of the model, W workers, N slots of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.outcome import KVUsage
from saqqara.compression.layers import Layers
from saqqara.compression.retention import Retention
from saqqara.workers.plan import WorkerInfo, layers_of

from .demand import Charge, Demand, Ints, demand_of, global_rows, rows_per_worker
from .pages import SlotPages

_MAX_DEMANDS = 4096


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the pages that prefilled sequences hold, and what full retention would hold.

    Both are of the layers that see all tokens; `local_bytes` are those of the pages that layers
    with a window hold, in any case. `ring_bytes` are those of the queries, and their normalisers,
    that all sequences remember.
    """

    kept_bytes: int
    full_bytes: int
    ring_bytes: int = 0
    local_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all pages."""
        return self.kept_bytes + self.local_bytes


@dataclass(frozen=True, slots=True)
class Pyramid:
    """What prefilled sequences keep in each layer, against their length.

    Attributes:
        num_sequences: sequences that the means are over.
        kept_L: mean tokens kept by layer, over sequences and kv heads, float64 [L].
        full_tokens: length of all of them together.
        layers: of the model.
    """

    num_sequences: int
    kept_L: NDArray[np.float64]
    full_tokens: int
    layers: Layers

    @property
    def mean_kept(self) -> float:
        """Mean tokens kept in a layer that sees all; 0 where none does."""
        kept = self.kept_L[list(self.layers.global_layers)]
        return float(kept.mean()) if len(kept) else 0.0


class Ledger:
    """Free pages of each worker, and what each slot holds there.

    A slot is charged its expected pages (and those of the tokens it must replay) from `admit` on,
    exact pages from `set_kept` on, and every append when it is planned. Plans run in order, so the
    charges at any moment between plans are what the workers will hold once the last plan has run.
    """

    def __init__(self, workers: Sequence[WorkerInfo], num_slots: int) -> None:
        assert workers, "a ledger needs at least one worker"
        assert [w.rank for w in workers] == list(range(len(workers))), "workers are not by rank"
        assert len({w.page_tokens for w in workers}) == 1, "workers disagree on page_tokens"
        self.workers = tuple(workers)
        self.page_tokens = workers[0].page_tokens
        self.layers = layers_of(workers)
        self.num_layers = len(self.layers)
        self.num_heads = max(w.stop_head for w in workers)
        num_workers = len(workers)
        self.num_pages = np.array([w.num_pages for w in workers], dtype=np.int64)
        self._page_bytes = np.array([w.page_bytes for w in workers], dtype=np.int64)
        self._rows_W, self._global_rows_W = rows_per_worker(workers), global_rows(workers)
        self._sees_all_L = np.array(self.layers.windows) == 0
        self.free = self.num_pages.copy()
        self._pages = SlotPages(num_slots, workers)
        self._kept_SLH = np.zeros((num_slots, self.num_layers, self.num_heads), dtype=np.int32)
        self._tokens_S = np.zeros(num_slots, dtype=np.int64)  # of the prompt, and fed since
        self._prompt_S = np.zeros(num_slots, dtype=np.int64)
        self._layers_S = np.zeros(num_slots, dtype=np.int64)  # prefilled so far
        self._held_S = np.zeros(num_slots, dtype=np.bool_)
        self._ragged_S = np.zeros(num_slots, dtype=np.bool_)
        self._exact_SW = np.zeros((num_slots, num_workers), dtype=np.bool_)
        self._refused_SW = np.zeros((num_slots, num_workers), dtype=np.bool_)
        self._ring_bytes_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._shared_S = np.zeros(num_slots, dtype=np.int64)  # pages of a global row, of blocks
        self._shared_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._by_slot: tuple[NDArray[Any], ...] = (
            *(self._kept_SLH, self._tokens_S, self._prompt_S, self._layers_S, self._ring_bytes_SW),
            *(self._held_S, self._ragged_S, self._exact_SW, self._refused_SW),
            *(self._shared_S, self._shared_SW),
        )
        self._returned_W = np.zeros(num_workers, dtype=np.int64)  # by compactions of this plan
        self._set_aside_W = np.zeros(num_workers, dtype=np.int64)  # held by no slot
        self._resumed: dict[int, NDArray[np.int32]] = {}  # rows [L, H] that slots began with
        self._demands: dict[tuple[Retention, int], Demand] = {}

    @property
    def num_held(self) -> int:
        """Slots that are charged for."""
        return int(np.count_nonzero(self._held_S))

    @property
    def rows_per_worker(self) -> Ints:
        """Rows that one sequence has on each worker, int64 [W]."""
        return self._rows_W

    def most_blocks(self, most_bytes: int | None) -> int:
        """Blocks of prefixes that fit in so many bytes on all workers; None: in half the pool."""
        if most_bytes is None:
            most_bytes = int(self.num_pages @ self._page_bytes) // 2
        return min(most_bytes // self.block_bytes, int((self.num_pages // self._rows_W).min()))

    @property
    def block_bytes(self) -> int:
        """Bytes that a block of a prefix takes on all workers."""
        return int(self._rows_W @ self._page_bytes)

    def demand(self, retention: Retention, prompt_tokens: int) -> Demand:
        """What a prompt of this length is expected to need under this retention."""
        key = (retention, prompt_tokens)
        if key not in self._demands:
            if len(self._demands) >= _MAX_DEMANDS:
                self._demands.clear()
            self._demands[key] = demand_of(retention, prompt_tokens, self.workers)
        return self._demands[key]

    def shared_pages(self, num_shared: int) -> Ints:
        """Pages, int64 [W], that a sequence holds of so many blocks without being charged."""
        shared: Ints = num_shared * self._global_rows_W
        return shared

    def admit(
        self,
        slot: int,
        demand: Demand,
        prompt_tokens: int,
        reserve_tokens: int = 0,
        num_shared: int = 0,
        held: NDArray[np.int32] | None = None,
    ) -> None:
        """Charge a slot its demand, and the pages of `reserve_tokens` that it will replay.

        Its rows may begin with what a conversation has `held`, int32 [L, H], until prefill is at
        their layer. The first `num_shared` pages of each of its rows that see all tokens are those
        of blocks, which are charged already.
        """
        assert not self._held_S[slot], f"slot {slot} is already charged"
        self._held_S[slot] = True
        self._ragged_S[slot] = demand.ragged
        self._tokens_S[slot] = self._prompt_S[slot] = prompt_tokens
        self._ring_bytes_SW[slot] = demand.ring_bytes
        self._kept_SLH[slot] = demand.rows
        if held is not None:
            self._resumed[slot] = held
        self._shared_S[slot] = num_shared
        self._shared_SW[slot] = self.shared_pages(num_shared)
        self._pages.open(slot, demand, reserve_tokens)
        self.free -= self.charged(slot)

    def release(self, slot: int) -> None:
        """Give back all that a slot is charged."""
        assert self._held_S[slot], f"slot {slot} is not charged"
        self.free += self.charged(slot)
        self._pages.close(slot)
        for numbers in self._by_slot:
            numbers[slot] = 0
        self._resumed.pop(slot, None)

    def copy_of(self, slot: int) -> Charge:
        """All that is known of a slot; `restore` charges another one the same."""
        return Charge(tuple(n[slot].copy() for n in self._by_slot), self._pages.copy_of(slot))

    def restore(self, slot: int, charge: Charge) -> None:
        """Charge a slot what another one was charged."""
        for numbers, mine in zip(self._by_slot, charge.numbers, strict=True):
            numbers[slot] = mine
        self._pages.restore(slot, charge.pages)
        self.free -= self.charged(slot)

    def set_aside(self, pages_W: Ints) -> None:
        """Charge pages that no slot holds: blocks of prefixes, and parked rows."""
        self.free -= pages_W
        self._set_aside_W += pages_W

    def take_back(self, pages_W: Ints) -> None:
        """Give back what `set_aside` has charged; the plan in the making frees it."""
        self.free += pages_W
        self._set_aside_W -= pages_W
        assert self._set_aside_W.min() >= 0, f"given back twice: {self._set_aside_W.tolist()}"

    def advance_prefill(self, slots: Sequence[int], stop_layer: int) -> None:
        """Note that the layers below `stop_layer` of these slots are prefilled."""
        self._layers_S[list(slots)] = stop_layer

    def set_kept(self, slot: int, rank: int, counts_bytes: bytes) -> None:
        """Replace a worker's expected counts by what its prefill kept, int32 [L, H] of its own."""
        worker = self.workers[rank]
        mine = self._kept_SLH[
            slot, worker.start_layer : worker.stop_layer, worker.start_head : worker.stop_head
        ]
        counts = np.frombuffer(counts_bytes, dtype=np.int32).reshape(mine.shape)
        assert not self._exact_SW[slot, rank], f"worker {rank} reports slot {slot} twice"
        mine[...] = counts
        self.free[rank] += self.charged(slot)[rank]
        self._pages.set_kept(slot, rank, counts)
        self._exact_SW[slot, rank] = True
        self.free[rank] -= self.charged(slot)[rank]

    def set_refused(self, slot: int, rank: int) -> None:
        """Note that a worker refused this slot and holds nothing of it."""
        self.free[rank] += self.charged(slot)[rank]
        self._pages.refuse(slot, rank)
        self._shared_SW[slot, rank] = 0
        self._refused_SW[slot, rank] = True

    def append_cost(self, slots: Ints, num_tokens: Ints) -> Ints:
        """Pages, int64 [N, W], that feeding `num_tokens` [N] tokens adds to `slots` [N] at most.

        With a decode stage no more may be fed at once than there is `room` for.
        """
        return self._pages.peak(slots, num_tokens) - self._pages.charged(slots)

    def append(self, slots: Ints, num_tokens: Ints, cost_NW: Ints | None = None) -> None:
        """Charge the tokens that a step feeds; the caller has checked that they fit.

        Args:
            slots: that are fed, [N].
            num_tokens: how many each, [N].
            cost_NW: their `append_cost`, if it is known.
        """
        if cost_NW is None:
            cost_NW = self.append_cost(slots, num_tokens)
        self.free -= cost_NW.sum(axis=0)
        assert self.free.min() >= 0, f"pages were promised twice: {self.free.tolist()} free"
        self._returned_W += self._pages.feed(slots, num_tokens)
        self._tokens_S[slots] += num_tokens

    @property
    def num_set_aside(self) -> Ints:
        """Pages, int64 [W], that no slot holds."""
        return self._set_aside_W.copy()

    def settle(self) -> None:
        """Give back what the compactions of the plan that is now complete return."""
        self.free += self._returned_W
        self._returned_W[:] = 0

    def room(self, slot: int) -> int | None:
        """Tokens that one step may feed: those up to the next compaction; None: any number."""
        return self._pages.room(slot)

    def is_exact(self, slot: int) -> bool:
        """Whether every worker has reported what its prefill kept."""
        return bool(self._exact_SW[slot].all())

    def kept_of_prompt(self, slot: int) -> NDArray[np.int32]:
        """Tokens kept per row after prefill, int32 [L, H]."""
        kept: NDArray[np.int32] = self._kept_SLH[slot].copy()
        return kept

    def kept(self, slot: int, fed_tokens: int) -> KVUsage:
        """What a slot keeps, and full retention would, with so many tokens fed after its prompt.

        Its prefill has ended. Every row of the model counts once, however many ranks hold it, and
        tokens count, not pages.
        """
        layers, length = self.layers, int(self._prompt_S[slot]) + fed_tokens
        grown_L = np.broadcast_to(self._pages.grown(slot, fed_tokens), self.num_layers)
        kept_L = self._kept_SLH[slot].sum(axis=1) + grown_L * self.num_heads
        kept_L[list(layers.local_layers)] = layers.local_tokens(length) * self.num_heads
        kept = int(kept_L[list(layers.global_layers)].sum())
        full = length * len(layers.global_layers) * self.num_heads
        token_bytes = self.workers[0].page_bytes // self.page_tokens
        return KVUsage(
            kept_tokens=kept,
            full_tokens=full,
            kept_bytes=kept * token_bytes,
            full_bytes=full * token_bytes,
            kept_tokens_by_layer=tuple(kept_L.tolist()),
            local_bytes=(int(kept_L.sum()) - kept) * token_bytes,
        )

    def rows_of(self, slot: int, fed_tokens: int) -> NDArray[np.int32]:
        """Tokens of each row, int32 [L, H], once so many are fed after a prefill that has ended."""
        layers, length = self.layers, int(self._prompt_S[slot]) + fed_tokens
        grown_L = np.broadcast_to(self._pages.grown(slot, fed_tokens), self.num_layers)
        rows_LH: NDArray[np.int32] = self._kept_SLH[slot] + grown_L[:, None].astype(np.int32)
        rows_LH[list(layers.local_layers)] = layers.local_tokens(length)
        return rows_LH

    def pages_of(self, slot: int) -> Ints:
        """Pages, int64 [W], of a slot whose prefill has ended, but for those of blocks."""
        pages: Ints = self._pages.held(np.array([slot]))[0] - self._shared_SW[slot]
        return pages

    def bytes_of(self, pages_W: Ints) -> int:
        """Bytes of so many pages on each worker."""
        return int(pages_W @ self._page_bytes)

    def usage(self) -> Usage:
        """Bytes held by sequences where their prefill has ended, against full retention's.

        These are the bytes between steps. Within a step that compacts, the last token may take one
        more page in each row.
        """
        slots = np.flatnonzero(self._held_S)
        exact_NW = self._exact_SW[slots]
        local_NW = self._pages.held_locally(slots)
        kept_NW = self._pages.held(slots) - local_NW
        pages_N = -(-self._tokens_S[slots] // self.page_tokens)
        full_NW = pages_N[:, None] * (self._global_rows_W * ~self._refused_SW[slots])
        kept, full, local = (
            int((pages_NW * exact_NW).sum(axis=0) @ self._page_bytes)
            for pages_NW in (kept_NW, full_NW, local_NW)
        )
        return Usage(kept, full, int(self._ring_bytes_SW.sum()), local)

    def pyramid(self) -> Pyramid:
        """What sequences keep by layer, of those whose prefill has ended on every worker."""
        slots = np.flatnonzero(self._held_S & self._exact_SW.all(axis=1))
        if len(slots) == 0:
            return Pyramid(0, np.zeros(self.num_layers), 0, self.layers)
        tokens_N, layers = self._tokens_S[slots], self.layers
        kept_NL = self._pages.kept_now(slots, self._kept_SLH[slots].mean(axis=2))
        kept_NL[:, list(layers.local_layers)] = np.minimum(tokens_N, layers.window)[:, None]
        return Pyramid(len(slots), kept_NL.mean(axis=0), int(tokens_N.sum()), layers)

    def allocated(self) -> Ints:
        """Pages that each worker holds once the planned steps have run, int64 [W].

        -1 where that cannot be known: a ragged prefill is under way or a slot was refused.
        """
        slots = np.flatnonzero(self._held_S)
        if self._refused_SW.any():
            return np.full(len(self.workers), -1, dtype=np.int64)
        ended_SW = self._layers_S[slots, None] >= [w.stop_layer for w in self.workers]
        own_SW = self._pages.held(slots) - self._shared_SW[slots]
        pages_W: Ints = (own_SW * ended_SW).sum(axis=0) + self._set_aside_W
        pages_W += sum(map(self._not_redone, self._resumed))
        for slot in slots[~ended_SW.all(axis=1)]:
            for rank, worker in enumerate(self.workers):
                stop_layer = int(self._layers_S[slot])
                is_under_way = worker.start_layer < stop_layer < worker.stop_layer
                if is_under_way and self._ragged_S[slot]:
                    pages_W[rank] = -1
                elif is_under_way and pages_W[rank] >= 0:
                    heads = slice(worker.start_head, worker.stop_head)
                    rows = self._kept_SLH[slot, worker.start_layer : stop_layer, heads]
                    pages_L = (-(-rows // self.page_tokens)).sum(axis=1)
                    sees_all_L = self._sees_all_L[worker.start_layer : stop_layer]
                    num_rows = int(sees_all_L.sum()) * rows.shape[1]
                    pages_W[rank] += int(pages_L.sum()) - num_rows * int(self._shared_S[slot])
        return pages_W

    def _not_redone(self, slot: int) -> Ints:
        """Pages, int64 [W], of a slot in layers where it has what its conversation had."""
        held_LH, pages_W = self._resumed[slot], np.zeros(len(self.workers), dtype=np.int64)
        sees_all_L, done = self._sees_all_L, int(self._layers_S[slot])
        for rank, worker in enumerate(self.workers):
            layers = slice(max(worker.start_layer, done), worker.stop_layer)
            rows = held_LH[layers, worker.start_head : worker.stop_head]
            if done >= worker.start_layer:  # it takes those with a window out of their pages first
                rows = rows[sees_all_L[layers]]
            shared = int(sees_all_L[layers].sum()) * rows.shape[1] * int(self._shared_S[slot])
            pages_W[rank] = int((-(-rows // self.page_tokens)).sum()) - shared
        return pages_W

    def verify(self, pages_free: Sequence[int]) -> None:
        """Assert that the workers' free pages are what this ledger says; no plan is in flight."""
        for rank, (free, held) in enumerate(zip(pages_free, self.allocated(), strict=True)):
            expected = self.num_pages[rank] - held
            assert held < 0 or free == expected, (
                f"worker {rank} has {free} free pages, the ledger says {expected}"
            )

    def charged(self, slot: int) -> Ints:
        """Pages, int64 [W], that a slot is charged between plans, but for those of blocks."""
        pages: Ints = self._pages.charged(np.array([slot]))[0] - self._shared_SW[slot]
        return pages
