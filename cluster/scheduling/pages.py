"""Pages that slots hold on every worker, counted without asking: plain, cyclic and trimmed rows.

All rows of a sequence grow together, one entry per fed token, so a sequence's pages on a worker are
a function of how many tokens it was fed: `base` pages for what its prefill kept, one more page per
row every `page_tokens` tokens, and in between as many as rows cross a page boundary. That function
is tabulated per slot and worker, so the cost of a step's appends is two look-ups per sequence,
however many layers and heads there are (`TabulatedPages`).

Under a decode-stage retention all rows of a sequence shrink together, too, after numbers of fed
tokens that are known (`compression.growth.Cycle`): then pages are a function of how many
tokens rows have *grown* by. Rows that PyramidInfer's generation stage trims do not grow alike:
their pages are counted one sequence at a time (`TrimmedPages`). `SlotPages` has both behind one
face; whoever asks need not know which rows a slot has.

Rows of local layers hold what was kept and fed, up to their window: their pages are counted beside
the table. A step that compacts appends first, so it is charged what it holds at its peak.

Shapes: S slots, L layers, H kv heads, W workers, P page_tokens, N slots of a step.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.growth import Cycle, grown
from saqqara.workers.plan import WorkerInfo

from .demand import (
    Demand,
    Ints,
    SlotPageCounts,
    TabulatedGrowth,
    TrimmedGrowth,
    TrimmedSlot,
    global_layers,
    tabulate,
)


class PageCounts(Protocol):
    """Pages of slots, as steps feed them. A slot that is not open has none."""

    def close(self, slot: int) -> None:
        """Forget a slot."""
        ...

    def set_kept(self, slot: int, rank: int, counts: NDArray[np.int32]) -> None:
        """Replace a worker's expected rows by what its prefill kept, int32 [L, H] of its own."""
        ...

    def refuse(self, slot: int, rank: int) -> None:
        """Note that a worker holds nothing of this slot."""
        ...

    def feed(self, slots: Ints, num_tokens: Ints) -> Ints:
        """Count the tokens of a step [N]; returns the pages [W] that are given back at its end."""
        ...

    def held(self, slots: Ints) -> Ints:
        """Pages, int64 [N, W], between steps."""
        ...

    def charged(self, slots: Ints) -> Ints:
        """Pages, int64 [N, W], that are charged between plans: those of a replay to come, too."""
        ...

    def peak(self, slots: Ints, num_tokens: Ints) -> Ints:
        """Pages, int64 [N, W], that must be charged while a step feeds so many tokens [N]."""
        ...

    def room(self, slot: int) -> int | None:
        """Tokens that one step may feed: those up to the next compaction; None: any number."""
        ...

    def grown(self, slot: int, fed_tokens: int) -> Ints:
        """Tokens by which rows outgrow what prefill kept, once so many are fed.

        Int64 [L], or [] where it is the same in all global layers; local ones hold their window.
        """
        ...


