"""Blocks in a prefill: their keys and values before the fresh ones, and theirs from the fresh ones.

Of a prompt that begins with cached blocks only the tokens behind these are computed. In each layer
their queries see the blocks' keys, and retention chooses from all, so what is kept is as if the
whole prompt were computed.

Shapes: T packed fresh tokens, S packed tokens with the cached ones, N prompts, L local layers, Hq
local query heads, H local kv heads, D head dim.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.models.layer import QKV
from saqqara.workers.shard import Shard

from .parked import ParkedPrefill


@dataclass(frozen=True, slots=True)
class Keyed:
    """Fresh queries of a group in one layer, and all keys and values that these may see.

    Attributes:
        qkv: queries [T, Hq, D], keys [S, H, D], values [S, H, D].
        cu_q: where each prompt's queries begin, which are those of its last tokens.
        cu_k: where each prompt's keys begin.
        num_before: of each prompt, tokens before its first key, which are out of every window.
    """

    qkv: QKV
    cu_q: CuSeqlens
    cu_k: CuSeqlens
    num_before: tuple[int, ...]

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

    def cached_pages(self, leader: int) -> NDArray[np.int32]:
        """The pages of the blocks that a slot's prompt begins with, [blocks, L, H]."""
        held = self._shard.slots[leader]
        cached = held.prefix.cached
        if cached:
            computed = held.prompt_tokens - len(cached) * self._shard.kv.page_tokens
            assert computed > 0, f"blocks have all {held.prompt_tokens} tokens of slot {leader}"
            assert held.retention.propagate is None, "layers of a cached prefix drop tokens"
        return self._shard.blocks.pages_of(cached)

    def before(self, local_layer: int, parked: ParkedPrefill, qkv: QKV) -> Keyed:
        """Fresh queries, keys and values of a group, with what is cached before the latter."""
        if not any(map(len, parked.cached)):
            return Keyed(qkv, parked.cu, parked.cu, (0,) * len(parked.families))
        page_tokens = self._shard.kv.page_tokens
        pages = [self._seen(local_layer, of_prompt) for of_prompt in parked.cached]
        num_cached = [len(of_prompt) * page_tokens for of_prompt in pages]
        num_keys = [c + f for c, f in zip(num_cached, parked.cu.lengths, strict=True)]
        cu_k = CuSeqlens.of(num_keys, self._part.device)
        k, v = (x.new_empty(sum(num_keys), *x.shape[1:]) for x in (qkv.k, qkv.v))
        for (start, stop), (first, last), cached, of_prompt in zip(
            pairwise(cu_k.host), pairwise(parked.cu.host), num_cached, pages, strict=True
        ):
            if cached:
                place = slice(start, start + cached)
                self._shard.blocks.read(of_prompt, local_layer, k[place], v[place])
            k[start + cached : stop] = qkv.k[first:last]
            v[start + cached : stop] = qkv.v[first:last]
        num_before = tuple(
            len(of_prompt) * page_tokens - cached
            for of_prompt, cached in zip(parked.cached, num_cached, strict=True)
        )
        return Keyed(QKV(qkv.q, k, v), parked.cu, cu_k, num_before)

    def _seen(self, local_layer: int, pages: NDArray[np.int32]) -> NDArray[np.int32]:
        """The last of a prompt's blocks, as many as the queries after them see in a layer."""
        window = self._part.windows[local_layer]
        if not window:
            return pages
        num_seen = -(-(window - 1) // self._shard.kv.page_tokens)
        return pages[max(0, len(pages) - num_seen) :]

    def store(self, local_layer: int, parked: ParkedPrefill, qkv: QKV) -> None:
        """Fill the blocks that the group's prompts store in a layer, from its fresh tokens.

        Whether a prompt's own rows fit does not matter.
        """
        shard = self._shard
        for leader, start in zip(parked.families, parked.cu.host, strict=False):
            if stored := self._stored(leader):
                place = slice(start, start + len(stored) * shard.kv.page_tokens)
                shard.blocks.write(stored, local_layer, qkv.k[place], qkv.v[place])

    def store_rows(self, parked: ParkedPrefill) -> None:
        """Fill the same blocks in all layers, from rows that have the whole prompts by now."""
        for leader, cached in zip(parked.families, parked.cached, strict=True):
            if stored := self._stored(leader):
                self._shard.blocks.copy_rows(stored, leader, len(cached))

    def _stored(self, leader: int) -> tuple[int, ...]:
        """The blocks that a prompt fills; a slot refused for want of their pages holds none."""
        stored = self._shard.slots[leader].prefix.stored
        return stored if self._shard.blocks.holds(stored) else ()
