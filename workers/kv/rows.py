"""Reading and compacting rows of one layer of many slots at once.

Shapes: R rows of one layer, n stored tokens of each, D head dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device

from .spans import spans
from .store import KVStore


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


def compact_rows(kv: KVStore, rows: Rows, indices: Tensor) -> bool:
    """Keep only some tokens of rows of one length, in place; surplus pages are free at once.

    Args:
        kv: the store.
        rows: which rows.
        indices: storage positions that each keeps, ascending, int64 [R, keep]; with neither a
            window nor sinks a row's share of the budget may be nothing.

    Returns:
        False, with nothing changed, if pages that are shared with other slots would have to be
        copied and the free ones do not suffice.
    """
    table, pool, page_tokens = kv.table, kv.pool, kv.page_tokens
    first = table.first_entry[rows.slots, rows.layer, rows.heads]
    kept = table.kept[rows.slots, rows.layer, rows.heads]
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
    elif not _rewrite(kv, entries, surplus, _places(kv, rows, indices, num_used)):
        return False
    table.set_rows_kept(rows.slots, rows.layer, rows.heads, keep)
    return True


def _places(kv: KVStore, rows: Rows, indices: Tensor, num_used: int) -> Tensor:
    """Where the tokens `indices` [R, keep] of rows of so many pages lie, in the flat pool.

    Each row is filled up to whole pages with its last token, so that no stale NaN stays in them.
    """
    keep, page_tokens = indices.shape[1], kv.page_tokens
    last = indices[:, -1:].expand(-1, -keep % page_tokens)
    places = torch.cat([indices, last], dim=1)
    column = places // page_tokens
    pages = rows.pages(kv, num_used).gather(1, column)
    return ((pages - column) * page_tokens + places).view(-1)


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
