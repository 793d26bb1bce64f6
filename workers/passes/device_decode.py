"""Decode steps whose every input is a tensor on the device, replayed as CUDA graphs.

A step of one new token per sequence reads tokens, positions and slots from one small tensor, and
lengths and pages from the store's device tables, which are authoritative there: the kernels find
each new token's place by themselves. So one recorded graph per batch size serves every step, and
the host only says who takes part. Batches are padded up to the next size of a ladder; a padding
row has slot -1, stores nothing and attends to nothing.

Shapes: T sequences of a step, B the ladder's size for them, E hidden size.
"""

import functools
import logging
from bisect import bisect_left

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.footprint import graph_sizes
from saqqara.workers.models.layer import TritonLayer
from saqqara.workers.plan import DecodeItem
from saqqara.workers.shard import Shard
from saqqara.workers.sizing import why_no_graphs
from saqqara.workers.transfer import to_device

logger = logging.getLogger(__name__)


class DeviceDecode:
    """Decodes one token per sequence, with as little as possible done by the host.

    Args:
        shard: of a single rank, whose attention and layers are Triton's.
        use_graphs: replay recorded graphs; else every kernel is launched by the host.
    """

    def __init__(self, shard: Shard, use_graphs: bool) -> None:
        from saqqara.workers.kernels import decode, work

        self._shard = shard
        self._part = shard.part
        self._kernel, self._work = decode, work
        layers = shard.part.decoder.layers
        self._layers = [layer for layer in layers if isinstance(layer, TritonLayer)]
        assert len(self._layers) == len(layers), "the step is one of Triton's kernels throughout"
        self._use_graphs = use_graphs
        self._sizes = graph_sizes(shard.part.config.max_num_seqs)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if use_graphs else None

    def takes(self, items: tuple[DecodeItem, ...]) -> bool:
        """Whether these items are a plain step: one token each, nothing refused or observed."""
        shard = self._shard
        return all(
            item.num_tokens == 1
            and item.slot not in shard.faults.refused
            and item.slot not in shard.retained
            for item in items
        )

    def run(self, items: tuple[DecodeItem, ...]) -> Tensor | None:
        """Feed the items' tokens; hidden states [T, E], or None where the pages do not suffice.

        What it returns is overwritten by the next step.
        """
        shard = self._shard
        slots = np.array([item.slot for item in items], dtype=np.int64)
        with shard.clock.phase("reserve"):
            if not shard.kv.grow(slots):
                return None
        with shard.clock.phase("decode"):
            tokens = shard.slots.feed(items).astype(np.int64)
            positions = np.array([item.position for item in items], dtype=np.int64)
            inputs = np.stack([tokens, positions, slots])
            place = bisect_left(self._sizes, len(items))
            if not self._use_graphs or place == len(self._sizes):
                longest = int(shard.kv.table.kept[slots].max())
                return self._step(to_device(inputs, self._part.device), longest)
            return self._replay(self._sizes[place], inputs)

    def record_all(self) -> None:
        """Record the graph of every batch size, the largest first, so that they share memory."""
        if not self._use_graphs:
            return
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(self._part.device)
        for size in reversed(self._sizes):
            self._record(size)
        torch.cuda.empty_cache()
        after, _ = torch.cuda.mem_get_info(self._part.device)
        logger.info(
            "recorded decode graphs for batches of %s: %.0f MiB",
            ", ".join(map(str, self._sizes)),
            (before - after) / 2**20,
        )

    def _replay(self, size: int, inputs_3T: NDArray[np.int64]) -> Tensor:
        if size not in self._graphs:
            self._record(size)
        graph, inputs_3B, hidden_BE = self._graphs[size]
        num = inputs_3T.shape[1]
        padded = _padding(size)
        padded[:, :num] = inputs_3T
        inputs_3B.copy_(to_device(padded, self._part.device))
        graph.replay()
        return hidden_BE[:num]

    def _record(self, size: int) -> None:
        """Record one step; all of its rows are padding, so it changes no page."""
        device = self._part.device
        inputs_3B = to_device(_padding(size), device).clone()
        longest = self._part.max_model_len
        # Kernels are compiled, and libraries set up, before anything is recorded.
        stream = _recording_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._step(inputs_3B, longest)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(
            graph, pool=self._graph_memory, stream=stream, capture_error_mode="thread_local"
        ):
            hidden_BE = self._step(inputs_3B, longest)
        self._graphs[size] = graph, inputs_3B, hidden_BE

    def _step(self, inputs_3T: Tensor, longest: int) -> Tensor:
        """All layers, [T, E]; `longest` bounds the rows' lengths."""
        table, pool = self._shard.kv.table, self._shard.kv.pool
        decoder, scale = self._part.decoder, self._part.scale
        tokens, positions, slots = inputs_3T.unbind()
        assert decoder.embedding is not None, "the only rank has the embedding"
        assert table.mirror is not None, "the device has its own tables"
        hidden = decoder.embedding(tokens)
        places = decoder.places(positions)
        work = self._work.list_work(table.device_kept, slots, longest)
        for index, layer in enumerate(self._layers):
            rows = self._kernel.PagedRows(
                pool.k_pages,
                pool.v_pages,
                table.mirror.entries,
                table.device_kept[:, index],
                longest,
                slots,
                table.mirror.first[:, index],
            )
            q = layer.project_append_rows(hidden, places, rows)
            attended, _ = self._kernel.decode(q, rows, scale, work=work[index])
            hidden = layer.finish(hidden, attended, out=hidden)
        return hidden


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which a process warms up and records.

    cuBLAS takes a workspace, 32 MiB on an H100, for every stream that multiplies, and keeps it.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _padding(size: int) -> NDArray[np.int64]:
    """Inputs of a batch without sequences: token 0 at position 0 of slot -1, int64 [3, B]."""
    inputs = np.zeros((3, size), dtype=np.int64)
    inputs[2] = -1
    return inputs


def make(shard: Shard) -> DeviceDecode | None:
    """The device's own decode step, or None where this rank decodes in the general way."""
    part = shard.part
    if part.choices.linear_backend != "triton":
        return None
    reason = why_no_graphs(part)
    if reason is None:
        logger.info("decode: CUDA graphs")
    else:
        logger.info("decode: launched by the host (%s)", reason)
    if part.mesh.layout.world_size > 1:
        return None
    return DeviceDecode(shard, use_graphs=reason is None)
