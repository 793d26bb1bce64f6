"""Reading and compacting rows of one layer of many slots at once.

Shapes: R rows of one layer, n stored tokens of each, D head dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device

from .store import KVStore
from .table import spans


@dataclass(frozen=True, slots=True)
class Rows:
    """Different rows of one local layer: row i is `(slots[i], layer, heads[i])`, int64 [R] each."""

    layer: int
    slots: NDArray[np.int64]
    heads: NDArray[np.int64]

    def pages(self, kv: KVStore, num_pages: int) -> Tensor:
        """The first pages of each row, int64 [R, num_pages] on the device."""
        table = kv.table
        slots, heads = to_device(self.slots, table.device), to_device(self.heads, table.device)
        return table.device_pages[slots, self.layer, heads, :num_pages].long()


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
    table, pool, page_tokens = kv.table, kv.pool, kv.page_tokens
    fixed_pages = num_fixed // page_tokens
    fixed = fixed_pages * page_tokens
    first = table.first_entry[rows.slots, rows.layer, rows.heads] + fixed_pages
    kept = table.kept[rows.slots, rows.layer, rows.heads] - fixed
    indices = indices[:, fixed:] - fixed
    num_rows, keep = indices.shape
    assert (kept == kept[0]).all(), f"rows of different lengths: {kept}"
    assert keep <= kept[0], f"{keep} of {kept[0]} tokens"
    num_used, num_keep = -(-int(kept[0]) // page_tokens), -(-keep // page_tokens)
    entries = (first[:, None] + np.arange(num_keep)).reshape(-1)
    surplus = table.flat_pages[spans(first + num_keep, np.full(num_rows, num_used - num_keep))]
    if keep == 0:
        pool.release(surplus)
    elif kv.moves is not None and not pool.any_shared:
        kv.moves.compact(first, indices.reshape(-1), np.full(num_rows, keep, dtype=np.int32))
        pool.release(surplus)
    else:
        pages = rows.pages(kv, fixed_pages + num_used)[:, fixed_pages:]
        if not _rewrite(kv, entries, surplus, _places(indices, pages, page_tokens)):
            return False
    table.set_rows_kept(rows.slots, rows.layer, rows.heads, fixed + keep)
    return True


def _places(indices: Tensor, pages: Tensor, page_tokens: int) -> Tensor:
    """Where the tokens `indices` [R, keep] of rows with these pages lie, in the flat pool.

    Each row is filled up to whole pages with its last token, so that no stale NaN stays in them.
    """
    last = indices[:, -1:].expand(-1, -indices.shape[1] % page_tokens)
    places = torch.cat([indices, last], dim=1)
    column = places // page_tokens
    return ((pages.gather(1, column) - column) * page_tokens + places).view(-1)


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
