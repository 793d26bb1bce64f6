"""Reading and compacting rows of one layer of many slots at once.

Shapes: R rows of one layer, n stored tokens of each (of the longest where lengths differ), D head
dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device

from .spans import spans
from .store import KVStore
from .view import AppendPlan


@dataclass(frozen=True, slots=True)
class Rows:
    """Different rows of one local layer: row i is `(slots[i], layer, heads[i])`, int64 [R] each."""

    layer: int
    slots: NDArray[np.int64]
    heads: NDArray[np.int64]

    def pages(self, kv: KVStore, num_pages: int) -> Tensor:
        """The first pages of each row, int64 [R, num_pages] on the device."""
        return kv.table.row_pages(self.slots, self.layer, self.heads, num_pages).long()


def read_rows(kv: KVStore, rows: Rows) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values that rows of one length keep, [R, n, D] each, in order."""
    kept = kv.table.kept[rows.slots, rows.layer, rows.heads]
    length = int(kept[0])
    assert (kept == length).all(), f"rows of different lengths: {kept}"
    pages = rows.pages(kv, -(-length // kv.page_tokens))
    k, v = (
        x.index_select(0, pages.view(-1)).view(len(kept), -1, x.shape[-1])[:, :length]
        for x in (kv.pool.k_pages, kv.pool.v_pages)
    )
    return k, v


def read_ends(kv: KVStore, rows: Rows) -> tuple[Tensor, Tensor]:
    """Copies as `read_rows`, [R, n, D], of rows of any length, which end in the last column.

    What stands before a row's first token means nothing.
    """
    kept = kv.table.kept[rows.slots, rows.layer, rows.heads].astype(np.int64)
    device, most, page_tokens = kv.table.device, int(kept.max()), kv.page_tokens
    place = torch.arange(most, device=device) - to_device(most - kept, device)[:, None]
    place = place.clamp_min(0)
    page = rows.pages(kv, -(-most // page_tokens)).gather(1, place // page_tokens)
    refs = (page * page_tokens + place % page_tokens).view(-1)
    k, v = (x.index_select(0, refs).view(len(kept), most, -1) for x in (kv.k_tokens, kv.v_tokens))
    return k, v


def read_places(kv: KVStore, rows: Rows, start: int, stop: int) -> Tensor:
    """Copies of the keys at the storage places `[start, stop)` of rows, [R, stop - start, D]."""
    kept = kv.table.kept[rows.slots, rows.layer, rows.heads]
    assert (stop <= kept).all(), f"places up to {stop} of rows of {kept} tokens"
    first = start // kv.page_tokens
    pages = rows.pages(kv, -(-stop // kv.page_tokens))[:, first:]
    skipped = start - first * kv.page_tokens
    k = kv.pool.k_pages.index_select(0, pages.reshape(-1))
    k = k.view(len(kept), -1, k.shape[-1])
    return k[:, skipped : skipped + stop - start].contiguous()


def rings_with_new(
    kv: KVStore, plan: AppendPlan, layer: int, first: int, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """What rings held before a step, in the order of the text, with the step's tokens behind it.

    Args:
        kv: the store, before it has stored the new tokens in this layer.
        plan: of the step.
        layer: local layer with a window.
        first: the sequences of the plan from this one on.
        k: keys of their new tokens, [T, H, D].
        v: values of these, [T, H, D].

    Returns:
        Keys and values, packed, [T + held, H, D] each, and how many each sequence has.
    """
    slots, num_new, device = plan.slots[first:], plan.num_new[first:], k.device
    places, held = kv.rings.in_order(kv.rings.seen[slots] - num_new)
    row = kv.table.first_entry[slots, layer].repeat(held, axis=0)  # [held, H]
    column = places[:, None] // kv.page_tokens
    refs = kv.table.flat_pages[row + column].astype(np.int64) * kv.page_tokens
    refs += places[:, None] % kv.page_tokens
    stored = to_device(refs.reshape(-1), device)
    starts = np.cumsum(held + num_new) - held - num_new
    of_held = to_device(spans(starts, held), device)
    of_new = to_device(spans(starts + held, num_new), device)
    packed = []
    for new, tokens in ((k, kv.k_tokens), (v, kv.v_tokens)):
        both = new.new_empty(len(places) + len(new), *new.shape[1:])
        both.index_copy_(0, of_held, tokens.index_select(0, stored).view(-1, *new.shape[1:]))
        packed.append(both.index_copy_(0, of_new, new))
    return packed[0], packed[1], (held + num_new).tolist()


def compact_rows(kv: KVStore, rows: Rows, indices: Tensor, num_fixed: int = 0) -> bool:
    """Keep only some tokens of rows of one length, in place; surplus pages are free at once.

    Args:
        kv: the store.
        rows: which rows.
        indices: storage positions that each keeps, ascending, int64 [R, keep]; with neither a
            window nor sinks a row's share of the budget may be nothing.
        num_fixed: so many tokens of each row stay where they are, the first ones; whole pages of
            them are neither read nor written.

    Returns:
        False, with nothing changed, if pages that are shared with other slots would have to be
        copied and the free ones do not suffice.
    """
    table = kv.table
    kept = table.kept[rows.slots, rows.layer, rows.heads]
    assert (kept == kept[0]).all(), f"rows of different lengths: {kept}"
    fixed = num_fixed // kv.page_tokens * kv.page_tokens
    counts = np.full(len(kept), indices.shape[1] - fixed, dtype=np.int32)
    return _compact(kv, rows, (indices[:, fixed:] - fixed).reshape(-1), counts, fixed)


def compact_each(kv: KVStore, rows: Rows, indices: Tensor, counts: NDArray[np.int32]) -> bool:
    """`compact_rows` for rows of different lengths.

    Args:
        kv: the store.
        rows: which rows.
        indices: storage positions that they keep, row after row, ascending in each, int64.
        counts: how many each keeps, [R].
    """
    return _compact(kv, rows, indices, counts, 0)


def _compact(
    kv: KVStore, rows: Rows, indices: Tensor, counts: NDArray[np.int32], fixed: int
) -> bool:
    """Compact what follows the first `fixed` tokens, whole pages, as if rows began there."""
    table, pool, page_tokens = kv.table, kv.pool, kv.page_tokens
    first = table.first_entry[rows.slots, rows.layer, rows.heads] + fixed // page_tokens
    kept = table.kept[rows.slots, rows.layer, rows.heads] - np.int32(fixed)
    assert (counts <= kept).all(), f"{counts} of {kept} tokens"
    num_keep = table.num_pages(counts)
    surplus = table.flat_pages[spans(first + num_keep, table.num_pages(kept) - num_keep)]
    if kv.moves is not None and not pool.any_shared:
        some = counts > 0
        kv.moves.compact(first[some], indices, counts[some])
        pool.release(surplus)
    elif not _rewrite(kv, spans(first, num_keep), surplus, _places(kv, first, indices, counts)):
        return False
    table.set_rows_kept(rows.slots, rows.layer, rows.heads, counts + np.int32(fixed))
    return True


def _places(
    kv: KVStore, first: NDArray[np.int64], indices: Tensor, counts: NDArray[np.int32]
) -> Tensor:
    """Where the tokens `indices` of rows with these first table entries lie, in the flat pool.

    Each row is filled up to whole pages with its last token, so that no stale NaN stays in them.
    """
    page_tokens, device = kv.page_tokens, kv.table.device
    padded = kv.table.num_pages(counts) * page_tokens
    row = np.repeat(np.arange(len(counts)), padded)
    nth = np.minimum(spans(np.zeros(len(counts), dtype=np.int64), padded), counts[row] - 1)
    start = np.cumsum(counts, dtype=np.int64) - counts
    places = indices.index_select(0, to_device(start[row] + nth, device))
    column = places // page_tokens
    table, begins = kv.table.flat_rows(first)
    entries = to_device(begins[row], device) + column
    pages = table.index_select(0, entries).long()
    return (pages - column) * page_tokens + places


def _rewrite(
    kv: KVStore, entries: NDArray[np.int64], surplus: NDArray[np.int32], source: Tensor
) -> bool:
    """Fill the pages of table entries with the tokens at `source`, giving up the surplus ones.

    Entries whose pages others share get pages of their own. False, with nothing changed, if there
    are too few for that.
    """
    table, pool = kv.table, kv.pool
    shared = entries[:0]
    if pool.any_shared:
        shared = entries[pool.refcount[table.flat_pages[entries]] > 1]
        if len(shared) > pool.num_free + np.count_nonzero(pool.refcount[surplus] == 1):
            return False
    k, v = (x.index_select(0, source) for x in (kv.k_tokens, kv.v_tokens))
    pool.release(surplus)
    if len(shared):
        old = table.flat_pages[shared]
        table.set_pages(shared, pool.allocate(len(shared)))
        pool.release(old)
    target = to_device(table.flat_pages[entries].astype(np.int64), table.device)
    for stored, tokens in ((pool.k_pages, k), (pool.v_pages, v)):
        stored.index_copy_(0, target, tokens.view(-1, *stored.shape[1:]))
    return True


def shorten(kv: KVStore, slots: NDArray[np.int64], keep: NDArray[np.int32]) -> None:
    """Cut the ends off all rows of slots, whose pages nobody shares; surplus pages are free.

    Args:
        kv: the store.
        slots: different ones, [N].
        keep: how many tokens stay at the front of each row, [N, L, H].
    """
    table, kept = kv.table, kv.table.kept[slots]
    assert (keep <= kept).all(), "rows do not store that many"
    stay = table.num_pages(keep)
    surplus = table.num_pages(kept) - stay
    first = table.first_entry[slots] + stay
    kv.pool.release(table.flat_pages[spans(first.reshape(-1), surplus.reshape(-1))])
    table.set_kept(slots, keep)
