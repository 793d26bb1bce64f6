"""Writing what is kept of several prompts of one layer, with one launch where kernels do it.

Shapes: T packed tokens, N sequences, H kv heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device

from .moves import KernelMoves
from .spans import padded, spans
from .store import KVStore


@dataclass(frozen=True, slots=True)
class PromptWrite:
    """What one slot keeps of a prompt in one layer.

    Attributes:
        slot: the slot; its rows in this layer must be empty, but for `num_kept` tokens.
        start: where the prompt begins among the packed tokens.
        num_tokens: of the prompt that are packed: all, or in a layer with a window the last ones,
            no fewer than are kept.
        indices: which of its tokens each head keeps, in order: int64 [H, keep], or one int64 tensor
            per head; None for all, or as many of the last as the layer's window has.
        num_before: tokens of the prompt that are not packed.
        num_kept: of the packed tokens, so many first ones are all that the rows have already; with
            `indices` they are written anew, else the others are appended.
        shared: pages that have the prompt's first tokens, [pages, H]; the rows, which keep all
            tokens, hold these themselves and only the other tokens are written. None: no such.
    """

    slot: int
    start: int
    num_tokens: int
    indices: Tensor | Sequence[Tensor] | None
    num_before: int = 0
    num_kept: int = 0
    shared: NDArray[np.int32] | None = None

    @property
    def seen(self) -> int:
        """Tokens of the whole prompt."""
        return self.num_before + self.num_tokens

    def counts(self, num_heads: int) -> NDArray[np.int32]:
        """How many tokens each head keeps, [H]."""
        if self.indices is None:
            return np.full(num_heads, self.num_tokens, dtype=np.int32)
        return np.array([len(head) for head in self.indices], dtype=np.int32)


def write_prompts(
    kv: KVStore, layer: int, k: Tensor, v: Tensor, writes: Sequence[PromptWrite]
) -> int:
    """Store the selected tokens of one layer of different slots, in order, as far as pages suffice.

    Args:
        kv: the store.
        layer: local layer.
        k: keys of all prompts, [T, H, D].
        v: values, [T, H, D].
        writes: of different slots.

    Returns:
        How many were written: all, or those before the first for which there are too few pages.
    """
    if kv.moves is not None and not any(write.num_kept for write in writes):
        return _write_together(kv, kv.moves, layer, k, v, writes)
    for done, write in enumerate(writes):
        prompt = slice(write.start, write.start + write.num_tokens)
        of_prompt = k[prompt], v[prompt]
        if write.shared is not None:
            fits = _write_rest(kv, layer, *of_prompt, write, write.shared)
        elif write.num_kept and write.indices is None:
            new_k, new_v = (x[write.num_kept :] for x in of_prompt)
            fits = _append(kv, layer, new_k, new_v, write.slot)
        else:
            if write.num_kept:
                empty_rows(kv, layer, write.slot)
            fits = kv.write(write.slot, layer, *of_prompt, write.indices, write.num_before)
        if not fits:
            return done
    return len(writes)


def _is_special(write: PromptWrite) -> bool:
    """Whether rows do not begin empty."""
    return write.shared is not None or write.num_kept > 0


def empty_rows(kv: KVStore, layer: int, slot: int) -> None:
    """Give up what a slot's rows hold in a layer."""
    table, one = kv.table, np.array([slot])
    held = table.used_entries(table.first_entry[slot, layer], table.kept[slot, layer])
    kv.pool.release(table.flat_pages[held])
    table.set_layer_kept(one, layer, np.zeros((1, kv.num_heads), dtype=np.int32))


