"""Decode steps that go through all layers of a rank in one native call.

A step of one token per sequence leaves Python once; queries and normalisers that are remembered for
cuts come out of the same call. What else a step may need (several tokens of a sequence, refused
slots, sums of attention) is done layer by layer in `decode_batch.py`, with the same results to the
last bit.

Shapes: L layers, T fed tokens, E hidden size, Hq query heads, D head dim.
"""

import logging
import time

import torch
from torch import Tensor

from saqqara.workers.models.native_layer import step_layers
from saqqara.workers.native.decode_step import DecodeStep, Notes, Pages, Rows
from saqqara.workers.native.step_layers import MAX_HEAD_DIM, PARTS
from saqqara.workers.part import Part
from saqqara.workers.shard import Shard

from .decode_batch import DecodeBatch

logger = logging.getLogger(__name__)


class NativeDecode:
    """The layers of a shard as one call.

    Args:
        shard: of native layers and the cpu attention backend, without tensor parallelism.
    """

    def __init__(self, shard: Shard) -> None:
        part = shard.part
        self._layers = step_layers(part.decoder.layers, part.scale, part.backend.softcap)
        pool, table = shard.kv.pool, shard.kv.table
        pages = Pages(pool.k_pages, pool.v_pages, table.device_pages)
        self._shard = shard
        self._step = DecodeStep(self._layers, pages)

    def takes(self, batch: DecodeBatch) -> bool:
        """Whether a batch is plain, and small enough to be faster this way."""
        is_plain = batch.rows is None and not any(company.sums for company in batch.companies)
        return is_plain and batch.num_tokens <= self._layers.max_rows()

    def run(self, batch: DecodeBatch, hidden_TE: Tensor) -> Tensor:
        """Hidden states after the last layer, in place of those before the first."""
        append = batch.append
        assert append is not None, "a plain batch has pages for its tokens"
        rows = Rows(
            torch.from_numpy(batch.positions), append.device_slots, append.refs, append.lengths
        )
        notes = self._notes(batch)
        clock = self._shard.clock
        is_traced = clock.spans is not None
        start = time.perf_counter()
        seconds = self._step(hidden_TE, rows, notes, timed=is_traced)
        for name, spent in zip(PARTS, seconds, strict=is_traced):
            clock.note(name, start, spent)
            start += spent
        self._remember(batch, notes)
        return hidden_TE

    def _notes(self, batch: DecodeBatch) -> Notes:
        """Room for what the sequences' cuts will look at."""
        part = self._shard.part
        shape_LTH = (len(part.layers), batch.num_tokens, len(part.heads.query))
        queries = lse = None
        if batch.rings is not None:
            queries = torch.empty(*shape_LTH, part.spec.head_dim, dtype=part.dtype)
        if any(company.places is not None for company in batch.companies):
            lse = torch.empty(shape_LTH)
        return Notes(queries, lse)

    def _remember(self, batch: DecodeBatch, notes: Notes) -> None:
        """Put queries and normalisers where cuts find them."""
        rings = self._shard.rings
        if batch.rings is not None:
            assert notes.queries is not None
            rings.append_layers(batch.rings, notes.queries)
        for company in batch.companies:
            if company.places is not None:
                assert notes.lse is not None
                rows = company.rows
                lse = notes.lse if rows is None else notes.lse.index_select(1, rows)
                rings.normalise_layers(company.places, lse)


def make(shard: Shard) -> NativeDecode | None:
    """The one call, or None where this rank decodes layer by layer; the log says why."""
    if shard.part.device.type != "cpu":
        return None
    reason = why_not(shard.part)
    if reason is not None:
        logger.info("decode: layer by layer (%s)", reason)
        return None
    logger.info("decode: all layers in one native call")
    return NativeDecode(shard)


def why_not(part: Part) -> str | None:
    """Why a rank cannot go through its layers in one call, or None if it can."""
    if part.choices.linear_backend != "native":
        return f"linear layers are computed by {part.choices.linear_backend}"
    if part.backend.name != "cpu":
        return f"attention is computed by the {part.backend.name} backend"
    if part.mesh.layout.tensor_size > 1:
        return "tensor ranks add up what each of them computes of a layer"
    if part.spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim {part.spec.head_dim} is more than {MAX_HEAD_DIM}"
    return None
