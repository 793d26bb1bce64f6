"""Known tokens through one rank's layers: decode steps, and extensions (resume, scoring).

Shapes: T fed tokens, E hidden size.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from saqqara.workers.device_steps.device_decode import DeviceDecode
from saqqara.workers.device_steps.graphs import Graphs
from saqqara.workers.mesh.mesh import TokenReceipt
from saqqara.workers.plan import DecodeItem
from saqqara.workers.retain.compact import compact_firing
from saqqara.workers.retain.trim import trim_rows
from saqqara.workers.shard import Shard
from saqqara.workers.state.slots import Target
from saqqara.workers.transfer import to_device

from . import native_decode
from .decode_batch import DecodeBatch, rows_of

_SPARE_RECEIPTS = 8  # steps whose tokens may be on their way, beyond one per pipeline stage


class Decode:
    """Feeds the decode items of plans through the layers of a shard."""

    def __init__(self, shard: Shard, graphs: Graphs | None = None) -> None:
        self._shard = shard
        self._part = shard.part
        self._on_device: DeviceDecode | None = None
        if shard.device_slots is not None:
            self._on_device = DeviceDecode(shard, shard.device_slots, graphs)
        self._native = native_decode.make(shard)
        self._awaited: deque[tuple[list[Target], TokenReceipt]] = deque()

    def run(self, items: tuple[DecodeItem, ...]) -> Tensor | None:
        """Feed the items' tokens.

        Returns:
            Hidden states [T, E] on the last stage, tokens in the order of `items`; else None.
        """
        if not items:
            return None
        mesh, retained = self._part.mesh, self._shard.retained
        hidden = self._feed(items)
        if not mesh.is_last_stage:
            mesh.send_hidden(hidden)
        if retained.cycles:
            compact_firing(self._shard, items)
        if retained.trimmed:
            trim_rows(self._shard, items)
        return hidden if mesh.is_last_stage else None

    def _feed(self, items: tuple[DecodeItem, ...]) -> Tensor:
        """Hidden states [T, E] after this rank's layers.

        Where some of the items are the device's own step and others are not, there are two steps:
        nobody loses the first for the company it is in.
        """
        if self._on_device is None:
            return self._feed_generally(items, lambda: self._receive(items))
        plain = tuple(item for item in items if self._on_device.takes(item))
        if not plain:
            return self._feed_generally(items, lambda: self._receive(items))
        received = self._receive(items)
        if len(plain) == len(items):
            hidden = self._on_device.run(items, received)
            # The next step may come before it is sent.
            return hidden if self._part.mesh.is_last_stage else hidden.clone()
        others = tuple(item for item in items if not self._on_device.takes(item))
        places = [to_device(rows_of(items, some), self._part.device) for some in (plain, others)]
        of_plain, of_others = ((None if received is None else received[rows]) for rows in places)
        parts = [self._on_device.run(plain, of_plain)]
        parts.append(self._feed_generally(others, lambda: of_others))
        together = torch.cat(parts)
        return together.new_empty(together.shape).index_copy_(0, torch.cat(places), together)

    def _feed_generally(
        self, items: tuple[DecodeItem, ...], receive: Callable[[], Tensor | None]
    ) -> Tensor:
        """Hidden states [T, E] after this rank's layers, by launches of the host."""
        shard = self._shard
        with shard.clock.phase("reserve"):
            batch = self._reserve(items)
        received = receive()
        hidden = self._embed(items) if received is None else received
        with shard.clock.phase("decode"):
            return self._through_layers(batch, hidden)

    def _through_layers(self, batch: DecodeBatch, hidden: Tensor) -> Tensor:
        """Hidden states [T, E] after this rank's layers; those before them are overwritten."""
        if self._native is not None and self._native.takes(batch):
            return self._native.run(batch, hidden)
        shard, part = self._shard, self._part
        places = part.decoder.places(to_device(batch.positions, part.device))
        for index, layer in enumerate(part.decoder.layers):
            attended = batch.attend(shard, index, layer, hidden, places)
            with shard.clock.span("finish"):
                hidden = layer.finish(hidden, attended, out=hidden)
        return hidden

    def _receive(self, items: tuple[DecodeItem, ...]) -> Tensor | None:
        """Hidden states [T, E] from the stage before; the first one takes in tokens instead."""
        if self._part.decoder.embedding is None:
            return self._shard.receive_hidden(sum(item.num_tokens for item in items))
        self._receive_tokens({item.slot for item in items})
        return None

    def _embed(self, items: tuple[DecodeItem, ...]) -> Tensor:
        """Hidden states [T, E] of the tokens that are fed, from where these are."""
        shard, part = self._shard, self._part
        assert part.decoder.embedding is not None
        if shard.device_slots is None:
            tokens = to_device(shard.slots.feed(items).astype(np.int64), part.device)
            return part.decoder.embedding(tokens)
        counts = [item.num_tokens for item in items]
        slots = np.repeat(np.array([item.slot for item in items], dtype=np.int64), counts)
        places = [np.arange(i.position, i.position + i.num_tokens) for i in items]
        slots_T, positions_T = to_device(np.stack((slots, np.concatenate(places))), part.device)
        return part.decoder.embedding(shard.device_slots.feed(slots_T, positions_T))

    def record_all(self) -> None:
        """Record what can be recorded before the first request."""
        if self._on_device is not None:
            self._on_device.record_all()

    def expect(self, targets: list[Target]) -> None:
        """Note that the last stage will send the tokens of these targets (first stage only).

        Tokens that end a sequence are fed to nobody. They are taken in once that many newer ones
        are awaited that they must have come.
        """
        mesh = self._part.mesh
        self._awaited.append((targets, mesh.irecv_tokens(len(targets))))
        while len(self._awaited) > mesh.layout.pipeline_size + _SPARE_RECEIPTS:
            self._receive_oldest()

    def _reserve(self, items: tuple[DecodeItem, ...]) -> DecodeBatch:
        """Reserve pages for the items' tokens; refuse from the end what does not fit."""
        shard = self._shard
        fitting = [item for item in items if item.slot not in shard.faults.refused]
        while (batch := DecodeBatch.reserve(shard.kv, items, fitting)) is None:
            shard.refuse(fitting.pop().slot)
        if shard.sums.num_open or shard.rings.num_open:
            batch = batch.keep_company(shard.sums, shard.rings)
        if not shard.rings.num_open:
            return batch
        slots = np.array([item.slot for item in items], dtype=np.int64)
        counts = np.array([item.num_tokens for item in items], dtype=np.int64)
        return replace(batch, rings=shard.rings.writes(slots, counts, batch.positions))

    def _receive_tokens(self, slots: set[int]) -> None:
        """Take in sampled tokens from the last stage, up to the newest that `slots` need."""
        needed = [i for i, (ts, _) in enumerate(self._awaited) if any(t.slot in slots for t in ts)]
        for _ in range(max(needed, default=-1) + 1):
            self._receive_oldest()

    def _receive_oldest(self) -> None:
        shard = self._shard
        targets, receipt = self._awaited.popleft()
        with shard.clock.phase("receive"):
            tokens = receipt.wait()  # on a GPU it is the device that waits
        if shard.device_slots is None:
            for target, token in zip(targets, tokens.tolist(), strict=True):
                shard.slots.put_token(target, token)
            return
        places = [(t.slot if shard.slots.holds(t) else -1, t.position) for t in targets]
        slots, positions = to_device(np.array(places, dtype=np.int64).T.copy(), tokens.device)
        shard.device_slots.put(slots, positions, tokens)
