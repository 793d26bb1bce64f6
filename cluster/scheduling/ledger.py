"""Pages promised on every worker, known without asking: integers only.

All rows of a sequence grow together, one entry per fed token, so a sequence's pages on a worker are
a function of how many tokens it was fed: `base` pages for what its prefill kept, one more page per
row every `page_tokens` tokens, and in between as many as rows cross a page boundary. That function
is tabulated per slot and worker (`_crossings`), so the cost of a step's appends is two look-ups per
sequence, however many layers and heads there are.

Under a decode-stage retention all rows of a sequence shrink together, too, after numbers of fed
tokens that are known (`compression.growth.Cycle`): then pages are a function of how many
tokens rows have *grown* by. A step that compacts appends first, so it is charged what it holds at
its peak, and `settle`, at the end of the plan, gives back what the compaction returns. The ring of
queries that a sequence may have (`workers/state/rings.py`) and its sums of attention lie outside
the pool: they are charged no pages. The bytes of its ring are counted in `usage`.

Rows that PyramidInfer's generation stage trims do not grow alike: `trimmed.TrimmedPages` counts
their pages, one sequence at a time, in the place of the function above.

Shapes: S slots, L layers, H kv heads of the model, W workers, P page_tokens, N slots of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.growth import Cycle, cycle_of, grown, trimmed_rows
from saqqara.compression.retention import Retention
from saqqara.workers.plan import WorkerInfo

from .ring_bytes import ring_bytes
from .trimmed import TrimmedDemand, TrimmedPages

Ints = NDArray[np.int64]

_MAX_DEMANDS = 4096


@dataclass(frozen=True, slots=True)
class Demand:
    """Pages that a prompt is expected to need once it is retained.

    `rows` int32 [L, H] expected kept tokens; `base` int64 [W] pages after prefill; `crossings`
    int64 [W, P] pages that the first k < P tokens after the prompt add. Exact unless `ragged`.
    `cycle` says when rows are compacted while decoding; None: never. `trimmed` counts in the place
    of `base` and `crossings` where rows are trimmed. `ring_bytes`, int64 [W], are those of the
    ring of queries that a sequence has as long as it holds its slot.
    """

    rows: NDArray[np.int32]
    base: Ints
    crossings: Ints
    ragged: bool
    ring_bytes: Ints
    cycle: Cycle | None = None
    trimmed: TrimmedDemand | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the pages that prefilled sequences hold, and what full retention would hold.

    `ring_bytes` are those of the queries, and their normalisers, that all sequences remember.
    """

    kept_bytes: int
    full_bytes: int
    ring_bytes: int = 0


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
        self.num_layers = max(w.stop_layer for w in workers)
        self.num_heads = max(w.stop_head for w in workers)
        num_workers = len(workers)
        self.num_pages = np.array([w.num_pages for w in workers], dtype=np.int64)
        self._page_bytes = np.array([w.page_bytes for w in workers], dtype=np.int64)
        self._rows_W = np.array(
            [(w.stop_layer - w.start_layer) * (w.stop_head - w.start_head) for w in workers],
            dtype=np.int64,
        )
        self.free = self.num_pages.copy()

        self._kept_SLH = np.zeros((num_slots, self.num_layers, self.num_heads), dtype=np.int32)
        self._prompt_S = np.zeros(num_slots, dtype=np.int64)
        self._fed_S = np.zeros(num_slots, dtype=np.int64)
        self._reserved_S = np.zeros(num_slots, dtype=np.int64)
        self._grace_S = np.zeros(num_slots, dtype=np.int64)
        self._slack_S = np.zeros(num_slots, dtype=np.int64)  # 0: rows are never compacted
        self._returned_W = np.zeros(num_workers, dtype=np.int64)  # by compactions of this plan
        self._layers_S = np.zeros(num_slots, dtype=np.int64)  # prefilled so far
        self._held_S = np.zeros(num_slots, dtype=np.bool_)
        self._ragged_S = np.zeros(num_slots, dtype=np.bool_)
        self._refused_S = np.zeros(num_slots, dtype=np.bool_)
        self._exact_SW = np.zeros((num_slots, num_workers), dtype=np.bool_)
        self._base_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._rows_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._crossings_SWP = np.zeros((num_slots, num_workers, self.page_tokens), dtype=np.int64)
        self._ring_bytes_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._trimmed: dict[int, TrimmedPages] = {}  # by slot
        self._demands: dict[tuple[Retention, int], Demand] = {}

    @property
    def num_held(self) -> int:
        """Slots that are charged for."""
        return int(np.count_nonzero(self._held_S))

    @property
    def rows_per_worker(self) -> Ints:
        """Rows that one sequence has on each worker, int64 [W]."""
        return self._rows_W

    def demand(self, retention: Retention, prompt_tokens: int) -> Demand:
        """What a prompt of this length is expected to need under this retention."""
        key = (retention, prompt_tokens)
        if key not in self._demands:
            if len(self._demands) >= _MAX_DEMANDS:
                self._demands.clear()
            self._demands[key] = self._compute_demand(retention, prompt_tokens)
        return self._demands[key]

    def pages_needed(self, demand: Demand, more_tokens: int = 0) -> Ints:
        """Pages, int64 [W], that a prompt needs at most while `more_tokens` are fed after it."""
        if demand.trimmed is not None:
            return demand.trimmed.most(more_tokens)
        if demand.cycle is not None:
            more_tokens = min(more_tokens, demand.cycle.most)
        cycles, rest = divmod(more_tokens, self.page_tokens)
        need: Ints = demand.base + cycles * self._rows_W + demand.crossings[:, rest]
        return need

    def admit(self, slot: int, demand: Demand, prompt_tokens: int, reserve_tokens: int = 0) -> None:
        """Charge a slot its demand, and the pages of `reserve_tokens` that it will replay."""
        assert not self._held_S[slot], f"slot {slot} is already charged"
        self._held_S[slot] = True
        self._ragged_S[slot] = demand.ragged
        self._prompt_S[slot] = prompt_tokens
        self._reserved_S[slot] = reserve_tokens
        if demand.cycle is not None:
            self._grace_S[slot], self._slack_S[slot] = demand.cycle.grace, demand.cycle.slack
        if demand.trimmed is not None:
            self._trimmed[slot] = demand.trimmed.sequence(reserve_tokens)
        self._ring_bytes_SW[slot] = demand.ring_bytes
        self._kept_SLH[slot] = demand.rows
        self._base_SW[slot] = demand.base
        self._rows_SW[slot] = self._rows_W
        self._crossings_SWP[slot] = demand.crossings
        self.free -= self._charged(slot)

    def release(self, slot: int) -> None:
        """Give back all that a slot is charged."""
        assert self._held_S[slot], f"slot {slot} is not charged"
        self.free += self._charged(slot)
        for per_slot in (self._held_S, self._ragged_S, self._refused_S, self._exact_SW):
            per_slot[slot] = False
        for counts in (self._prompt_S, self._fed_S, self._reserved_S, self._layers_S):
            counts[slot] = 0
        self._grace_S[slot] = self._slack_S[slot] = 0
        self._ring_bytes_SW[slot] = 0
        self._trimmed.pop(slot, None)
        self._kept_SLH[slot] = 0

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
        assert slot not in self._trimmed or (mine == counts).all(), f"slot {slot}: {counts}"
        mine[...] = counts
        self.free[rank] += self._charged(slot)[rank]
        self._base_SW[slot, rank], self._crossings_SWP[slot, rank] = self._tabulate(counts)
        self._exact_SW[slot, rank] = True
        self.free[rank] -= self._charged(slot)[rank]

    def set_refused(self, slot: int, rank: int) -> None:
        """Note that a worker refused this slot and holds nothing of it."""
        self.free[rank] += self._charged(slot)[rank]
        self._base_SW[slot, rank] = 0
        self._rows_SW[slot, rank] = 0
        self._crossings_SWP[slot, rank] = 0
        if slot in self._trimmed:
            self._trimmed[slot].refuse(rank)
        self._refused_S[slot] = True

    def append_cost(self, slots: Ints, num_tokens: Ints) -> Ints:
        """Pages, int64 [N, W], that feeding `num_tokens` [N] tokens adds to `slots` [N] at most.

        With a decode stage no more may be fed at once than there is `room` for.
        """
        return self._peak_pages(slots, num_tokens) - self._charged_pages(slots)

    def append(self, slots: Ints, num_tokens: Ints) -> None:
        """Charge the tokens that a step feeds; the caller has checked that they fit."""
        self.free -= self.append_cost(slots, num_tokens).sum(axis=0)
        assert self.free.min() >= 0, f"pages were promised twice: {self.free.tolist()} free"
        is_cut = self._slack_S[slots] > 0
        if self._trimmed:
            is_cut |= [slot in self._trimmed for slot in slots.tolist()]
        cut = slots[is_cut]
        peak_NW = self._peak_pages(cut, num_tokens[is_cut])
        self._fed_S[slots] += num_tokens
        for slot, num in zip(slots.tolist(), num_tokens.tolist(), strict=True):
            if slot in self._trimmed:
                self._trimmed[slot].feed(num)
        self._returned_W += (peak_NW - self._charged_pages(cut)).sum(axis=0)

    def settle(self) -> None:
        """Give back what the compactions of the plan that is now complete return."""
        self.free += self._returned_W
        self._returned_W[:] = 0

    def room(self, slot: int) -> int | None:
        """Tokens that one step may feed: those up to the next compaction; None: any number."""
        if slot in self._trimmed:
            return self._trimmed[slot].room
        if self._slack_S[slot] == 0:
            return None
        cycle = Cycle(int(self._grace_S[slot]), int(self._slack_S[slot]))
        return cycle.room(int(self._fed_S[slot]))

    def is_exact(self, slot: int) -> bool:
        """Whether every worker has reported what its prefill kept."""
        return bool(self._exact_SW[slot].all())

    def kept(self, slot: int) -> NDArray[np.int32]:
        """Tokens kept per row now, int32 [L, H]: those of the prompt and those grown since."""
        if slot in self._trimmed:
            stored = self._trimmed[slot].stored.astype(np.int32)
            return np.repeat(stored[:, None], self.num_heads, axis=1)
        more = self._grown(np.array([slot]), self._fed_S[slot]).astype(np.int32)
        kept: NDArray[np.int32] = self._kept_SLH[slot] + more
        return kept

    def kept_of_prompt(self, slot: int) -> NDArray[np.int32]:
        """Tokens kept per row after prefill, int32 [L, H]."""
        kept: NDArray[np.int32] = self._kept_SLH[slot].copy()
        return kept

    def usage(self) -> Usage:
        """Bytes held by sequences where their prefill has ended, against full retention's.

        These are the bytes between steps. Within a step that compacts, the last token may take one
        more page in each row.
        """
        slots = np.flatnonzero(self._held_S)
        exact_NW = self._exact_SW[slots]
        kept_NW = self._held_pages(slots)
        tokens_N = self._prompt_S[slots] + self._fed_S[slots]
        full_NW = -(-tokens_N // self.page_tokens)[:, None] * self._rows_SW[slots]
        kept_W = (kept_NW * exact_NW).sum(axis=0)
        full_W = (full_NW * exact_NW).sum(axis=0)
        return Usage(
            int(kept_W @ self._page_bytes),
            int(full_W @ self._page_bytes),
            int(self._ring_bytes_SW.sum()),
        )

    def allocated(self) -> Ints:
        """Pages that each worker holds once the planned steps have run, int64 [W].

        -1 where that cannot be known: a ragged prefill is under way or a slot was refused.
        """
        slots = np.flatnonzero(self._held_S)
        if self._refused_S.any():
            return np.full(len(self.workers), -1, dtype=np.int64)
        ended_SW = self._layers_S[slots, None] >= [w.stop_layer for w in self.workers]
        pages_W: Ints = (self._held_pages(slots) * ended_SW).sum(axis=0)
        for slot in slots[~ended_SW.all(axis=1)]:
            for rank, worker in enumerate(self.workers):
                stop_layer = int(self._layers_S[slot])
                if not worker.start_layer < stop_layer < worker.stop_layer:
                    continue
                if self._ragged_S[slot]:
                    pages_W[rank] = -1
                elif pages_W[rank] >= 0:
                    heads = slice(worker.start_head, worker.stop_head)
                    rows = self._kept_SLH[slot, worker.start_layer : stop_layer, heads]
                    pages_W[rank] += int((-(-rows // self.page_tokens)).sum())
        return pages_W

    def verify(self, pages_free: Sequence[int]) -> None:
        """Assert that the workers' free pages are what this ledger says; no plan is in flight."""
        allocated = self.allocated()
        for rank, (free, held) in enumerate(zip(pages_free, allocated, strict=True)):
            expected = self.num_pages[rank] - held
            assert held < 0 or free == expected, (
                f"worker {rank} has {free} free pages, the ledger says {expected}"
            )

    def _grown(self, slots: Ints, fed_tokens: Ints) -> Ints:
        """Tokens by which rows of slots [N] outgrow what prefill kept, once so many are fed [N]."""
        return grown(fed_tokens, self._grace_S[slots], self._slack_S[slots])

    def _charged_tokens(self, slots: Ints, fed_tokens: Ints) -> Ints:
        """Growth, int64 [N], that slots [N] are charged for between plans, once so many are fed."""
        reserved, slack = self._reserved_S[slots], self._slack_S[slots]
        most = np.where(slack > 0, self._grace_S[slots] + slack, reserved)
        held = self._grown(slots, fed_tokens)
        # What is still to be replayed may need as much as rows ever grow by.
        charged: Ints = np.where(fed_tokens < reserved, np.minimum(reserved, most), held)
        return charged

    def _peak(self, slots: Ints, num_tokens: Ints) -> Ints:
        """Growth, int64 [N], that must be charged while a step feeds `num_tokens` [N]."""
        fed = self._fed_S[slots]
        fed_peak = self._grown(slots, fed) + num_tokens
        peak: Ints = np.maximum(fed_peak, self._charged_tokens(slots, fed))
        return peak

    def _charged(self, slot: int) -> Ints:
        pages: Ints = self._charged_pages(np.array([slot]))[0]
        return pages

    def _charged_pages(self, slots: Ints) -> Ints:
        """Pages, int64 [N, W], that slots [N] are charged between plans."""
        pages = self._pages(slots, self._charged_tokens(slots, self._fed_S[slots]))
        for i, trimmed in self._trimmed_among(slots):
            pages[i] = trimmed.charged()
        return pages

    def _held_pages(self, slots: Ints) -> Ints:
        """Pages, int64 [N, W], of slots [N] between steps."""
        pages = self._pages(slots, self._grown(slots, self._fed_S[slots]))
        for i, trimmed in self._trimmed_among(slots):
            pages[i] = trimmed.held()
        return pages

    def _peak_pages(self, slots: Ints, num_tokens: Ints) -> Ints:
        """Pages, int64 [N, W], that must be charged while a step feeds `num_tokens` [N]."""
        pages = self._pages(slots, self._peak(slots, num_tokens))
        for i, trimmed in self._trimmed_among(slots):
            pages[i] = trimmed.peak(int(num_tokens[i]))
        return pages

    def _trimmed_among(self, slots: Ints) -> list[tuple[int, TrimmedPages]]:
        """Those of slots [N] whose rows are trimmed, each with its place among them."""
        if not self._trimmed:
            return []
        found = enumerate(slots.tolist())
        return [(i, self._trimmed[slot]) for i, slot in found if slot in self._trimmed]

    def _pages(self, slots: Ints, grown_tokens: Ints) -> Ints:
        """Pages, int64 [N, W], of slots [N] whose rows grew by these numbers of tokens [N]."""
        cycles_N, rest_N = grown_tokens // self.page_tokens, grown_tokens % self.page_tokens
        pages: Ints = self._base_SW[slots] + cycles_N[:, None] * self._rows_SW[slots]
        return pages + self._crossings_SWP[slots, :, rest_N]

    def _tabulate(self, rows: NDArray[np.int32]) -> tuple[int, Ints]:
        """Pages of some rows, and what the first k tokens fed to all of them add, int64 [P]."""
        page_tokens = self.page_tokens
        base = int((-(-rows // page_tokens)).sum())
        last_page = np.bincount((rows % page_tokens).ravel(), minlength=page_tokens)
        # The j-th token (from 0) opens a page in the rows whose last page has -j (mod P) entries.
        opened = last_page[-np.arange(page_tokens) % page_tokens]
        return base, np.concatenate(([0], np.cumsum(opened)[:-1]))

    def _compute_demand(self, retention: Retention, prompt_tokens: int) -> Demand:
        rows = retention.row_tokens(prompt_tokens, self.num_layers, self.num_heads)
        base = np.zeros(len(self.workers), dtype=np.int64)
        crossings = np.zeros((len(self.workers), self.page_tokens), dtype=np.int64)
        for rank, worker in enumerate(self.workers):
            mine = rows[
                worker.start_layer : worker.stop_layer, worker.start_head : worker.stop_head
            ]
            base[rank], crossings[rank] = self._tabulate(mine)
            if retention.ragged and retention.drops(prompt_tokens):
                # Heads may divide a layer's tokens in any way: at most one part-filled page each.
                per_layer = -(-mine.sum(axis=1) // self.page_tokens) + mine.shape[1]
                most = mine.size * -(-prompt_tokens // self.page_tokens)
                base[rank] = min(int(per_layer.sum()), most)
        ragged = retention.ragged and retention.drops(prompt_tokens)
        cycle = cycle_of(retention, prompt_tokens, self.page_tokens)
        trimmed = trimmed_rows(retention, prompt_tokens, self.num_layers)
        return Demand(
            rows=rows,
            base=base,
            crossings=crossings,
            ragged=ragged,
            cycle=cycle,
            trimmed=None if trimmed is None else TrimmedDemand(trimmed, self.workers),
            ring_bytes=ring_bytes(retention, prompt_tokens, self.workers),
        )
