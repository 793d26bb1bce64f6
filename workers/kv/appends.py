"""Where new tokens go: their places in the pages of rows that have been lengthened for them.

Shapes: T new tokens of all sequences, N sequences, L local layers, H local kv heads.
"""

import numpy as np
from numpy.typing import NDArray

from saqqara.workers.transfer import to_device

from .pool import PagePool
from .ring import Rings
from .spans import spans
from .table import RowTable
from .view import AppendPlan

Ints = NDArray[np.int64]


def append_plan(
    table: RowTable,
    rings: Rings,
    slots: Ints,
    num_new: Ints,
    first: Ints,
    before: NDArray[np.int32],
    after: NDArray[np.int32],
) -> AppendPlan:
    """The plan of a step whose tokens the rows have been lengthened for.

    Args:
        table: the rows, with pages for all new tokens.
        rings: of the same rows; they have seen the new tokens.
        slots: different slots, [N].
        num_new: new tokens of each, [N].
        first: first table entries of their rows, [N, L, H].
        before: lengths without the new tokens, [N, L, H].
        after: lengths with them, [N, L, H].
    """
    position, nth, seen = before, np.zeros_like(slots), rings.seen[slots] - num_new
    if len(slots) < num_new.sum():
        sequence = np.repeat(np.arange(len(slots)), num_new)
        nth = spans(nth, num_new)
        first, seen = first[sequence], seen[sequence]
        position = before[sequence] + nth.astype(np.int32)[:, None, None]
    if rings.window:
        position = rings.positions(seen, nth, position)
    page_tokens = np.int32(table.page_tokens)
    column = position // page_tokens  # [T, L, H]
    pages = table.flat_pages.take(first + column)
    refs = pages * np.int64(page_tokens) + (position - column * page_tokens)
    survivors = None
    if rings.window and num_new.max() > rings.window:
        stays = nth >= np.repeat(num_new, num_new) - rings.window
        refs[np.ix_(~stays, rings.windowed)] = -1
        survivors = to_device(np.flatnonzero(stays), table.device)
    lengths = np.ascontiguousarray(after.transpose(1, 0, 2))
    return AppendPlan(
        slots=slots,
        num_new=num_new,
        refs=to_device(np.ascontiguousarray(refs.transpose(1, 0, 2)), table.device),
        lengths=to_device(lengths, table.device),
        max_lengths=tuple(lengths.reshape(len(lengths), -1).max(axis=1).tolist()),
        before=before.transpose(1, 0, 2),
        device_slots=to_device(slots, table.device),
        survivors=survivors,
    )


def shared_tails(
    table: RowTable,
    pool: PagePool,
    rings: Rings,
    slots: Ints,
    num_new: Ints,
    kept: NDArray[np.int32],
) -> Ints:
    """Table entries of filled pages that must be copied before rows append to them.

    They are partly filled last pages, and those of rings of which tokens are overwritten. Where all
    rows that share a page are among these, one of them keeps it.

    Args:
        table: the rows.
        pool: their pages.
        rings: of the same rows; they have not seen the new tokens yet.
        slots: different slots, [N].
        num_new: new tokens of each, [N].
        kept: lengths without the new tokens, [N, L, H].
    """
    first = table.first_entry[slots]
    partial = kept % np.int32(table.page_tokens) != 0
    partial[:, rings.windowed] = False
    parts = [first[partial] + kept[partial] // np.int32(table.page_tokens)]
    if rings.window:
        for n, (slot, num) in enumerate(zip(slots.tolist(), num_new.tolist(), strict=True)):
            columns = rings.touched(slot, num, table.page_tokens)
            parts.append((first[n, rings.windowed][..., None] + columns).reshape(-1))
    entries = np.concatenate(parts)
    pages = table.flat_pages[entries]
    shared = pool.refcount[pages] > 1
    entries, pages = entries[shared], pages[shared]
    ids, where, count = np.unique(pages, return_index=True, return_counts=True)
    keepers = where[count == pool.refcount[ids]]
    return np.delete(entries, keepers)
