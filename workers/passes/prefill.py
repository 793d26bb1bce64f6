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

from saqqara.compression.propagate import computed_tokens
from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.kv.prompts import PromptWrite, write_layers, write_prompts
from saqqara.workers.models.decoder import chunks
from saqqara.workers.models.layer import QKV, Layer
from saqqara.workers.plan import PrefillGroup, StepPlan
from saqqara.workers.shard import Shard
from saqqara.workers.transfer import to_device

from . import native_prefill
from .choosing import Choosing
from .cuts import Cuts
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
        self._cuts = Cuts(shard, self._prefixes)
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
            [shard.slots.prompt(slot)[self._prefixes.num_reused(slot) :] for slot in families]
        )
        hidden_TE = part.decoder.embedding(to_device(tokens.astype(np.int64), part.device))
        return self._park(families, hidden_TE, self._all_positions(families), 0)

    def _send(self, parked: ParkedPrefill) -> None:
        """Hand a group over to the next stage, with its positions if those are not all."""
        mesh = self._part.mesh
        if self._are_cut(parked.families, self._part.layers.stop):
            mesh.send_hidden(parked.places.positions_T)
        if parked.for_blocks is not None:
            mesh.send_hidden(parked.for_blocks)
        mesh.send_hidden(parked.hidden_TE)

    def _receive(self, slots: tuple[int, ...]) -> ParkedPrefill:
        """Take a group over from the stage before; see `_send`."""
        shard, start = self._shard, self._part.layers.start
        families = shard.slots.families(slots)
        num_tokens = sum(self._lengths(families, start))
        if not self._are_cut(families, start):
            hidden_TE = shard.receive_hidden(num_tokens)
            return self._park(families, hidden_TE, self._all_positions(families), start)
        cuts, cu = self._cuts, CuSeqlens.of(self._lengths(families, start), self._part.device)
        positions_T = shard.receive_positions(num_tokens)
        if of_leaders := cuts.stores(start - 1, families):
            for_blocks = shard.receive_hidden(sum(num for _, num in of_leaders))
            cuts.store(start - 1, families, for_blocks)
        known = cuts.known(start - 1, families, positions_T, cu)
        num_known = sum(len(places) for places in known if places is not None)
        hidden_TE = shard.receive_hidden(num_tokens - num_known)
        pages = [self._prefixes.cached_pages(family, 0) for family in families.values()]
        hidden_TE = cuts.join(start, pages, known, cu, hidden_TE)
        return self._park(families, hidden_TE, positions_T, start)

    def _park(
        self, families: dict[int, list[int]], hidden_TE: Tensor, positions_T: Tensor, layer: int
    ) -> ParkedPrefill:
        """The group as it enters a layer."""
        part = self._part
        cu = CuSeqlens.of(self._lengths(families, layer), part.device)
        places, known = part.decoder.places(positions_T), self._prefixes
        cached = [known.cached_pages(family, layer) for family in families.values()]
        resumed = [known.resumed_rows(slot) for slot in families]
        return ParkedPrefill(families, hidden_TE, places, cu, cached, resumed)

    def _all_positions(self, leaders: Iterable[int]) -> Tensor:
        """Positions of all tokens of prompts that are computed, int64 [T]."""
        starts = [self._prefixes.num_reused(slot) for slot in leaders]
        lengths = self._lengths(leaders, 0)
        positions = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        return to_device(np.concatenate(positions), self._part.device)

    def _lengths(self, leaders: Iterable[int], layer: int) -> list[int]:
        """How many tokens of each prompt enter a layer to be computed."""
        known = self._prefixes
        return [
            computed_tokens(known.entering(slot), known.num_reused(slot))[layer] for slot in leaders
        ]

    def _are_cut(self, leaders: Iterable[int], layer: int) -> bool:
        """Whether not all tokens of some prompt enter a layer."""
        entering = [self._prefixes.entering(slot) for slot in leaders]
        return any(of_prompt[layer] < of_prompt[0] for of_prompt in entering)

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
        places: list[Tensor | None] = []
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
            with timed("propagate"):
                places += self._cuts.select(layer, some, keyed, lse)
            del fresh, keyed
        if len(several) > 1:
            attended = torch.cat(several)
        if any(chosen is not None for chosen in places):
            lse_bytes = 0 if lse is None else lse.nbytes
            other_bytes = self._kv_bytes(qkv), 2 * qkv.q.nbytes + lse_bytes
            self._drop(layer, parked, attended, places, other_bytes)
            return
        del qkv, lse, several
        with timed("finish"):
            self._finish(weights, parked.hidden_TE, attended)

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
        self._finish(weights, hidden_RE, attended)
        finals.take(parked.families, wanted, hidden_RE, self._shard.slots)

    def _drop(
        self,
        layer: int,
        parked: ParkedPrefill,
        attended: Tensor,
        places: list[Tensor | None],
        other_bytes: tuple[int, int],
    ) -> None:
        """Finish a layer that drops tokens, for those that go on; `other_bytes` exist meanwhile.

        Where all tokens of blocks leave their hidden states it is finished for all.
        """
        weights = self._part.decoder.layers[layer - self._part.layers.start]
        timed, cuts, bytes_before = self._shard.clock.span, self._cuts, parked.hidden_TE.nbytes
        stores = bool(cuts.stores(layer, parked.families))
        if stores:
            with timed("finish"):
                self._finish(weights, parked.hidden_TE, attended)
        with timed("propagate"):
            if stores:
                self._store_hidden(layer, parked)
            going_on = cuts.going_on(parked, places)
            hidden_FE = parked.hidden_TE.index_select(0, going_on.rows_F)
            # On a CPU 8 times as fast as [rows_F].
            attended = attended.index_select(0, going_on.rows_F)
        if not stores:
            with timed("finish"):
                self._finish(weights, hidden_FE, attended)
        with timed("propagate"):
            cuts.narrow(layer, parked, going_on, hidden_FE)
        # The hidden states before and after exist side by side.
        kv_bytes, activation_bytes = other_bytes
        if parked.hidden_TE is not hidden_FE:
            activation_bytes += hidden_FE.nbytes
        self._shard.meter.see_prefill(kv_bytes, self.parked_bytes + bytes_before + activation_bytes)

    def _store_hidden(self, layer: int, parked: ParkedPrefill) -> None:
        """Put hidden states behind a layer into blocks, or aside for the stage that has these."""
        hidden = self._cuts.stored(layer, parked)
        if layer + 1 < self._part.layers.stop:
            self._cuts.store(layer, parked.families, hidden)
        else:
            parked.for_blocks = hidden

    def _finish(self, weights: Layer, hidden_TE: Tensor, attended: Tensor) -> None:
        """Replace hidden states before a layer by those after it, chunk by chunk."""
        for chunk in chunks(len(hidden_TE), self._part.config.linear_chunk_tokens):
            hidden = hidden_TE[chunk]
            weights.finish(hidden, attended[chunk], out=hidden)

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
