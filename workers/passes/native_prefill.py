"""Short prompts that go through the layers of a rank in one native call, or in few.

Between the layers of a short prompt Python takes as long as the layers do. Here it is left once:
what retention looks at is noted on the way and looked at afterwards, and where every token is kept,
keys and values go to their pages within the call. Cached tokens before a prompt's are read where
they are, in the pages of blocks. What is kept and sampled is the same to the last
bit as layer by layer. Long prompts, which would note much and gain little, go layer by layer, and
so do those of which a layer decides what enters the next.

Shapes: T packed tokens, L layers of a call, R rows wanted of the model's last layer, E hidden size,
Hq query heads, H kv heads, D head dim.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.growth import sums_mass
from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.kv.prompts import begin_with
from saqqara.workers.models.layer import QKV
from saqqara.workers.models.native_layer import step_layers
from saqqara.workers.native.prefill_step import (
    CachedPages,
    Fresh,
    PageWrites,
    PrefillStep,
    Prompts,
    Wanted,
)
from saqqara.workers.native.step_layers import PARTS
from saqqara.workers.shard import Shard

from .native_decode import why_not
from .parked import ParkedPrefill, last_rows

logger = logging.getLogger(__name__)

MAX_TOKENS = 1024  # beyond, Python takes a few percent at most
NOTED_BYTES = 16 << 20  # of queries, keys and values that wait for retention


@dataclass(frozen=True, slots=True)
class Piece:
    """Layers that went through one call.

    Attributes:
        layers: of the model.
        fresh: queries, keys and values, [L, T, heads, D]; of one layer only where they are stored.
        lse: normalisers of the queries, [L, T, Hq], or None.
        is_stored: whether all keys and values are in their pages.
        wanted: hidden states [R, E] after the model's last layer; None if it is not among them.
        activation_bytes: of queries, normalisers, and what a layer holds besides.
    """

    layers: range
    fresh: QKV
    lse: Tensor | None
    is_stored: bool
    wanted: Tensor | None
    activation_bytes: int

    def noted(self) -> Iterator[tuple[int, QKV, Tensor | None]]:
        """Each layer, with what retention looks at there."""
        for number, layer in enumerate(self.layers):
            is_last = self.wanted is not None and layer + 1 == self.layers.stop
            lse = None if self.lse is None or is_last else self.lse[number]
            yield layer, QKV(*(x[number] for x in self.fresh)), lse


class NativePrefill:
    """The layers of a shard for short prompts.

    Args:
        shard: of native layers and the cpu attention backend, without tensor parallelism.
    """

    def __init__(self, shard: Shard) -> None:
        part = shard.part
        self._shard, self._part = shard, part
        self._layers = step_layers(part.decoder.layers, part.scale, part.backend.softcap)
        self._step = PrefillStep(self._layers, part.windows)
        self._has_said_why = False

    @property
    def max_tokens(self) -> int:
        """Of prompts that go together."""
        return min(MAX_TOKENS, self._part.config.linear_chunk_tokens)

    def takes(self, parked: ParkedPrefill) -> bool:
        """Whether a group is short, and the same tokens go through all layers."""
        if parked.num_tokens > self.max_tokens:
            return False
        if any(self._part.windows) and any(rows is not None for rows in parked.resumed):
            return False  # tokens of rings are not in the order of the text
        retentions = [self._shard.slots[slot].retention for slot in parked.slots]
        narrowing = [r.method for r in retentions if r.propagate is not None]
        if narrowing and not self._has_said_why:
            self._has_said_why = True
            logger.info("prefill: layer by layer for %s, whose layers drop tokens", narrowing[0])
        return not narrowing

    def reserve(self, layers: range, parked: ParkedPrefill) -> PageWrites | None:
        """Pages for all keys and values of a group that keeps them all; those of blocks are there.

        Returns:
            None, with nothing reserved, where something is dropped, looked at or remembered of some
            prompt, where prompts are shared, the rank has other layers too, or pages are short; and
            of blocks, where rows are not as these.
        """
        kv = self._shard.kv
        if layers != self._part.layers or not all(map(self._keeps_all, parked.slots)):
            return None
        if len(parked.slots) > len(parked.families):
            return None
        slots, counts = (np.array(x, dtype=np.int64) for x in (parked.slots, parked.cu.lengths))
        empty = [slot for slot, rows in zip(slots, parked.resumed, strict=True) if rows is None]
        assert not kv.table.kept[empty].any(), f"slots {slots} are not empty"
        append = None
        if all(map(self._begin_with_cached, parked.slots, parked.cached)):
            append = kv.begin_append(slots, counts)
        if append is None:
            for slot in empty:
                kv.free(int(slot))
            return None
        return PageWrites(kv.pool.k_pages, kv.pool.v_pages, append.refs)

    def _begin_with_cached(self, slot: int, cached: NDArray[np.int32]) -> bool:
        """Put a prompt's cached tokens into its slot's rows; False if pages are short."""
        is_shared = self._shard.slots[slot].prefix.is_shared
        return len(cached) == 0 or begin_with(self._shard.kv, slot, cached, is_shared=is_shared)

    def _keeps_all(self, slot: int) -> bool:
        """Whether a slot keeps its whole prompt, and its queries and masses are nobody's."""
        shard, held = self._shard, self._shard.slots[slot]
        if slot in shard.faults.refused or slot in shard.retained.cycles:
            return False
        if any(self._part.windows) and (held.prefix.stored or held.prefix.cached):
            return False  # rings are not as blocks are
        return shard.rings.size(slot) == 0 and not held.retention.drops(held.prompt_tokens)

    def run(
        self,
        layers: range,
        parked: ParkedPrefill,
        writes: PageWrites | None,
        wanted: CuSeqlens | None,
    ) -> Iterator[Piece]:
        """Take a group through layers; its hidden states are overwritten.

        Args:
            layers: of the model, all of them this rank's.
            parked: the group.
            writes: from `reserve`.
            wanted: how many of each prompt's last tokens are wanted after the model's last layer;
                None if that is not among the layers.
        """
        at_once = len(layers) if writes is not None else self._num_noted(parked.num_tokens)
        for start in range(layers.start, layers.stop, at_once):
            piece = range(start, min(start + at_once, layers.stop))
            yield self._run(piece, parked, writes, wanted if piece.stop == layers.stop else None)

    def _num_noted(self, num_tokens: int) -> int:
        """Layers whose queries, keys and values may wait together."""
        of = self._layers
        heads = of.num_query_heads + 2 * of.num_kv_heads
        one_layer = num_tokens * heads * of.head_dim * self._part.dtype.itemsize
        return max(1, NOTED_BYTES // one_layer)

    def _run(
        self,
        layers: range,
        parked: ParkedPrefill,
        writes: PageWrites | None,
        wanted: CuSeqlens | None,
    ) -> Piece:
        part, of, clock = self._part, self._layers, self._shard.clock
        num_tokens, num_layers = parked.num_tokens, len(layers)
        num_rooms = num_layers if writes is None else 1
        q, k, v = (
            parked.hidden_TE.new_empty(num_rooms, num_tokens, heads, of.head_dim)
            for heads in (of.num_query_heads, of.num_kv_heads, of.num_kv_heads)
        )
        lse = None
        if any(self._weighs_queries(slot) for slot in parked.slots):
            lse = torch.empty(num_layers, num_tokens, of.num_query_heads)
        ends = None
        if wanted is not None:
            rows = last_rows(wanted, parked.cu)
            hidden = parked.hidden_TE.new_empty(len(rows), of.hidden_size)
            ends = Wanted(wanted.device, rows, hidden)
        first = part.layers.start
        start, is_traced = time.perf_counter(), clock.spans is not None
        seconds = self._step(
            range(layers.start - first, layers.stop - first),
            Prompts(parked.hidden_TE, parked.places.positions_T, parked.cu.device),
            Fresh(q, k, v, lse),
            writes,
            ends,
            self._cached(layers, parked),
            timed=is_traced,
        )
        for name, spent in zip(PARTS, seconds, strict=is_traced):
            clock.note(name, start, spent)
            start += spent
        found = None if ends is None else ends.hidden
        per_token = part.decoder.layers[0].activation_bytes_per_token(q.itemsize)
        num_bytes = q.nbytes + q[0].nbytes + num_tokens * per_token  # q[0]: the output of attention
        num_bytes += 0 if lse is None else lse.nbytes
        return Piece(layers, QKV(q, k, v), lse, writes is not None, found, num_bytes)

    def _cached(self, layers: range, parked: ParkedPrefill) -> CachedPages | None:
        """The pages before the tokens that are computed, in layers of the model; None: no such."""
        if not parked.reuses:
            return None
        kv, first = self._shard.kv, self._part.layers.start
        local = slice(layers.start - first, layers.stop - first)
        kept = np.zeros((len(layers), len(parked.families), kv.num_heads), dtype=np.int32)
        tables = []
        for prompt, (slot, pages) in enumerate(zip(parked.families, parked.cached, strict=True)):
            table = pages[:, local].transpose(1, 2, 0)
            kept[:, prompt] = len(pages) * kv.page_tokens
            rows = parked.resumed[prompt]
            if rows is not None and slot not in self._shard.faults.refused:
                kept[:, prompt] = rows.counts[local]
                most = int(kv.table.num_pages(kept[:, prompt]).max())
                table = kv.table.pages[slot, local, :, :most]
            tables.append(table)
        shape = (*kept.shape, max(table.shape[-1] for table in tables))
        all_pages = np.zeros(shape, dtype=np.int32)
        for prompt, table in enumerate(tables):
            all_pages[:, prompt, :, : table.shape[-1]] = table
        pool, ready = kv.pool, (torch.from_numpy(all_pages), torch.from_numpy(kept))
        return CachedPages(pool.k_pages, pool.v_pages, *ready)

    def _weighs_queries(self, slot: int) -> bool:
        """Whether attention to a slot's prompt may be asked for."""
        held = self._shard.slots[slot]
        return held.retention.drops(held.prompt_tokens) or sums_mass(held.retention)


def make(shard: Shard) -> NativePrefill | None:
    """The call, or None where short prompts go layer by layer; the log says why."""
    if shard.part.device.type != "cpu":
        return None
    reason = why_not(shard.part)
    if reason is not None:
        logger.info("prefill: layer by layer (%s)", reason)
        return None
    native = NativePrefill(shard)
    logger.info("prefill: up to %d tokens in one native call", native.max_tokens)
    return native