class SlotPages:
    """The pages of all slots, whatever their rows do; see `PageCounts`."""

    def __init__(self, num_slots: int, workers: Sequence[WorkerInfo]) -> None:
        self._tabulated = TabulatedPages(num_slots, workers)
        self._trimmed = TrimmedPages(len(workers))

    def open(self, slot: int, demand: Demand, reserve_tokens: int) -> None:
        """Start with a prompt's expected pages, and those of so many tokens to be replayed."""
        if isinstance(demand.growth, TrimmedGrowth):
            self._trimmed.open(slot, demand.growth, reserve_tokens)
        else:
            self._tabulated.open(slot, demand.growth, reserve_tokens)

    def close(self, slot: int) -> None:
        """See `PageCounts`."""
        self._tabulated.close(slot)
        self._trimmed.close(slot)

    def set_kept(self, slot: int, rank: int, counts: NDArray[np.int32]) -> None:
        """See `PageCounts`."""
        self._of(slot).set_kept(slot, rank, counts)

    def refuse(self, slot: int, rank: int) -> None:
        """See `PageCounts`."""
        self._of(slot).refuse(slot, rank)

    def feed(self, slots: Ints, num_tokens: Ints) -> Ints:
        """See `PageCounts`."""
        returned = self._tabulated.feed(slots, num_tokens)
        return returned + self._trimmed.feed(slots, num_tokens) if self._trimmed else returned

    def held(self, slots: Ints) -> Ints:
        """See `PageCounts`."""
        pages = self._tabulated.held(slots)
        return pages + self._trimmed.held(slots) if self._trimmed else pages

    def charged(self, slots: Ints) -> Ints:
        """See `PageCounts`."""
        pages = self._tabulated.charged(slots)
        return pages + self._trimmed.charged(slots) if self._trimmed else pages

    def peak(self, slots: Ints, num_tokens: Ints) -> Ints:
        """See `PageCounts`."""
        pages = self._tabulated.peak(slots, num_tokens)
        return pages + self._trimmed.peak(slots, num_tokens) if self._trimmed else pages

    def room(self, slot: int) -> int | None:
        """See `PageCounts`."""
        return self._of(slot).room(slot)

    def grown(self, slot: int, fed_tokens: int) -> Ints:
        """See `PageCounts`."""
        return self._of(slot).grown(slot, fed_tokens)

    def held_locally(self, slots: Ints) -> Ints:
        """Of the pages that are `held`, those of local layers, int64 [N, W]."""
        return self._tabulated.held_locally(slots)

    def kept_now(self, slots: Ints, prefilled_NL: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean tokens that rows of global layers hold, of what prefill left of them [N, L]."""
        kept_NL = prefilled_NL + self._tabulated.grown_by(slots)[:, None]
        return self._trimmed.replaced(slots, kept_NL) if self._trimmed else kept_NL

    def copy_of(self, slot: int) -> SlotPageCounts:
        """What is counted for a slot, as it is now."""
        return SlotPageCounts(self._tabulated.copy_of(slot), self._trimmed.copy_of(slot))

    def restore(self, slot: int, counts: SlotPageCounts) -> None:
        """Go on in a slot that is not open with what was counted for another."""
        self._tabulated.restore(slot, counts.tabulated)
        self._trimmed.restore(slot, counts.trimmed)

    def _of(self, slot: int) -> PageCounts:
        return self._trimmed if slot in self._trimmed else self._tabulated


class TabulatedPages:
    """Slots whose rows grow, and with a cycle shrink, together; see `PageCounts`."""

    def __init__(self, num_slots: int, workers: Sequence[WorkerInfo]) -> None:
        num_workers, page_tokens = len(workers), workers[0].page_tokens
        self._page_tokens = page_tokens
        self._global_layers = global_layers(workers)
        self._window = 0
        self._local_tokens_S = np.zeros(num_slots, dtype=np.int64)  # after prefill, of a local row
        self._local_rows_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._fed_S = np.zeros(num_slots, dtype=np.int64)
        self._reserved_S = np.zeros(num_slots, dtype=np.int64)
        self._grace_S = np.zeros(num_slots, dtype=np.int64)
        self._slack_S = np.zeros(num_slots, dtype=np.int64)  # 0: rows are never compacted
        self._base_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._rows_SW = np.zeros((num_slots, num_workers), dtype=np.int64)
        self._crossings_SPW = np.zeros((num_slots, page_tokens, num_workers), dtype=np.int64)
        self._num_cyclic = 0  # slots whose rows are compacted
        self._by_slot = (
            *(self._fed_S, self._reserved_S, self._grace_S, self._slack_S, self._local_tokens_S),
            *(self._base_SW, self._rows_SW, self._crossings_SPW, self._local_rows_SW),
        )

    def open(self, slot: int, growth: TabulatedGrowth, reserve_tokens: int) -> None:
        """See `SlotPages`."""
        self._reserved_S[slot] = reserve_tokens
        if growth.cycle is not None:
            self._grace_S[slot], self._slack_S[slot] = growth.cycle.grace, growth.cycle.slack
            self._num_cyclic += 1
        self._base_SW[slot] = growth.base
        self._rows_SW[slot] = growth.rows
        self._crossings_SPW[slot] = growth.crossings.T
        self._window = growth.local.window
        self._local_tokens_S[slot] = growth.local.tokens
        self._local_rows_SW[slot] = growth.local.rows

    def close(self, slot: int) -> None:
        """See `PageCounts`."""
        self._num_cyclic -= int(self._slack_S[slot] > 0)
        for counts_S in self._by_slot:
            counts_S[slot] = 0

    def copy_of(self, slot: int) -> tuple[Ints, ...]:
        """See `SlotPages`."""
        return tuple(counts_S[slot].copy() for counts_S in self._by_slot)

    def restore(self, slot: int, counts: tuple[Ints, ...]) -> None:
        """See `SlotPages`."""
        for counts_S, mine in zip(self._by_slot, counts, strict=True):
            counts_S[slot] = mine
        self._num_cyclic += int(self._slack_S[slot] > 0)

    def set_kept(self, slot: int, rank: int, counts: NDArray[np.int32]) -> None:
        """See `PageCounts`."""
        sees_all = self._global_layers[rank]
        local = counts[~sees_all]
        assert (local == self._local_tokens_S[slot]).all(), f"slot {slot}: {local}"
        table = tabulate(counts[sees_all], self._page_tokens)
        self._base_SW[slot, rank], self._crossings_SPW[slot, :, rank] = table

    def refuse(self, slot: int, rank: int) -> None:
        """See `PageCounts`."""
        for pages_S in (self._base_SW, self._rows_SW, self._local_rows_SW, self._crossings_SPW):
            pages_S[slot, ..., rank] = 0

    def feed(self, slots: Ints, num_tokens: Ints) -> Ints:
        """See `PageCounts`."""
        if self._num_cyclic == 0:
            self._fed_S[slots] += num_tokens
            return np.zeros(self._base_SW.shape[1], dtype=np.int64)
        shrinks = self._slack_S[slots] > 0
        cut = slots[shrinks]
        peak_NW = self.peak(cut, num_tokens[shrinks])
        self._fed_S[slots] += num_tokens
        returned_W: Ints = (peak_NW - self.charged(cut)).sum(axis=0)
        return returned_W

    def held(self, slots: Ints) -> Ints:
        """See `PageCounts`."""
        fed = self._fed_S[slots]
        return self._pages(slots, self._grown(slots, fed), fed)

    def held_locally(self, slots: Ints) -> Ints:
        """See `SlotPages`."""
        return self._local_pages(slots, self._fed_S[slots])

    def charged(self, slots: Ints) -> Ints:
        """See `PageCounts`."""
        fed = self._fed_S[slots]
        local = np.maximum(self._reserved_S[slots], fed)
        return self._pages(slots, self._charged_tokens(slots, fed), local)

    def peak(self, slots: Ints, num_tokens: Ints) -> Ints:
        """See `PageCounts`."""
        fed = self._fed_S[slots]
        growth = self._grown(slots, fed) + num_tokens
        local = np.maximum(self._reserved_S[slots], fed + num_tokens)
        return self._pages(slots, np.maximum(growth, self._charged_tokens(slots, fed)), local)

    def room(self, slot: int) -> int | None:
        """See `PageCounts`."""
        if self._slack_S[slot] == 0:
            return None
        cycle = Cycle(int(self._grace_S[slot]), int(self._slack_S[slot]))
        return cycle.room(int(self._fed_S[slot]))

    def grown(self, slot: int, fed_tokens: int) -> Ints:
        """See `PageCounts`."""
        return self._grown(np.array([slot]), np.array([fed_tokens]))[0]  # type: ignore[no-any-return]

    def grown_by(self, slots: Ints) -> Ints:
        """Tokens by which rows of slots [N] outgrow what prefill kept, now."""
        return self._grown(slots, self._fed_S[slots])

    def _grown(self, slots: Ints, fed_tokens: Ints) -> Ints:
        """Tokens by which rows of slots [N] outgrow what prefill kept, once so many are fed [N]."""
        if self._num_cyclic == 0:
            return fed_tokens
        return grown(fed_tokens, self._grace_S[slots], self._slack_S[slots])

    def _charged_tokens(self, slots: Ints, fed_tokens: Ints) -> Ints:
        """Growth, int64 [N], that slots [N] are charged for between plans, once so many are fed."""
        reserved = self._reserved_S[slots]
        if self._num_cyclic == 0:
            return np.maximum(reserved, fed_tokens)
        slack = self._slack_S[slots]
        most = np.where(slack > 0, self._grace_S[slots] + slack, reserved)
        held = self._grown(slots, fed_tokens)
        # What is still to be replayed may need as much as rows ever grow by.
        charged: Ints = np.where(fed_tokens < reserved, np.minimum(reserved, most), held)
        return charged

    def _pages(self, slots: Ints, grown_tokens: Ints, fed_tokens: Ints) -> Ints:
        """Pages, int64 [N, W], of slots [N] whose global rows grew so much [N], of what was fed."""
        cycles_N: Ints = grown_tokens // self._page_tokens
        rest_N: Ints = grown_tokens - cycles_N * self._page_tokens
        pages: Ints = self._base_SW[slots] + cycles_N[:, None] * self._rows_SW[slots]
        pages += self._crossings_SPW[slots, rest_N]
        return pages + self._local_pages(slots, fed_tokens) if self._window else pages

    def _local_pages(self, slots: Ints, fed_tokens: Ints) -> Ints:
        """Pages, int64 [N, W], of the local rows of slots [N] that were fed so many tokens [N]."""
        tokens_N = np.minimum(self._local_tokens_S[slots] + fed_tokens, self._window)
        pages: Ints = -(-tokens_N // self._page_tokens)[:, None] * self._local_rows_SW[slots]
        return pages


class TrimmedPages:
    """Slots whose layers are cut one by one; see `PageCounts`. Its length is their number."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._open: dict[int, TrimmedSlot] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, slot: int) -> bool:
        return slot in self._open

    def open(self, slot: int, growth: TrimmedGrowth, reserve_tokens: int) -> None:
        """See `SlotPages`."""
        self._open[slot] = TrimmedSlot(growth, reserve_tokens)

    def close(self, slot: int) -> None:
        """See `PageCounts`."""
        self._open.pop(slot, None)

    def copy_of(self, slot: int) -> TrimmedSlot | None:
        """See `SlotPages`."""
        return self._open[slot].copy() if slot in self._open else None

    def restore(self, slot: int, counts: TrimmedSlot | None) -> None:
        """See `SlotPages`."""
        if counts is not None:
            self._open[slot] = counts.copy()

    def set_kept(self, slot: int, rank: int, counts: NDArray[np.int32]) -> None:
        """See `PageCounts`; prefill leaves exactly what is expected of such rows."""
        expected_L = self._open[slot].growth.stored_on(rank)
        assert (counts == expected_L[:, None]).all(), f"slot {slot}: {counts}"

    def refuse(self, slot: int, rank: int) -> None:
        """See `PageCounts`."""
        self._open[slot].holds_W[rank] = 0

    def feed(self, slots: Ints, num_tokens: Ints) -> Ints:
        """See `PageCounts`."""
        returned_W = np.zeros(self._num_workers, dtype=np.int64)
        for slot, num in zip(slots.tolist(), num_tokens.tolist(), strict=True):
            if slot in self._open:
                returned_W += self._open[slot].feed(num)
        return returned_W

    def held(self, slots: Ints) -> Ints:
        """See `PageCounts`."""
        pages_NW = np.zeros((len(slots), self._num_workers), dtype=np.int64)
        for place, trimmed in self._among(slots):
            pages_NW[place] = trimmed.held()
        return pages_NW

    def charged(self, slots: Ints) -> Ints:
        """See `PageCounts`."""
        pages_NW = np.zeros((len(slots), self._num_workers), dtype=np.int64)
        for place, trimmed in self._among(slots):
            pages_NW[place] = trimmed.charged()
        return pages_NW

    def peak(self, slots: Ints, num_tokens: Ints) -> Ints:
        """See `PageCounts`."""
        pages_NW = np.zeros((len(slots), self._num_workers), dtype=np.int64)
        for place, trimmed in self._among(slots):
            pages_NW[place] = trimmed.peak(int(num_tokens[place]))
        return pages_NW

    def room(self, slot: int) -> int | None:
        """See `PageCounts`."""
        return self._open[slot].rows.room

    def grown(self, slot: int, fed_tokens: int) -> Ints:
        """See `PageCounts`."""
        return self._open[slot].grown(fed_tokens)

    def replaced(self, slots: Ints, kept_NL: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens by layer [N, L], with those of the slots that are open here in their place."""
        for place, trimmed in self._among(slots):
            kept_NL[place] = trimmed.rows.stored
        return kept_NL

    def _among(self, slots: Ints) -> list[tuple[int, TrimmedSlot]]:
        """Those of slots [N] that are open here, each with its place among them."""
        found = enumerate(slots.tolist())
        return [(place, self._open[slot]) for place, slot in found if slot in self._open]
