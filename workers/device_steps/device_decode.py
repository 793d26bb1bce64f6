"""Decode steps whose every input is a tensor on the device, replayed as CUDA graphs.

A step of one new token per sequence reads which slots take part, and where, from one small tensor;
their tokens from `DeviceSlots`, and lengths, which it counts up itself, and pages from the store's
device tables. The kernels find each new token's place by themselves. So one recorded graph per
batch size serves every step, and the host only says who takes part. Batches are padded up to the
next size of a ladder; a padding row has slot -1, stores nothing and attends to nothing. So does the
row of a slot that this rank has refused, since the other ranks count on the batch's size.

Shapes: T sequences of a step, B the ladder's size for them, E hidden size.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.footprint import graph_sizes
from saqqara.workers.models.layer import TritonLayer
from saqqara.workers.plan import DecodeItem
from saqqara.workers.shard import Shard
from saqqara.workers.state.device_slots import DeviceSlots
from saqqara.workers.transfer import to_device

from .graphs import Graphs, Recorded

logger = logging.getLogger(__name__)

_TOKENS_OF, _POSITIONS, _ROWS_OF = range(3)  # of a step's inputs


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
        assert shard.kv.table.mirrored, "the device's lengths are its own to change"
        self._sizes = graph_sizes(shard.part.config.max_num_seqs)

    def takes(self, item: DecodeItem) -> bool:
        """Whether an item is part of a plain step: one token, and no rows that are cut.

        It depends on the plan alone, because all ranks must say the same.
        """
        return item.num_tokens == 1 and item.slot not in self._shard.retained

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
            place = bisect_left(self._sizes, len(items))
            if self._graphs is not None and place < len(self._sizes):
                return self._replay(self._sizes[place], inputs, received)
            held = inputs[_ROWS_OF][inputs[_ROWS_OF] >= 0]
            longest = int(shard.kv.table.kept[held].max(initial=0))
            return self._step(to_device(inputs, self._part.device), received, longest)

    def record_all(self) -> None:
        """Record the graph of every batch size, the largest first, so that they share memory."""
        if self._graphs is not None:
            for size in reversed(self._sizes):
                self._record(size)

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

    def _replay(self, size: int, inputs_3T: NDArray[np.int64], received: Tensor | None) -> Tensor:
        assert self._graphs is not None
        recorded = self._graphs.get(("decode", size)) or self._record(size)
        num = inputs_3T.shape[1]
        padded = _padding(size)
        padded[:, :num] = inputs_3T
        inputs_3B, *hidden = recorded.inputs
        inputs_3B.copy_(to_device(padded, self._part.device))
        if received is not None:
            hidden[0][:num].copy_(received)
        return recorded.replay()[:num]

    def _record(self, size: int) -> Recorded:
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
        longest = part.max_model_len
        return self._graphs.record(
            ("decode", size), inputs, lambda: self._step(inputs_3B, hidden_BE, longest)
        )

    def _step(self, inputs_3T: Tensor, hidden: Tensor | None, longest: int) -> Tensor:
        """All layers, [T, E]; `longest` bounds the rows' lengths."""
        table, pool = self._shard.kv.table, self._shard.kv.pool
        decoder, scale = self._part.decoder, self._part.scale
        slots, positions, held = inputs_3T.unbind()
        if decoder.embedding is not None:
            hidden = decoder.embedding(self._slots.feed(slots, positions))
        assert hidden is not None, "a later stage gets hidden states"
        places = decoder.places(positions)
        self._work.lengthen(table.device_kept, held)
        work = self._work.list_work(table.device_kept, held, longest)
        for index, layer in enumerate(self._layers):
            rows = self._kernel.PagedRows(
                pool.k_pages,
                pool.v_pages,
                table.device_pages[:, index],
                table.device_kept[:, index],
                longest,
                held,
            )
            q = layer.project_append_rows(hidden, places, rows)
            attended, _ = self._kernel.decode(q, rows, scale, work=work[index])
            hidden = layer.finish(hidden, attended, out=hidden)
        return hidden


def _padding(size: int) -> NDArray[np.int64]:
    """Inputs of a batch without sequences: token 0 at position 0 of slot -1, int64 [3, B]."""
    inputs = np.full((3, size), -1, dtype=np.int64)
    inputs[_POSITIONS] = 0
    return inputs
