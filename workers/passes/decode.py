"""Known tokens through one rank's layers: decode steps, and extensions (resume, scoring).

Shapes: T fed tokens, E hidden size.
"""

from collections import deque
from dataclasses import replace

import numpy as np
from torch import Tensor

from saqqara.workers.mesh.mesh import TokenReceipt
from saqqara.workers.plan import DecodeItem
from saqqara.workers.retain.compact import compact_firing
from saqqara.workers.retain.trim import trim_rows
from saqqara.workers.shard import Shard
from saqqara.workers.state.slots import Target
from saqqara.workers.transfer import to_device

from . import device_decode, native_decode
from .decode_batch import DecodeBatch

_SPARE_RECEIPTS = 8  # steps whose tokens may be on their way, beyond one per pipeline stage


class Decode:
    """Feeds the decode items of plans through the layers of a shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._part = shard.part
        self._on_device = device_decode.make(shard)
        self._native = native_decode.make(shard)
        self._awaited: deque[tuple[list[Target], TokenReceipt]] = deque()

    def run(self, items: tuple[DecodeItem, ...]) -> Tensor | None:
        """Feed the items' tokens.

        Returns:
            Hidden states [T, E] on the last stage, tokens in the order of `items`; else None.
        """
        if not items:
            return None
        shard, part = self._shard, self._part
        if self._on_device is not None and self._on_device.takes(items):
            hidden = self._on_device.run(items)
            if hidden is not None:
                return hidden
        with shard.clock.phase("reserve"):
            batch = self._reserve(items)
        if part.decoder.embedding is not None:
            self._receive_tokens({item.slot for item in items})
            tokens = shard.slots.feed(items)
            hidden = part.decoder.embedding(to_device(tokens.astype(np.int64), part.device))
        else:
            hidden = shard.receive_hidden(batch.num_tokens)
        with shard.clock.phase("decode"):
            hidden = self._through_layers(batch, hidden)
        if not part.mesh.is_last_stage:
            part.mesh.send_hidden(hidden)
        if shard.retained.cycles:
            compact_firing(shard, items)
        if shard.retained.trimmed:
            trim_rows(shard, items)
        return hidden if part.mesh.is_last_stage else None

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

    def warm_up(self) -> None:
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
            tokens = receipt.wait().tolist()
        for target, token in zip(targets, tokens, strict=True):
            shard.slots.put_token(target, token)
