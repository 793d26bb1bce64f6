"""Rows of several slots are read and compacted together, each as it would be alone.

Plain lists of tokens are the oracle; values are compared exactly, since they are only moved.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saqqara.workers.kv.rows import Rows, compact_rows, read_rows
from saqqara.workers.kv.store import KVStore

SLOTS, LAYERS, HEADS, DIM = 4, 2, 3, 2


def make_store(page_tokens: int, mirrored: bool, num_pages: int = 800) -> KVStore:
    return KVStore(
        num_layers=LAYERS,
        num_heads=HEADS,
        num_slots=SLOTS,
        num_pages=num_pages,
        page_tokens=page_tokens,
        max_row_tokens=64,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
        mirrored=mirrored,
    )


def fill(store: KVStore, slot: int, lengths: list[int], rng: np.random.Generator) -> None:
    """Give head i of every layer `lengths[i]` random tokens."""
    n = max(lengths)
    indices = [torch.arange(length) for length in lengths]
    for layer in range(LAYERS):
        k, v = (torch.from_numpy(rng.standard_normal((n, HEADS, DIM))).float() for _ in range(2))
        assert store.write(slot, layer, k, v, indices)


def contents(store: KVStore) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
    return {
        (slot, layer, head): store.read(slot, layer, head)
        for slot in range(SLOTS)
        for layer in range(LAYERS)
        for head in range(HEADS)
    }


@settings(max_examples=60)
@given(
    page_tokens=st.sampled_from([1, 3, 4]),
    length=st.integers(1, 30),
    data=st.data(),
    seed=st.integers(0, 1000),
    mirrored=st.booleans(),
    forked=st.booleans(),
)
def test_rows_of_one_length_are_compacted_together(
    page_tokens: int, length: int, data: st.DataObject, seed: int, mirrored: bool, forked: bool
) -> None:
    rng = np.random.default_rng(seed)
    store = make_store(page_tokens, mirrored)
    fill(store, 0, [length, length + 2, length], rng)
    fill(store, 2, [length, length, length], rng)
    fill(store, 3, [5, length, 9], rng)
    if forked:
        store.fork(2, 1)
    rows = Rows(1, np.array([0, 0, 2, 2, 3]), np.array([0, 2, 1, 0, 1]))
    before, free_before = contents(store), store.pages_free
    k, v = read_rows(store, rows)
    keep = data.draw(st.integers(1, length))
    head = data.draw(st.integers(0, keep))  # that all of them keep in front
    rest = [np.sort(rng.permutation(length - head)[: keep - head]) + head for _ in range(5)]
    chosen = torch.from_numpy(np.stack([np.append(np.arange(head), row) for row in rest]))
    stays = chosen == torch.arange(keep)
    num_fixed = data.draw(st.integers(0, int(stays.all(0).long().cumprod(0).sum())))
    assert compact_rows(store, rows, chosen, num_fixed)
    store.check_integrity()
    for i, (slot, head) in enumerate(zip(rows.slots.tolist(), rows.heads.tolist(), strict=True)):
        old_k, old_v = before.pop((slot, 1, head))
        assert torch.equal(k[i], old_k)
        assert torch.equal(v[i], old_v)
        new_k, new_v = store.read(slot, 1, head)
        assert torch.equal(new_k, old_k[chosen[i]])
        assert torch.equal(new_v, old_v[chosen[i]])
    for (slot, layer, head), (old_k, old_v) in before.items():
        new_k, new_v = store.read(slot, layer, head)
        assert torch.equal(new_k, old_k)
        assert torch.equal(new_v, old_v)
    if not forked:
        returned = 5 * (-(-length // page_tokens) - -(-keep // page_tokens))
        assert store.pages_free == free_before + returned
    for slot in (0, 1, 2, 3):
        store.free(slot)
    store.check_integrity()
    assert store.pages_free == store.num_pages


def test_shared_pages_without_room_for_copies_change_nothing() -> None:
    store = make_store(4, mirrored=True)
    fill(store, 0, [8, 8, 8], np.random.default_rng(0))
    store.fork(0, 1)
    store.pool.allocate(store.pages_free - 2)
    before = contents(store)
    rows = Rows(0, np.array([0, 0, 0]), np.array([0, 1, 2]))
    assert not compact_rows(store, rows, torch.arange(1, 5).expand(3, -1))
    assert all(
        torch.equal(torch.cat(before[row]), torch.cat(now)) for row, now in contents(store).items()
    )
    assert store.pages_free == 2


def test_rows_of_different_lengths_are_refused() -> None:
    store = make_store(4, mirrored=False)
    fill(store, 0, [8, 7, 8], np.random.default_rng(0))
    with pytest.raises(AssertionError, match="different lengths"):
        read_rows(store, Rows(0, np.array([0, 0]), np.array([0, 1])))