def read_prompt(kv: KVStore, slot: int, layer: int, k: Tensor, v: Tensor) -> None:
    """Copy what the rows of a slot keep in a layer; of unequal length, they end together.

    Args:
        kv: the store.
        slot: the slot.
        layer: local layer.
        k: receives the keys in the order of the text, [longest, H, D]. What stands before those of
            a shorter row means nothing.
        v: receives the values, [longest, H, D].
    """
    table, (num_tokens, num_heads, dim) = kv.table, k.shape
    kept = table.kept[slot, layer]
    assert kept.max() == num_tokens, f"rows of {kept} tokens, not {num_tokens}"
    rows = np.full(num_heads, slot), layer, np.arange(num_heads)
    pages = table.row_pages(*rows, -(-num_tokens // kv.page_tokens)).long().view(-1)
    is_even = bool((kept == num_tokens).all())
    if not is_even:
        room = -(-num_tokens // kv.page_tokens) * kv.page_tokens
        place_TH = np.arange(num_tokens)[:, None] - (num_tokens - kept)
        source_TH = np.maximum(place_TH, 0) + np.arange(num_heads) * room
        source = to_device(source_TH.reshape(-1), table.device)
    for stored, tokens in ((kv.pool.k_pages, k), (kv.pool.v_pages, v)):
        if not is_even:
            found = stored.index_select(0, pages).view(-1, dim)
            tokens.copy_(found.index_select(0, source).view(tokens.shape))
            continue
        found = stored.index_select(0, pages).view(num_heads, -1, dim)[:, :num_tokens]
        if layer in kv.rings:
            places, _ = kv.rings.in_order(kv.rings.seen[[slot]])
            found = found.index_select(1, to_device(places, table.device))
        tokens.copy_(found.transpose(0, 1))


def _append(kv: KVStore, layer: int, k: Tensor, v: Tensor, slot: int) -> bool:
    """Store new tokens, k and v [n, H, D], behind those that rows of any length have."""
    table, pool, (num_new, _, dim) = kv.table, kv.pool, k.shape
    assert layer not in kv.rings, "places of rings are written anew"
    before, first = table.kept[slot, layer].copy(), table.first_entry[slot, layer]
    after = before + np.int32(num_new)
    assert after.max() <= table.max_row_tokens, (after.max(), table.max_row_tokens)
    used = table.num_pages(before)
    needed = table.num_pages(after) - used
    if needed.sum() > kv.pages_free:
        return False
    partial = before % kv.page_tokens != 0
    tails = table.flat_pages[(first + used - 1)[partial]]
    assert (pool.refcount[tails] == 1).all(), f"slot {slot} shares pages that are not full"
    pages = pool.allocate(int(needed.sum()))
    table.set_pages(spans(first + used, needed), pages)
    pool.clear(to_device(pages.astype(np.int64), table.device))
    table.set_layer_kept(np.array([slot]), layer, after[None])
    place = before + np.arange(num_new)[:, None]  # [n, H]
    page = table.flat_pages[first + place // kv.page_tokens].astype(np.int64)
    refs = to_device(page * kv.page_tokens + place % kv.page_tokens, table.device)
    if kv.moves is not None:
        kv.moves.append(k, v, refs)
        return True
    for stored, tokens in ((kv.k_tokens, k), (kv.v_tokens, v)):
        stored.index_copy_(0, refs.view(-1), tokens.reshape(-1, dim))
    return True


def _write_rest(
    kv: KVStore,
    layer: int,
    k: Tensor,
    v: Tensor,
    write: PromptWrite,
    shared: NDArray[np.int32],
) -> bool:
    """Store a whole prompt, k and v [n, H, D], behind pages that others have filled."""
    table, pool, (num_tokens, num_heads, dim) = kv.table, kv.pool, k.shape
    slot, front = np.array([write.slot]), len(shared)
    assert layer not in kv.rings, "rings share no pages"
    assert write.indices is None, "rows that share pages keep all tokens"
    assert not table.kept[slot, layer].any(), f"slot {slot}, layer {layer} is not empty"
    k, v = (x[front * kv.page_tokens :] for x in (k, v))
    counts = np.full(num_heads, len(k), dtype=np.int32)
    needed = table.num_pages(counts)
    if needed.sum() > kv.pages_free:
        return False
    pages = pool.allocate(int(needed.sum()))
    pool.share(shared.reshape(-1))
    of_rows = np.concatenate([shared.T, pages.reshape(num_heads, -1)], axis=1)
    table.set_pages(spans(table.first_entry[slot, layer][0], front + needed), of_rows.reshape(-1))
    table.set_layer_kept(slot, layer, np.full((1, num_heads), num_tokens, dtype=np.int32))
    if kv.moves is not None:
        heads = np.arange(num_heads)
        kv.moves.fill(pages, counts, heads, np.zeros_like(heads), k, v, None)
        return True
    nth, head = padded(counts, needed * kv.page_tokens)
    source = to_device(nth * num_heads + head, table.device)
    kv.fill_pages(pages, k.reshape(-1, dim), v.reshape(-1, dim), source)
    return True


def begin_with(kv: KVStore, slot: int, pages: NDArray[np.int32], *, is_shared: bool) -> bool:
    """Let all rows of an empty slot begin with full pages, or with copies of them.

    Args:
        kv: the store, of layers without windows.
        slot: the slot.
        pages: of the first tokens, in order, [pages, L, H].
        is_shared: the rows hold these pages themselves.

    Returns:
        False, with nothing changed, if there are too few pages for copies.
    """
    table, pool = kv.table, kv.pool
    assert not table.kept[slot].any(), f"slot {slot} is not empty"
    assert not kv.rings.window, "rows with a window begin anywhere"
    of_rows = pages.transpose(1, 2, 0).reshape(-1)
    if is_shared:
        pool.share(of_rows)
    else:
        if len(of_rows) > pool.num_free:
            return False
        copies = pool.allocate(len(of_rows))
        copy_pages(kv, of_rows, copies)
        of_rows = copies
    first = table.first_entry[slot].reshape(-1)
    table.set_pages(spans(first, np.full(len(first), len(pages))), of_rows)
    kept = np.full((1, *pages.shape[1:]), len(pages) * kv.page_tokens, dtype=np.int32)
    table.set_kept(np.array([slot]), kept)
    return True


def copy_pages(kv: KVStore, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
    """Copy what pages hold."""
    pages = (to_device(ids.astype(np.int64), kv.table.device) for ids in (source, target))
    from_pages, to_pages = pages
    for stored in (kv.pool.k_pages, kv.pool.v_pages):
        stored.index_copy_(0, to_pages, stored.index_select(0, from_pages))


def write_layers(
    kv: KVStore,
    first_layer: int,
    k_LTHD: Tensor,
    v_LTHD: Tensor,
    writes: Sequence[Sequence[PromptWrite]],
) -> bool:
    """`write_prompts` for adjacent layers at once, on a CPU.

    Args:
        kv: the store.
        first_layer: local number of the first one.
        k_LTHD: keys of all prompts in each layer.
        v_LTHD: values, likewise.
        writes: of each layer, [L].

    Returns:
        False, with nothing written, if there are too few pages for all, or if rows are to share
        pages or are not empty.
    """
    if any(_is_special(write) for of_layer in writes for write in of_layer):
        return False
    table, (num_layers, num_tokens, num_heads, dim) = kv.table, k_LTHD.shape
    assert len(writes) == num_layers, (len(writes), num_layers)
    flat = [
        (layer, write)
        for layer in range(num_layers)
        for write in _as_stored(kv, first_layer + layer, writes[layer])
    ]
    if not flat:
        return True
    counts_WH = np.stack([write.counts(num_heads) for _, write in flat])
    needed_WH = table.num_pages(counts_WH)
    if needed_WH.sum() > kv.pages_free:
        return False
    layers_W, starts_W, slots_W = (
        np.array(numbers, dtype=np.int64)
        for numbers in zip(*((layer, w.start, w.slot) for layer, w in flat), strict=True)
    )
    local_W = first_layer + layers_W
    assert not table.kept[slots_W, local_W].any(), f"slots {slots_W} are not empty"
    assert counts_WH.max() <= table.max_row_tokens, (counts_WH.max(), table.max_row_tokens)
    needed, counts = needed_WH.reshape(-1), counts_WH.reshape(-1)
    pages = kv.pool.allocate(int(needed.sum()))
    table.set_pages(spans(table.first_entry[slots_W, local_W].reshape(-1), needed), pages)
    for layer in np.unique(local_W).tolist():
        among = local_W == layer
        table.set_layer_kept(slots_W[among], layer, counts_WH[among])
    for layer, write in flat:
        kv.rings.start(first_layer + layer, write.slot, write.seen)
    nth, row = padded(counts, needed * kv.page_tokens)
    chosen = np.concatenate([tokens for _, write in flat for tokens in _tokens(write, num_heads)])
    of_write, head = row // num_heads, row % num_heads
    token = starts_W[of_write] + chosen[(np.cumsum(counts) - counts)[row] + nth]
    source = (layers_W[of_write] * num_tokens + token) * num_heads + head
    flat_k, flat_v = k_LTHD.view(-1, dim), v_LTHD.view(-1, dim)
    kv.fill_pages(pages, flat_k, flat_v, to_device(source, table.device))
    return True


def _tokens(write: PromptWrite, num_heads: int) -> list[NDArray[np.int64]]:
    """Which tokens of a prompt each head keeps."""
    if write.indices is None:
        return [np.arange(write.num_tokens, dtype=np.int64)] * num_heads
    return [head.numpy() for head in write.indices]


def _as_stored(kv: KVStore, layer: int, writes: Sequence[PromptWrite]) -> Sequence[PromptWrite]:
    """The writes with what rings keep of the prompts, in the order of their places."""
    if layer not in kv.rings:
        return writes
    assert all(write.indices is None for write in writes), "what rows with a window keep is given"
    return [
        replace(write, indices=kv.prompt_ring(write.seen, write.num_before)) for write in writes
    ]


def _write_together(
    kv: KVStore,
    moves: KernelMoves,
    layer: int,
    k: Tensor,
    v: Tensor,
    writes: Sequence[PromptWrite],
) -> int:
    table, num_heads = kv.table, k.shape[1]
    writes = _as_stored(kv, layer, writes)
    assert layer not in kv.rings or all(w.shared is None for w in writes), "rings share no pages"
    front_N = np.array([0 if w.shared is None else len(w.shared) for w in writes], dtype=np.int32)
    counts_NH = np.stack([write.counts(num_heads) for write in writes])
    counts_NH -= front_N[:, None] * np.int32(kv.page_tokens)
    needed_NH = table.num_pages(counts_NH)
    fits = np.cumsum(needed_NH.sum(axis=1, dtype=np.int64)) <= kv.pages_free
    fitting = int(np.count_nonzero(fits))  # pages only add up, so these are the first
    if fitting == 0:
        return 0
    writes, counts_NH, needed_NH = writes[:fitting], counts_NH[:fitting], needed_NH[:fitting]
    front_N = front_N[:fitting]
    slots = np.array([write.slot for write in writes], dtype=np.int64)
    assert not table.kept[slots, layer].any(), f"slots {slots}, layer {layer} are not empty"
    kept_NH = counts_NH + front_N[:, None] * np.int32(kv.page_tokens)
    assert kept_NH.max() <= table.max_row_tokens, (kept_NH.max(), table.max_row_tokens)
    needed = needed_NH.reshape(-1)
    pages = kv.pool.allocate(int(needed.sum()))
    first_NH = table.first_entry[slots, layer]
    table.set_pages(spans((first_NH + front_N[:, None]).reshape(-1), needed), pages)
    for write, first in zip(writes, first_NH, strict=True):
        if write.shared is not None:
            kv.pool.share(write.shared.reshape(-1))
            fronts = spans(first, np.full(num_heads, len(write.shared)))
            table.set_pages(fronts, write.shared.T.reshape(-1))
    table.set_layer_kept(slots, layer, kept_NH)
    for write in writes:
        kv.rings.start(layer, write.slot, write.seen)
    counts, heads = counts_NH.reshape(-1), np.tile(np.arange(num_heads), fitting)
    starts_N = [write.start for write in writes] + front_N * np.int64(kv.page_tokens)
    starts = np.repeat(starts_N, num_heads)
    is_whole = np.repeat([write.indices is None for write in writes], num_heads)
    for rows, indices in ((is_whole, None), (~is_whole, _concatenated(writes))):
        if rows.any():
            of_rows = pages[np.repeat(rows, needed)]
            moves.fill(of_rows, counts[rows], heads[rows], starts[rows], k, v, indices)
    return fitting


def _concatenated(writes: Sequence[PromptWrite]) -> Tensor | None:
    """The indices of all writes that select, head after head; None if none does."""
    parts: list[Tensor] = []
    for write in writes:
        if isinstance(write.indices, Tensor):
            parts.append(write.indices.reshape(-1))
        elif write.indices is not None:
            parts += write.indices
    return torch.cat(parts) if parts else None
