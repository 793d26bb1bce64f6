"""Prompts on their way through one rank's layers: layer-major, packed, retained layer by layer.

A prompt's keys and values exist at full length only while their layer is computed; then retention
picks what is written to pages. Where a retention propagates, only the tokens that a layer selects
go on to the next; they keep their positions. Sequences that share a prefill are computed once, as
their leader, and retained each by its own method. Of a prompt that begins with cached blocks, or
goes on behind what its slot's rows keep, only the tokens behind these go through the layers
(`prefixes.py`).

Shapes: T packed tokens, N sequences, E hidden size, Hq local query heads, H local kv heads,
D head dim.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.kv.prompts import PromptWrite, write_layers, write_prompts
from saqqara.workers.models.decoder import chunks
from saqqara.workers.models.layer import QKV, Layer
from saqqara.workers.plan import PrefillGroup, StepPlan
from saqqara.workers.retain.propagate import PropagatingPrompt, surviving_rows
from saqqara.workers.shard import Shard
from saqqara.workers.transfer import to_device

from . import native_prefill
from .choosing import Choosing
from .native_prefill import NativePrefill, Piece
from .parked import Finals, ParkedPrefill, last_rows
from .prefixes import Keyed, Prefixes
from .uneven import attend


class Prefill:
    """Takes prefill groups through the layers of a shard, one range at a time."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._part = shard.part
        self._native = native_prefill.make(shard)
        self._parked: dict[tuple[int, ...], ParkedPrefill] = {}
        self._layer_tokens = 0
        self._prefixes = Prefixes(shard)
        self.choosing = Choosing(shard)

    @property
    def parked_bytes(self) -> int:
        """Bytes of the groups between two ranges."""
        return sum(parked.num_bytes for parked in self._parked.values())

    def take_layer_tokens(self) -> int:
        """Tokens that went through a layer, summed over the layers, since the last call."""
        taken, self._layer_tokens = self._layer_tokens, 0
        return taken

    def drop(self, slot: int) -> None:
        """Forget the group of a freed slot; a group is given up half-way only as a whole."""
        for slots in [slots for slots in self._parked if slot in slots]:
            del self._parked[slots]

    def run(self, plan: StepPlan) -> Finals:
        """Advance every group of the plan.

        Returns:
            Hidden states of the slots that are through the model's last layer.
        """
        finals = Finals()
        # What this stage holds already goes first: what is handed over arrives later.
        for group in sorted(plan.prefill, key=self._is_handed_over):
            self._advance(group, finals)
        return finals

    def _advance(self, group: PrefillGroup, finals: Finals) -> None:
        part, slots = self._part, group.slots
        if group.start_layer == 0 and part.mesh.is_first_stage:
            self._parked[slots] = self._embed(slots)
        elif self._is_handed_over(group):
            self._parked[slots] = self._receive(slots)
        start = max(group.start_layer, part.layers.start)
        stop = min(group.stop_layer, part.layers.stop)
        if start >= stop:
            return
        parked = self._parked[slots]
        with self._shard.clock.phase("prefill"):
            self._through_layers(range(start, stop), parked, finals)
        if stop == part.layers.stop:
            del self._parked[slots]
            if not part.mesh.is_last_stage:
                self._send(parked)

    def _is_handed_over(self, group: PrefillGroup) -> bool:
        """Whether the previous stage finishes its part of the group in this range."""
        return group.start_layer < self._part.layers.start <= group.stop_layer

    def _embed(self, slots: tuple[int, ...]) -> ParkedPrefill:
        shard, part, families = self._shard, self._part, self._shard.slots.families(slots)
        assert part.decoder.embedding is not None
        tokens = np.concatenate(
            [shard.slots.prompt(slot)[self._num_reused(slot) :] for slot in families]
        )
        hidden_TE = part.decoder.embedding(to_device(tokens.astype(np.int64), part.device))
        return self._park(families, hidden_TE, self._all_positions(families), 0)

    def _send(self, parked: ParkedPrefill) -> None:
        """Hand a group over to the next stage, with its positions if those are not all."""
        mesh, leaders = self._part.mesh, parked.families
        if self._lengths(leaders, self._part.layers.stop) != self._lengths(leaders, 0):
            mesh.send_hidden(parked.places.positions_T)
        mesh.send_hidden(parked.hidden_TE)

    def _receive(self, slots: tuple[int, ...]) -> ParkedPrefill:
        """Take a group over from the stage before; see `_send`."""
        shard, start = self._shard, self._part.layers.start
        families = shard.slots.families(slots)
        lengths = self._lengths(families, start)
        if lengths != self._lengths(families, 0):
            positions_T = shard.receive_positions(sum(lengths))
        else:
            positions_T = self._all_positions(families)
        hidden_TE = shard.receive_hidden(sum(lengths))
        return self._park(families, hidden_TE, positions_T, start)

    def _park(
        self, families: dict[int, list[int]], hidden_TE: Tensor, positions_T: Tensor, layer: int
    ) -> ParkedPrefill:
        """The group as it enters a layer."""
        part = self._part
        cu = CuSeqlens.of(self._lengths(families, layer), part.device)
        places, known = part.decoder.places(positions_T), self._prefixes
        cached = [known.cached_pages(family) for family in families.values()]
        resumed = [known.resumed_rows(slot) for slot in families]
        return ParkedPrefill(families, hidden_TE, places, cu, cached, resumed)

    def _all_positions(self, leaders: Iterable[int]) -> Tensor:
        """Positions of all tokens of prompts that are computed, int64 [T]."""
        starts = [self._num_reused(slot) for slot in leaders]
        lengths = self._lengths(leaders, 0)
        positions = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        return to_device(np.concatenate(positions), self._part.device)

    def _num_reused(self, leader: int) -> int:
        """First tokens of a prompt that are not computed."""
        return self._shard.slots[leader].num_reused(self._shard.kv.page_tokens)

    def _lengths(self, leaders: Iterable[int], layer: int) -> list[int]:
        """How many tokens of each prompt enter a layer to be computed."""
        layers, slots = self._part.spec.layers, self._shard.slots
        return [
            slots[slot].retention.entering_tokens(slots[slot].prompt_tokens, layers)[layer]
            - self._num_reused(slot)
            for slot in leaders
        ]

    def _through_layers(self, layers: range, parked: ParkedPrefill, finals: Finals) -> None:
        if self._native is not None and self._native.takes(parked):
            self._at_once(self._native, layers, parked, finals)
            return
        num_layers = self._part.spec.num_layers
        for layer in range(layers.start, min(layers.stop, num_layers - 1)):
            self._layer(layer, parked)
        if layers.stop == num_layers:
            self._last_layer(parked, finals)

    def _at_once(
        self, native: NativePrefill, layers: range, parked: ParkedPrefill, finals: Finals
    ) -> None:
        """Several layers in one call, then what retention selects of each; see `_layer`."""
        wanted = (
            parked.wanted(self._shard.slots) if layers.stop == self._part.spec.num_layers else None
        )
        writes = native.reserve(layers, parked) if self.choosing.watched is None else None
        for piece in native.run(layers, parked, writes, wanted):
            self._layer_tokens += parked.num_tokens * len(piece.layers)
            self._shard.meter.see_prefill(
                self._kv_bytes(piece.fresh), self.parked_bytes + piece.activation_bytes
            )
            with self._shard.clock.span("retain"):
                if piece.is_stored:
                    self._prefixes.store_rows(parked)
                else:
                    self._retain_piece(piece, parked)
            if wanted is not None and piece.wanted is not None:
                finals.take(parked.families, wanted, piece.wanted, self._shard.slots)

    def _layer(self, layer: int, parked: ParkedPrefill) -> None:
        """Replace the parked hidden states by those after `layer`; keep what retention selects."""
        part, timed = self._part, self._shard.clock.span
        local_layer = layer - part.layers.start
        weights, window = part.decoder.layers[local_layer], part.windows[local_layer]
        with timed("project"):
            qkv = self._project(weights, parked)
        several, lse = [], None
        for tokens, some in self._prefixes.parts(parked):
            fresh = qkv.of(tokens)
            with timed("project"):
                keyed = self._prefixes.before(local_layer, some, fresh)
            with timed("attention"):
                queries = keyed.qkv.q, keyed.cu_q
                attended, lse = attend(part.backend, keyed, *queries, part.scale, window)
                several.append(attended)
            with timed("retain"):
                self._retain(layer, some, fresh, keyed, lse)
            del fresh, keyed
        if len(several) > 1:
            attended = torch.cat(several)
        with timed("propagate"):
            rows_T = self._propagate(layer, parked, qkv, lse)
        del qkv, lse, several
        if rows_T is not None:
            attended = attended.index_select(0, rows_T)  # on a CPU 8 times as fast as [rows_T]
        with timed("finish"):
            for chunk in chunks(parked.num_tokens, part.config.linear_chunk_tokens):
                hidden = parked.hidden_TE[chunk]
                weights.finish(hidden, attended[chunk], out=hidden)

    def _last_layer(self, parked: ParkedPrefill, finals: Finals) -> None:
        """The model's last layer: queries and MLP only where a token is sampled or scored."""
        part = self._part
        layer, weights = part.spec.num_layers - 1, part.decoder.layers[-1]
        qkv = self._project(weights, parked)
        wanted = parked.wanted(self._shard.slots)
        rows_R = last_rows(wanted, parked.cu)
        several = []
        for tokens, some in self._prefixes.parts(parked):
            fresh, wanted_some = qkv.of(tokens), some.wanted(self._shard.slots)
            keyed = self._prefixes.before(layer - part.layers.start, some, fresh)
            q = fresh.q[last_rows(wanted_some, some.cu)]
            how = (part.scale, part.windows[-1])
            several.append(attend(part.backend, keyed, q, wanted_some, *how)[0])
            self._retain(layer, some, fresh, keyed, None)
            del fresh, keyed, q
        attended = several[0] if len(several) == 1 else torch.cat(several)
        del qkv
        hidden_RE = parked.hidden_TE[rows_R]
        for chunk in chunks(len(hidden_RE), part.config.linear_chunk_tokens):
            weights.finish(hidden_RE[chunk], attended[chunk], out=hidden_RE[chunk])
        finals.take(parked.families, wanted, hidden_RE, self._shard.slots)

    def _propagate(
        self, layer: int, parked: ParkedPrefill, qkv: QKV, lse: Tensor | None
    ) -> Tensor | None:
        """Narrow the group to the tokens that go on; returns their rows, or None for all."""
        shard, part, entered = self._shard, self._part, list(parked.cu.lengths)
        going_on = self._lengths(parked.families, layer + 1)
        if going_on == entered:
            return None
        prompts = [
            PropagatingPrompt(
                propagate=shard.slots[slot].retention.propagate,
                prompt_tokens=shard.slots[slot].prompt_tokens,
                num_kept=num_kept,
                first_row=start,
                qkv=qkv.of(slice(start, stop)),
                lse=None if lse is None else lse[start:stop],
            )
            for slot, num_kept, start, stop in zip(
                parked.families, going_on, parked.cu.host[:-1], parked.cu.host[1:], strict=True
            )
        ]
        rows_T = surviving_rows(part, prompts)
        places = part.decoder.places(parked.places.positions_T[rows_T])
        bytes_before = parked.hidden_TE.nbytes
        parked.narrow(rows_T, places, CuSeqlens.of(going_on, part.device))
        # The hidden states before and after exist side by side.
        lse_bytes = 0 if lse is None else lse.nbytes
        shard.meter.see_prefill(
            self._kv_bytes(qkv), self.parked_bytes + bytes_before + 2 * qkv.q.nbytes + lse_bytes
        )
        return rows_T

    def _project(self, weights: Layer, parked: ParkedPrefill) -> QKV:
        """Queries, keys and values of whole prompts, chunk by chunk."""
        part = self._part
        num_tokens, dim = parked.num_tokens, part.spec.head_dim
        self._layer_tokens += num_tokens
        num_queries, num_keys = len(part.heads.query), len(part.heads.kv)
        new = parked.hidden_TE.new_empty
        qkv = QKV(
            new(num_tokens, num_queries, dim),
            new(num_tokens, num_keys, dim),
            new(num_tokens, num_keys, dim),
        )
        chunk_tokens = min(num_tokens, part.config.linear_chunk_tokens)
        for chunk in chunks(num_tokens, chunk_tokens):
            hidden, places = parked.hidden_TE[chunk], parked.places.of(chunk)
            weights.project(hidden, places, out=qkv.of(chunk))
        self._shard.meter.see_prefill(
            kv_bytes=self._kv_bytes(qkv),
            activation_bytes=(
                self.parked_bytes
                + 2 * qkv.q.nbytes  # queries + attention output
                + chunk_tokens * weights.activation_bytes_per_token(qkv.q.itemsize)
            ),
        )
        return qkv

    def _kv_bytes(self, qkv: QKV, keyed: Keyed | None = None) -> int:
        """Bytes of the layer's fresh keys and values and of the pages of all prompts in prefill.

        With those of `keyed`, if they are copies.
        """
        kv = self._shard.kv
        pages = sum(kv.pages_of(slot) for slots in self._parked for slot in slots)
        copied = 0
        if keyed is not None and keyed.qkv is not qkv:
            copied = keyed.qkv.k.nbytes + keyed.qkv.v.nbytes
        return qkv.k.nbytes + qkv.v.nbytes + copied + pages * kv.page_bytes

    def _retain(
        self, layer: int, parked: ParkedPrefill, qkv: QKV, keyed: Keyed, lse: Tensor | None
    ) -> None:
        """Write to pages what each sequence's retention method keeps of this layer, and blocks.

        `lse` [T, Hq] is what prefill returned of all queries, None if it did not.
        """
        local_layer = layer - self._part.layers.start
        self._prefixes.store(local_layer, parked, qkv)
        writes = self.choosing.choose(layer, parked, keyed, lse)
        self._write(local_layer, keyed.qkv, writes)
        # The pages just written and the layer's fresh keys and values exist side by side.
        self._shard.meter.see_prefill(self._kv_bytes(qkv, keyed), 0)

    def _retain_piece(self, piece: Piece, parked: ParkedPrefill) -> None:
        """`_retain` of several layers, written together where there are pages for all.

        Behind what is known already each layer by itself: only its keys exist at full length.
        """
        shard, first = self._shard, self._part.layers.start
        if parked.reuses:
            for layer, qkv, lse in piece.noted():
                for tokens, some in self._prefixes.parts(parked):
                    fresh, of_some = qkv.of(tokens), None if lse is None else lse[tokens]
                    keyed = self._prefixes.before(layer - first, some, fresh)
                    self._retain(layer, some, fresh, keyed, of_some)
            return
        noted = []
        for layer, qkv, lse in piece.noted():
            self._prefixes.store(layer - first, parked, qkv)
            keyed = self._prefixes.before(layer - first, parked, qkv)
            noted.append((layer, qkv, self.choosing.choose(layer, parked, keyed, lse)))
        writes = [self._unrefused(writes) for _, _, writes in noted]
        _, k, v = piece.fresh
        if not write_layers(shard.kv, piece.layers.start - first, k, v, writes):
            for layer, qkv, writes_of_layer in noted:
                self._write(layer - first, qkv, writes_of_layer)
        shard.meter.see_prefill(self._kv_bytes(piece.fresh), 0)

    def _write(self, local_layer: int, qkv: QKV, writes: list[PromptWrite]) -> None:
        """Write the chosen tokens of one layer to pages; refuse slots for which there are too few.

        What a refused slot held is room for those after it.
        """
        shard, writes = self._shard, self._unrefused(writes)
        while writes:
            done = write_prompts(shard.kv, local_layer, qkv.k, qkv.v, writes)
            if done < len(writes):
                shard.refuse(writes[done].slot)
            writes = writes[done + 1 :]

    def _unrefused(self, writes: list[PromptWrite]) -> list[PromptWrite]:
        return [write for write in writes if write.slot not in self._shard.faults.refused]
