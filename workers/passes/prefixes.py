"""What a prefill knows of prompts before it: their first tokens' keys and values.

Of a prompt that begins with cached blocks only the tokens behind these are computed. In each layer
their queries see the blocks' keys, and retention chooses from all, so what is kept is as if the
whole prompt were computed. The same goes for the next turn of a conversation, which begins with
what its slot's rows have kept of the turns before; where rows of one layer differ in length, their
keys end together (`uneven.py`). And prompts fill blocks for later ones.

Shapes: T packed fresh tokens, S packed tokens with the cached ones, N prompts, L local layers, Hq
local query heads, H local kv heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.kv.prompts import empty_rows, read_prompt
from saqqara.workers.kv.spans import spans
from saqqara.workers.models.layer import QKV
from saqqara.workers.shard import Shard
from saqqara.workers.transfer import to_device

from .parked import ParkedPrefill, ResumedRows


@dataclass(frozen=True, slots=True)
class Keyed:
    """Fresh queries of a group in one layer, and all keys and values that these may see.

    Attributes:
        qkv: queries [T, Hq, D], keys [S, H, D], values [S, H, D].
        cu_q: where each prompt's queries begin, which are those of its last tokens.
        cu_k: where each prompt's keys begin.
        num_before: of each prompt, tokens that have no key here: they are out of every window, or
            were not kept.
        pads: of each prompt whose rows differ in length, so many of the first keys of each kv head
            are nobody's, int64 [H]; None: all are tokens'.
    """

    qkv: QKV
    cu_q: CuSeqlens
    cu_k: CuSeqlens
    num_before: tuple[int, ...]
    pads: tuple[NDArray[np.int64] | None, ...]

    def prompts(self) -> list[QKV]:
        """Views of each prompt: its last queries, its keys and its values."""
        q, k, v = self.qkv
        return [
            QKV(q[first:last], k[start:stop], v[start:stop])
            for (first, last), (start, stop) in zip(
                pairwise(self.cu_q.host), pairwise(self.cu_k.host), strict=True
            )
        ]


class Prefixes:
    """Reads and fills the blocks of a shard as prefill goes through its layers."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._part = shard.part

    def num_reused(self, slot: int) -> int:
        """First tokens of a prompt that are not computed, in layers that all tokens enter."""
        return self._shard.slots[slot].num_reused(self._shard.kv.page_tokens)

    def entering(self, slot: int) -> tuple[int, ...]:
        """How many tokens of a prompt enter each layer of the model, known ones included."""
        held = self._shard.slots[slot]
        return held.retention.entering_tokens(held.prompt_tokens, self._part.spec.layers)

    def cut(self, slot: int) -> int | None:
        """The lowest layer that does not pass on all tokens of a prompt; None: there is none."""
        held = self._shard.slots[slot]
        if held.retention.propagate is None:
            return None
        num_layers = self._part.spec.num_layers
        return held.retention.propagate.first_cut(held.prompt_tokens, num_layers)

    def cached_pages(self, family: Sequence[int], layer: int) -> NDArray[np.int32]:
        """The pages of the blocks that a family's prompt begins with, [blocks, L, H].

        There are none for a layer that not all tokens enter.
        """
        slots = [self._shard.slots[slot] for slot in family]
        if num_reused := self.num_reused(family[0]):
            assert num_reused < slots[0].prompt_tokens, f"nothing is left of slot {family[0]}"
            assert not any(slot.scores_prompt for slot in slots), "unknown logits get scores"
        enter_all = self.entering(family[0])[layer] == slots[0].prompt_tokens
        return self._shard.blocks.pages_of(slots[0].prefix.cached if enter_all else ())

    def resumed_rows(self, slot: int) -> ResumedRows | None:
        """The rows that a slot's prompt goes on behind; None: it does not.

        Rings are taken out of them: how many tokens a ring has seen is one number for all layers,
        which are written one after the other.
        """
        shard, kv = self._shard, self._shard.kv
        if not shard.slots[slot].resumed_tokens:
            return None
        nothing = np.zeros((kv.num_layers, kv.num_heads), dtype=np.int32)  # of a slot at fault
        rings, counts = {}, shard.resumed.get(slot, nothing)
        for layer in kv.rings.windowed.tolist():
            shape = (int(counts[layer, 0]), kv.num_heads, kv.pool.k_pages.shape[-1])
            k, v = (kv.pool.k_pages.new_zeros(shape) for _ in range(2))
            if slot not in shard.faults.refused:
                read_prompt(kv, slot, layer, k, v)
                empty_rows(kv, layer, slot)
            rings[layer] = k, v
        return ResumedRows(counts, rings)

    def before(self, local_layer: int, parked: ParkedPrefill, qkv: QKV) -> Keyed:
        """Fresh queries, keys and values of a group, with what is known before the latter."""
        if not parked.reuses:
            num = len(parked.families)
            return Keyed(qkv, parked.cu, parked.cu, (0,) * num, (None,) * num)
        page_tokens = self._shard.kv.page_tokens
        pages = [self._seen(local_layer, of_prompt) for of_prompt in parked.cached]
        num_known = [
            len(of_prompt) * page_tokens if rows is None else int(rows.counts[local_layer].max())
            for of_prompt, rows in zip(pages, parked.resumed, strict=True)
        ]
        num_keys = [known + new for known, new in zip(num_known, parked.cu.lengths, strict=True)]
        cu_k = CuSeqlens.of(num_keys, self._part.device)
        k, v = (x.new_empty(sum(num_keys), *x.shape[1:]) for x in (qkv.k, qkv.v))
        whole = [self._shard.slots[slot].prompt_tokens for slot in parked.families]
        num_before = tuple(tokens - keys for tokens, keys in zip(whole, num_keys, strict=True))
        pads = tuple(_pads(rows, local_layer) for rows in parked.resumed)
        keyed = Keyed(QKV(qkv.q, k, v), parked.cu, cu_k, num_before, pads)
        if len(parked.families) > 1 and all(rows is None for rows in parked.resumed):
            self._join(local_layer, pages, qkv, keyed)
            return keyed
        prompts = zip(parked.families, parked.resumed, num_known, pages, strict=True)
        bounds = zip(pairwise(cu_k.host), pairwise(parked.cu.host), strict=True)
        for (slot, rows, known, of_prompt), ((start, stop), (first, last)) in zip(
            prompts, bounds, strict=True
        ):
            place, new = slice(start, start + known), slice(start + known, stop)
            if rows is not None:
                self._read_rows(slot, local_layer, rows, k[place], v[place])
            elif known:
                self._shard.blocks.read(of_prompt, local_layer, k[place], v[place])
            k[new], v[new] = qkv.k[first:last], qkv.v[first:last]
        return keyed

    def _join(
        self, local_layer: int, pages: list[NDArray[np.int32]], qkv: QKV, keyed: Keyed
    ) -> None:
        """Put blocks before fresh tokens, of all prompts together: few launches of kernels."""
        num_known = np.array([len(of_prompt) for of_prompt in pages]) * self._shard.kv.page_tokens
        starts, new = np.array(keyed.cu_k.host[:-1]), np.array(keyed.cu_q.lengths)
        known_k, known_v = (x.new_empty(int(num_known.sum()), *x.shape[1:]) for x in qkv[1:])
        self._shard.blocks.read(np.concatenate(pages), local_layer, known_k, known_v)
        device = qkv.k.device
        of_known = to_device(spans(starts, num_known), device)
        of_new = to_device(spans(starts + num_known, new), device)
        for to, known, fresh in ((keyed.qkv.k, known_k, qkv.k), (keyed.qkv.v, known_v, qkv.v)):
            to.index_copy_(0, of_known, known)
            to.index_copy_(0, of_new, fresh)

    def parts(self, parked: ParkedPrefill) -> list[tuple[slice, ParkedPrefill]]:
        """A group in parts whose keys are about as many as those of a group without known tokens.

        Returns:
            The parts, and which of the group's tokens are theirs.
        """
        if not parked.reuses:
            return [(slice(0, parked.num_tokens), parked)]
        page_tokens, slots = self._shard.kv.page_tokens, self._shard.slots
        reused = [
            len(pages) * page_tokens or slots[slot].resumed_tokens
            for slot, pages in zip(parked.families, parked.cached, strict=True)
        ]
        return parked.parts(self._part.config.max_prefill_tokens, reused)

    def _read_rows(
        self, slot: int, local_layer: int, rows: ResumedRows, k: Tensor, v: Tensor
    ) -> None:
        """Copy what a slot's rows keep in a layer; of a refused slot zeros stand for it."""
        if local_layer in rows.rings:
            for to, held in zip((k, v), rows.rings[local_layer], strict=True):
                to.copy_(held)
        elif slot in self._shard.faults.refused:
            k.zero_()
            v.zero_()
        else:
            read_prompt(self._shard.kv, slot, local_layer, k, v)

    def _seen(self, local_layer: int, pages: NDArray[np.int32]) -> NDArray[np.int32]:
        """The last of a prompt's blocks, as many as the queries after them see in a layer."""
        window = self._part.windows[local_layer]
        if not window:
            return pages
        num_seen = -(-(window - 1) // self._shard.kv.page_tokens)
        return pages[max(0, len(pages) - num_seen) :]

    def store(self, local_layer: int, parked: ParkedPrefill, qkv: QKV) -> None:
        """Fill the blocks that the group's prompts store in a layer, from its fresh tokens.

        Whether a prompt's own rows fit does not matter. Behind its first cut it stores nothing.
        """
        shard, layer = self._shard, local_layer + self._part.layers.start
        for leader, start in zip(parked.families, parked.cu.host, strict=False):
            enter_all = self.entering(leader)[layer] == shard.slots[leader].prompt_tokens
            if enter_all and (stored := self.stored(leader)):
                place = slice(start, start + len(stored) * shard.kv.page_tokens)
                shard.blocks.write(stored, local_layer, qkv.k[place], qkv.v[place])

    def store_rows(self, parked: ParkedPrefill) -> None:
        """Fill the same blocks in all layers, from rows that have the whole prompts by now."""
        for leader, cached in zip(parked.families, parked.cached, strict=True):
            if stored := self.stored(leader):
                self._shard.blocks.copy_rows(stored, leader, len(cached))

    def stored(self, leader: int) -> tuple[int, ...]:
        """The blocks that a prompt fills; a slot refused for want of their pages holds none."""
        stored = self._shard.slots[leader].prefix.stored
        return stored if self._shard.blocks.holds(stored) else ()


def _pads(rows: ResumedRows | None, local_layer: int) -> NDArray[np.int64] | None:
    """By how much the rows of a layer are shorter than the longest, [H]; None: all are as long."""
    if rows is None:
        return None
    counts = rows.counts[local_layer].astype(np.int64)
    pads: NDArray[np.int64] = counts.max() - counts
    return pads if pads.any() else None
