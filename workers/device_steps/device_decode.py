"""Decode steps whose every input is a tensor on the device, replayed as CUDA graphs.

A step of one new token per sequence reads which slots take part, and where, from one small tensor;
their tokens from `DeviceSlots`, and lengths, which it counts up itself (those of rings up to their
window), and pages from the store's device tables. The kernels find each new token's place by
themselves. So one recorded graph per batch size serves every step, and the host only says who takes
part. Batches are padded up to the next size of a ladder; a padding row has slot -1, stores nothing
and attends to nothing. So does the row of a slot that this rank has refused, since the other ranks
count on the batch's size.

Where rows are cut while their sequences decode, a step also notes the queries, and their
normalisers, that cuts will look at. A cut itself comes after the step.

Shapes: T sequences of a step, B the ladder's size for them, E hidden size, L local layers, Hq local
query heads, D head dim.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers import sizing
from saqqara.workers.fixed_sizes import graph_sizes
from saqqara.workers.models.layer import TritonLayer
from saqqara.workers.plan import DecodeItem
from saqqara.workers.shard import Shard
from saqqara.workers.state.device_slots import DeviceSlots
from saqqara.workers.transfer import to_device

from .graphs import Graphs, Recorded

logger = logging.getLogger(__name__)

_TOKENS_OF, _POSITIONS, _ROWS_OF = range(3)  # of a step's inputs


class Kind(IntEnum):
    """What the steps of a batch note at most."""

    NOTHING = 0
    QUERIES = 1
    NORMALISERS = 2  # and queries


@dataclass(frozen=True, slots=True)
class Notes:
    """What a step notes for later cuts.

    Attributes:
        queries: [L, B or more, Hq, D], of the model's dtype; None where none are noted.
        normalisers: float32 [L, B or more, Hq]; None where none are noted.
    """

    queries: Tensor | None = None
    normalisers: Tensor | None = None


class DeviceDecode:
    """Decodes one token per sequence, with as little as possible done by the host.

    Args:
        shard: whose attention and layers are Triton's.
        slots: the tokens that are fed.
        graphs: where steps are recorded; None: every kernel is launched by the host.
    """

    def __init__(self, shard: Shard, slots: DeviceSlots, graphs: Graphs | None) -> None:
        from saqqara.workers.kernels import decode, work

        self._shard = shard
        self._part = shard.part
        self._slots = slots
        self._kernel, self._work = decode, work
        layers = shard.part.decoder.layers
        self._layers = [layer for layer in layers if isinstance(layer, TritonLayer)]
        assert len(self._layers) == len(layers), "the step is one of Triton's kernels throughout"
        self._graphs = graphs
        assert shard.kv.table.mirror is not None, "the device's lengths are its own to change"
        self._caps = _caps(shard)
        self._sizes = graph_sizes(shard.part.config.max_num_seqs)
        queries, normalisers = sizing.noted_in_steps(shard.part)
        self._recorded_kind = Kind(queries + normalisers)
        self._noted = Notes()
        if graphs is not None:
            self._noted = self._room(self._sizes[-1], self._recorded_kind)

    def takes(self, item: DecodeItem) -> bool:
        """Whether an item is part of such a step: one token, and no sums of attention.

        It depends on the plan alone, because all ranks must say the same.
        """
        return item.num_tokens == 1 and item.slot not in self._shard.sums

    def run(self, items: tuple[DecodeItem, ...], received: Tensor | None) -> Tensor:
        """Feed the items' tokens; hidden states after this rank's layers, [T, E].

        What it returns is overwritten by the next step.

        Args:
            items: one token each.
            received: hidden states from the stage before, [T, E]; may be overwritten.
        """
        shard = self._shard
        with shard.clock.phase("reserve"):
            inputs = self._inputs(items, self._grow(items))
        with shard.clock.phase("decode"):
            kind, place = self._kind(inputs[_TOKENS_OF]), bisect_left(self._sizes, len(items))
            is_recorded = kind <= self._recorded_kind and place < len(self._sizes)
            if self._graphs is not None and is_recorded:
                # What the engine's own retention needs is recorded, and what needs nothing.
                kind = self._recorded_kind if kind else kind
                hidden = self._replay(self._sizes[place], kind, inputs, received)
                notes = self._noted
            else:
                held = inputs[_ROWS_OF][inputs[_ROWS_OF] >= 0]
                longest = int(shard.kv.table.kept[held].max(initial=0))
                notes = self._room(len(items), kind)
                there = to_device(inputs, self._part.device)
                hidden = self._step(there, received, longest, notes)
            if kind:
                self._remember(inputs, notes)
            return hidden

    def record_all(self) -> None:
        """Record the graphs of every batch size, the largest first, so that they share memory."""
        if self._graphs is not None:
            for size in reversed(self._sizes):
                for kind in sorted({self._recorded_kind, Kind.NOTHING}, reverse=True):
                    self._record(size, kind)

    def _kind(self, slots_T: NDArray[np.int64]) -> Kind:
        """What has to be noted of a step of these slots."""
        rings = self._shard.rings
        if not rings.num_open:
            return Kind.NOTHING
        if rings.normalised(slots_T).any():
            return Kind.NORMALISERS
        return Kind.QUERIES if any(map(rings.size, slots_T.tolist())) else Kind.NOTHING

    def _room(self, size: int, kind: Kind) -> Notes:
        """Room for what a step of so many sequences notes."""
        part, pool = self._part, self._shard.kv.pool
        shape_LBH = (len(part.layers), size, len(part.heads.query))
        queries = normalisers = None
        if kind >= Kind.QUERIES:
            queries = pool.k_pages.new_empty(*shape_LBH, part.spec.head_dim)
        if kind >= Kind.NORMALISERS:
            normalisers = pool.k_pages.new_empty(shape_LBH, dtype=torch.float32)
        return Notes(queries, normalisers)

    def _remember(self, inputs_3T: NDArray[np.int64], notes: Notes) -> None:
        """Put what a step has noted where cuts find it."""
        rings, device, num = self._shard.rings, self._part.device, inputs_3T.shape[1]
        slots, positions, held = inputs_3T
        writes = rings.writes(slots, np.ones_like(slots), positions)
        assert writes is not None, "what is noted is of slots with rings"
        assert notes.queries is not None, "their kind notes queries"
        rings.append_layers(writes, notes.queries[:, :num])
        some = np.flatnonzero(rings.normalised(slots) & (held >= 0))
        if len(some):
            assert notes.normalisers is not None
            places = rings.places(slots[some], positions[some])
            chosen = notes.normalisers.index_select(1, to_device(some, device))
            rings.normalise_layers(places, chosen)

    def _grow(self, items: Sequence[DecodeItem]) -> set[int]:
        """Make room for a token of each slot; refuse from the end what does not fit.

        Returns the slots that have it.
        """
        shard = self._shard
        fitting = [item.slot for item in items if item.slot not in shard.faults.refused]
        while fitting and not shard.kv.grow(np.array(fitting, dtype=np.int64)):
            shard.refuse(fitting.pop())
        return set(fitting)

    def _inputs(self, items: Sequence[DecodeItem], fitting: set[int]) -> NDArray[np.int64]:
        numbers = [
            (item.slot, item.position, item.slot if item.slot in fitting else -1) for item in items
        ]
        return np.array(numbers, dtype=np.int64).T.copy()

    def _replay(
        self, size: int, kind: Kind, inputs_3T: NDArray[np.int64], received: Tensor | None
    ) -> Tensor:
        assert self._graphs is not None
        recorded = self._graphs.get(("decode", size, kind)) or self._record(size, kind)
        num = inputs_3T.shape[1]
        padded = _padding(size)
        padded[:, :num] = inputs_3T
        inputs_3B, *hidden = recorded.inputs
        inputs_3B.copy_(to_device(padded, self._part.device))
        if received is not None:
            hidden[0][:num].copy_(received)
        return recorded.replay()[:num]

    def _record(self, size: int, kind: Kind) -> Recorded:
        """Record one step; all of its rows are padding, so it changes no page."""
        assert self._graphs is not None
        part = self._part
        inputs_3B = to_device(_padding(size), part.device).clone()
        inputs = [inputs_3B]
        hidden_BE = None
        if part.decoder.embedding is None:
            norms = self._shard.kv.k_tokens  # of the model's dtype, on its device
            hidden_BE = norms.new_zeros(size, part.spec.hidden_size)
            inputs.append(hidden_BE)
        longest, notes = part.max_model_len, self._noted if kind else Notes()
        return self._graphs.record(
            ("decode", size, kind),
            inputs,
            lambda: self._step(inputs_3B, hidden_BE, longest, notes),
        )

    def _step(self, inputs_3T: Tensor, hidden: Tensor | None, longest: int, notes: Notes) -> Tensor:
        """All layers, [T, E]; `longest` bounds the rows' lengths."""
        table, pool = self._shard.kv.table, self._shard.kv.pool
        decoder, scale = self._part.decoder, self._part.scale
        slots, positions, held = inputs_3T.unbind()
        assert table.mirror is not None, "the device has its own tables"
        if decoder.embedding is not None:
            hidden = decoder.embedding(self._slots.feed(slots, positions))
        assert hidden is not None, "a later stage gets hidden states"
        places = decoder.places(positions)
        self._work.lengthen(table.device_kept, held, self._caps)
        work = self._work.list_work(table.device_kept, held, longest)
        for index, layer in enumerate(self._layers):
            rows = self._kernel.PagedRows(
                pool.k_pages,
                pool.v_pages,
                table.mirror.entries,
                table.device_kept[:, index],
                longest,
                held,
                table.mirror.first[:, index],
                self._part.windows[index],
            )
            q = layer.project_append_rows(hidden, places, rows)
            lse = None
            if notes.queries is not None:
                notes.queries[index, : len(q)].copy_(q)
            if notes.normalisers is not None:
                lse = notes.normalisers[index, : len(q)]
            attended, _ = self._kernel.decode(
                q, rows, scale, lse=lse, work=work[index], softcap=self._part.backend.softcap
            )
            hidden = layer.finish(hidden, attended, out=hidden)
        return hidden


def _caps(shard: Shard) -> Tensor | None:
    """What the rows of each layer never outgrow, int32 [L, H]; None without windows."""
    windows, table = shard.part.windows, shard.kv.table
    if not any(windows):
        return None
    caps = np.array([window or table.max_row_tokens for window in windows], dtype=np.int32)
    return to_device(caps.repeat(shard.kv.num_heads).reshape(len(caps), -1), shard.part.device)


def _padding(size: int) -> NDArray[np.int64]:
    """Inputs of a batch without sequences: token 0 at position 0 of slot -1, int64 [3, B]."""
    inputs = np.full((3, size), -1, dtype=np.int64)
    inputs[_POSITIONS] = 0
    return inputs
