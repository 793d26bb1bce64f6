"""Proof that every page has exactly the owners that the tables say."""

import numpy as np
from numpy.typing import NDArray

from .pool import PagePool
from .ring import Rings
from .table import RowTable


def check_integrity(
    table: RowTable, pool: PagePool, rings: Rings, elsewhere: NDArray[np.int32]
) -> None:
    """Check lengths, owners, reference counts, the free stack and the device's copies.

    `elsewhere` are the pages that others than rows hold, once for each that holds it.

    Raises:
        AssertionError: what does not match.
    """
    _require((table.kept >= 0).all(), "a row keeps fewer than 0 tokens")
    too_long = np.argwhere(table.kept > table.max_row_tokens)
    _require(not len(too_long), f"rows longer than {table.max_row_tokens}: {too_long[:5]}")
    if rings.window:
        held, full = table.kept[:, rings.windowed], np.minimum(rings.seen, rings.window)
        unlike = np.argwhere((held != 0) & (held != full[:, None, None]))
        _require(not len(unlike), f"rows with a window are no rings of {full}: {unlike[:5]}")
    owned = table.flat_pages[table.used_entries(table.first_entry, table.kept)]
    valid = (owned >= 0) & (owned < pool.num_pages)
    _require(valid.all(), f"page ids out of range: {owned[~valid][:5]}")
    owners = np.concatenate((owned, elsewhere))
    references = np.bincount(owners, minlength=pool.num_pages)
    wrong = np.flatnonzero(references != pool.refcount)
    _require(
        not len(wrong),
        f"pages {wrong[:5]} have {references[wrong[:5]]} owners but reference counts"
        f" {pool.refcount[wrong[:5]]}",
    )
    free = pool.free_pages
    _require((free >= 0).all(), f"page ids on the free stack out of range: {free[free < 0][:5]}")
    on_stack = np.bincount(free, minlength=pool.num_pages)
    if not np.array_equal(on_stack, references == 0):
        raise AssertionError(
            f"{len(free)} pages on the free stack ({np.count_nonzero(on_stack)} different), but"
            f" {np.count_nonzero(references == 0)} pages have no owner"
        )
    _require(
        pool.any_shared == bool((references > 1).any()),
        f"any_shared is {pool.any_shared}, the tables say otherwise",
    )
    if table.mirror is not None:
        same = np.array_equal(table.device_kept.cpu().numpy(), table.kept)
        _require(same, "lengths on the device differ from the host's")
        entries, begins = table.flat_rows(table.first_entry.reshape(-1))
        places = table.used_entries(begins, table.kept)
        same = np.array_equal(entries.cpu().numpy()[places], owned)
        same &= np.array_equal(table.mirror.first.cpu().numpy().reshape(-1), begins)
        _require(same, "page tables on the device differ from the host's")


def _require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise AssertionError(message)
