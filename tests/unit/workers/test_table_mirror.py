"""Page tables on a device: shorter than all rows at full length, and always those of the host."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saqqara.workers.fixed_sizes import (
    LEAST_ROOM,
    most_shared_entries,
    num_entries,
    pages_beside_tables,
)
from saqqara.workers.kv.mirror import TableMirror
from saqqara.workers.kv.prompts import begin_with
from saqqara.workers.kv.store import KVStore

WIDTH, ROWS, PAGES = 64, 4 * 1 * 3, 80  # entries of the longest row, all rows, pages of the pool
CPU = torch.device("cpu")


def test_rows_move_when_they_grow_and_read_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page ownership is proven, the device's entries included, after each of 150 changes."""
    size = 2 * PAGES + LEAST_ROOM * ROWS  # nothing to use up: rows move as often as they can
    assert size < num_entries(PAGES, ROWS, WIDTH)
    moves: list[TableMirror] = []
    move_together = TableMirror._move_together

    def counted(mirror: TableMirror, needed_R: NDArray[np.int64]) -> None:
        moves.append(mirror)
        move_together(mirror, needed_R)

    monkeypatch.setattr(TableMirror, "_move_together", counted)
    store = KVStore(
        1, 3, 4, PAGES, 1, WIDTH, 2, torch.float32, CPU, mirrored=True, mirror_entries=size
    )
    random = np.random.default_rng(0)
    for _ in range(150):
        slot = int(random.integers(4))
        longest = int(store.kept(slot).max())
        if longest == 0:
            k = torch.ones(WIDTH - 20, 3, 2)
            kept = [torch.arange(int(n)) for n in random.integers(0, WIDTH - 20, 3)]
            store.write(slot, 0, k, k, kept)
        elif longest > WIDTH - 9 or random.random() < 0.2:
            store.free(slot)
        else:
            store.begin_append(np.array([slot]), random.integers(1, 9, 1))
        store.check_integrity()
        view = store.view(np.array([slot]), 0)
        host = store.table.pages[slot, 0]
        for head, used in enumerate(view.lengths[0].tolist()):
            assert view.page_table[0, head, :used].tolist() == host[head, :used].tolist()
    assert len(moves) >= 3, "rows seldom moved together"


def test_rows_that_share_pages_have_entries_of_their_own() -> None:
    """As many as the scheduler lets there be, in rooms that are half used."""
    slots, length = 8, 17
    rows = 3 * slots
    most, size = most_shared_entries(PAGES, rows, WIDTH), num_entries(PAGES, rows, WIDTH)
    assert most is not None, "all rows at full length have their places"
    assert most_shared_entries(10 * PAGES, rows, WIDTH) is None
    store = KVStore(
        1, 3, slots, PAGES, 1, WIDTH, 2, torch.float32, CPU, mirrored=True, mirror_entries=size
    )
    k = torch.ones(length, 3, 2)
    store.write(0, 0, k, k)
    pages = store.table.pages[0, :, :, :length].transpose(2, 0, 1)
    sharing = range(1, 1 + most // pages.size)
    for slot in sharing:
        begin_with(store, slot, pages, is_shared=True)
    assert len(sharing) == 6
    for slot in sharing:
        assert store.begin_append(np.array([slot]), np.array([1])) is not None
        store.check_integrity()


def test_as_many_pages_as_fit_beside_their_entries() -> None:
    for num_bytes in (10_000, 50_000, 400_000, 10**7):
        for width in (1, 16, 4096):
            pages = pages_beside_tables(num_bytes, 512, 4, 12, width)

            def taken(count: int, width: int = width) -> int:
                return 512 * count + 4 * num_entries(count, 12, width)

            assert pages < 1 or taken(pages) <= num_bytes < taken(pages + 1)
