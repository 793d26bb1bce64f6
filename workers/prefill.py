"""Prompts on their way through one rank's layers: layer-major, packed, retained layer by layer.

A prompt's keys and values exist at full length only while their layer is computed; then retention
picks what is written to pages.

Shapes: T packed tokens, N sequences, E hidden size, Hq local query heads, H local kv heads,
D head dim.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from saqqara.compression.observation import Observation
from saqqara.compression.select import select

from .attention.base import CuSeqlens
from .models.decoder import chunks
from .models.layer import QKV, Layer, Places
from .plan import PrefillGroup, StepPlan
from .shard import Shard


@dataclass
class ParkedPrefill:
    """A prefill group between two layer ranges: hidden states [T, E] and where they stand."""

    hidden_TE: Tensor
    places: Places
    cu: CuSeqlens

    @property
    def num_tokens(self) -> int:
        """Packed tokens, T."""
        return self.hidden_TE.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes that the group holds while it is parked."""
        return self.hidden_TE.nbytes + self.places.num_bytes


class Prefill:
    """Takes prefill groups through the layers of a shard, one range at a time."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._parked: dict[tuple[int, ...], ParkedPrefill] = {}

    @property
    def parked_bytes(self) -> int:
        """Bytes of the groups between two ranges."""
        return sum(parked.num_bytes for parked in self._parked.values())

    def drop(self, slot: int) -> None:
        """Forget the group of a freed slot; a group is given up half-way only as a whole."""
        for slots in [slots for slots in self._parked if slot in slots]:
            del self._parked[slots]

    def run(self, plan: StepPlan) -> dict[int, Tensor]:
        """Advance every group of the plan.

        Returns:
            The last hidden state [E] of each slot that is through the model's last layer.
        """
        finals: dict[int, Tensor] = {}
        # What this stage holds already goes first: what is handed over arrives later.
        for group in sorted(plan.prefill, key=self._is_handed_over):
            finals.update(self._advance(group))
        return finals

    def _advance(self, group: PrefillGroup) -> dict[int, Tensor]:
        shard, slots = self._shard, group.slots
        if group.start_layer == 0 and shard.mesh.is_first_stage:
            self._parked[slots] = self._embed(slots)
        elif self._is_handed_over(group):
            num_tokens = sum(shard.slots[slot].prompt_tokens for slot in slots)
            self._parked[slots] = self._park(slots, shard.receive_hidden(num_tokens))
        start = max(group.start_layer, shard.layers.start)
        stop = min(group.stop_layer, shard.layers.stop)
        if start >= stop:
            return {}
        parked, finals = self._parked[slots], {}
        with shard.clock.phase("prefill"):
            for layer in range(start, min(stop, shard.spec.num_layers - 1)):
                self._layer(layer, slots, parked)
            if stop == shard.spec.num_layers:
                finals = dict(zip(slots, self._last_layer(slots, parked), strict=True))
        if stop == shard.layers.stop:
            del self._parked[slots]
            if not shard.mesh.is_last_stage:
                shard.mesh.send_hidden(parked.hidden_TE)
        return finals

    def _is_handed_over(self, group: PrefillGroup) -> bool:
        """Whether the previous stage finishes its part of the group in this range."""
        return group.start_layer < self._shard.layers.start <= group.stop_layer

    def _embed(self, slots: tuple[int, ...]) -> ParkedPrefill:
        shard = self._shard
        assert shard.decoder.embedding is not None
        tokens = np.concatenate([shard.slots.prompt(slot) for slot in slots])
        return self._park(slots, shard.decoder.embedding(shard.to_device(tokens)))

    def _park(self, slots: tuple[int, ...], hidden_TE: Tensor) -> ParkedPrefill:
        shard = self._shard
        lengths = [shard.slots[slot].prompt_tokens for slot in slots]
        positions = np.concatenate([np.arange(n) for n in lengths])
        places = shard.decoder.places(shard.to_device(positions))
        return ParkedPrefill(hidden_TE, places, CuSeqlens.of(lengths, shard.device))

    def _layer(self, layer: int, slots: tuple[int, ...], parked: ParkedPrefill) -> None:
        """Replace the parked hidden states by those after `layer`; keep what retention selects."""
        shard = self._shard
        weights = shard.decoder.layers[layer - shard.layers.start]
        part = shard.clock.part
        with part("project"):
            qkv = self._project(weights, parked)
        with part("attention"):
            attended = shard.backend.prefill(*qkv, parked.cu, parked.cu, shard.scale)
        with part("retain"):
            self._retain(layer, slots, parked, qkv)
        del qkv
        with part("finish"):
            for chunk in chunks(parked.num_tokens, shard.config.linear_chunk_tokens):
                hidden = parked.hidden_TE[chunk]
                weights.finish(hidden, attended[chunk], out=hidden)

    def _last_layer(self, slots: tuple[int, ...], parked: ParkedPrefill) -> Tensor:
        """The model's last layer: queries and MLP only where the next token comes from, [N, E]."""
        shard = self._shard
        layer = shard.spec.num_layers - 1
        weights = shard.decoder.layers[layer - shard.layers.start]
        qkv = self._project(weights, parked)
        last_N = parked.cu.device[1:].long() - 1
        one_each = CuSeqlens.of([1] * len(slots), shard.device)
        attended = shard.backend.prefill(
            qkv.q[last_N], qkv.k, qkv.v, one_each, parked.cu, shard.scale
        )
        self._retain(layer, slots, parked, qkv)
        return weights.finish(parked.hidden_TE[last_N], attended)

    def _project(self, weights: Layer, parked: ParkedPrefill) -> QKV:
        """Queries, keys and values of whole prompts, chunk by chunk."""
        shard = self._shard
        num_tokens, dim = parked.num_tokens, shard.spec.head_dim
        num_queries, num_keys = len(shard.heads.query), len(shard.heads.kv)
        new = parked.hidden_TE.new_empty
        qkv = QKV(
            new(num_tokens, num_queries, dim),
            new(num_tokens, num_keys, dim),
            new(num_tokens, num_keys, dim),
        )
        chunk_tokens = min(num_tokens, shard.config.linear_chunk_tokens)
        for chunk in chunks(num_tokens, chunk_tokens):
            hidden, places = parked.hidden_TE[chunk], parked.places.part(chunk)
            weights.project(hidden, places, out=qkv.part(chunk))
        shard.meter.see_prefill(
            kv_bytes=self._kv_bytes(qkv),
            activation_bytes=(
                self.parked_bytes
                + 2 * qkv.q.nbytes  # queries + attention output
                + chunk_tokens * weights.activation_bytes_per_token(qkv.q.itemsize)
            ),
        )
        return qkv

    def _kv_bytes(self, qkv: QKV) -> int:
        """Bytes of the layer's fresh keys and values and of the pages of all prompts in prefill."""
        kv = self._shard.kv
        pages = sum(kv.pages_of(slot) for slots in self._parked for slot in slots)
        return qkv.k.nbytes + qkv.v.nbytes + pages * kv.page_bytes

    def _retain(self, layer: int, slots: tuple[int, ...], parked: ParkedPrefill, qkv: QKV) -> None:
        """Write to pages what each prompt's retention method keeps of this layer."""
        shard = self._shard
        bounds = parked.cu.host
        for slot, start, stop in zip(slots, bounds[:-1], bounds[1:], strict=True):
            prompt = qkv.part(slice(start, stop))
            next_position = shard.slots[slot].prompt_tokens
            shard.rings.store(slot, layer - shard.layers.start, prompt.q, next_position)
            # On every rank, refused or not: some scores are reduced over ranks.
            indices = self._select(layer, slot, prompt)
            if slot in shard.refused:
                continue
            if not shard.kv.write(slot, layer - shard.layers.start, prompt.k, prompt.v, indices):
                shard.refuse(slot)
        # The pages just written and the layer's fresh keys and values exist side by side.
        shard.meter.see_prefill(self._kv_bytes(qkv), 0)

    def _select(self, layer: int, slot: int, prompt: QKV) -> Tensor | None:
        """Positions that each kv head keeps, int64 [H, keep], or None for all."""
        shard = self._shard
        retention, num_tokens = shard.slots[slot].retention, len(prompt.k)
        if not retention.drops(num_tokens):
            return None
        window = retention.num_window_queries(num_tokens)
        observation = Observation(
            layer=layer,
            num_layers=shard.spec.num_layers,
            prompt_tokens=num_tokens,
            keys=prompt.k,
            values=prompt.v,
            queries=prompt.q[num_tokens - window :] if window else None,
            scale=shard.scale,
            heads=shard.heads.kv,
            group_size=shard.spec.group_size,
            mass_fn=self._mass,
            reduce_fn=shard.mesh.reduce_replicas if shard.heads.replicated else None,
        )
        return select(retention, observation)

    def _mass(self, q_window: Tensor, keys: Tensor) -> Tensor:
        return self._shard.backend.mass(q_window, keys, self._shard.scale)
