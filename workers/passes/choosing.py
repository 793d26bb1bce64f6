"""What each sequence's retention keeps of a prompt in one layer, and what is noted for later cuts.

Shapes: T packed tokens that are computed, n tokens of one prompt, Hq local query heads, H local kv
heads.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.growth import remembers_normalisers, sums_mass
from saqqara.compression.retention import Retention
from saqqara.compression.selecting import select, select_rows
from saqqara.workers.kv.prompts import PromptWrite
from saqqara.workers.models.layer import QKV
from saqqara.workers.retain.observe import observe_each_length, observe_prompt, prompt_mass
from saqqara.workers.shard import Shard

from .parked import ParkedPrefill
from .prefixes import Keyed

Selection = Tensor | list[Tensor] | None


class Choosing:
    """Chooses for the sequences of a shard, layer by layer.

    Attributes:
        watched: what `Worker.watch_positions` returned; None: nobody watches.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._part = shard.part
        self.watched: dict[tuple[int, int], list[Tensor]] | None = None

    def choose(
        self, layer: int, parked: ParkedPrefill, keyed: Keyed, lse: Tensor | None
    ) -> list[PromptWrite]:
        """What each sequence's method keeps of this layer.

        `lse` [T, Hq] is what prefill returned of all queries, None if it did not.
        """
        local_layer = layer - self._part.layers.start
        writes: list[PromptWrite] = []
        befores = zip(keyed.num_before, keyed.pads, strict=True)
        prompts = zip(keyed.prompts(), keyed.cu_k.host, befores, strict=False)
        bounds = pairwise(keyed.cu_q.host)
        families = zip(parked.families.values(), parked.cached, parked.resumed, strict=True)
        for (family, cached, rows), (prompt, start, (num_before, pads)), (first, last) in zip(
            families, prompts, bounds, strict=True
        ):
            prompt_lse = None if lse is None else lse[first:last]
            chosen: dict[Retention, tuple[Selection, Tensor | None]] = {}
            for slot in family:
                held = self._shard.slots[slot]
                self._remember_queries(local_layer, slot, prompt, prompt_lse)
                # On every rank, refused or not: some scores are reduced over ranks.
                if held.retention not in chosen:
                    with self._shard.faults.blame([slot], "retention"):
                        chosen[held.retention] = self._select(layer, slot, prompt, prompt_lse, pads)
                if held.retention not in chosen:
                    continue
                indices, masses = chosen[held.retention]
                self._remember(local_layer, slot, len(prompt.k), indices, masses)
                if self.watched is not None:
                    entered = _with_reused(parked.places.positions_T[first:last], len(prompt.k))
                    self.watched[slot, layer] = self._positions(local_layer, entered, indices)
                shared = self._shared(local_layer, slot, cached)
                assert shared is None or indices is None, (
                    f"slot {slot} keeps not all that it shares"
                )
                kept = 0
                if rows is not None and not self._part.windows[local_layer]:
                    kept = int(rows.counts[local_layer].max())
                how = (len(prompt.k), indices, num_before, kept, shared)
                writes.append(PromptWrite(slot, start, *how))
        return writes

    def _shared(
        self, local_layer: int, slot: int, cached: NDArray[np.int32]
    ) -> NDArray[np.int32] | None:
        """Pages of blocks that a slot's rows hold themselves, [blocks, H]; None if they do not.

        `cached` are those that its prompt begins with, [blocks, L, H].
        """
        held = self._shard.slots[slot]
        if not (held.prefix.is_shared and len(cached)) or self._part.windows[local_layer]:
            return None
        assert slot not in self._shard.retained, f"rows of slot {slot} will be cut"
        return cached[:, local_layer]

    def _positions(self, local_layer: int, entered: Tensor, indices: Selection) -> list[Tensor]:
        """Positions in the prompt that each local kv head keeps of those that entered a layer."""
        if indices is None:
            entered = entered[-self._part.windows[local_layer] :]
            return [entered] * len(self._part.heads.kv)
        return [entered[places] for places in indices]

    def _remember_queries(
        self, local_layer: int, slot: int, prompt: QKV, lse: Tensor | None
    ) -> None:
        """Begin the slot's ring, if it has one, with the prompt's last queries.

        `lse` is as for `choose`.
        """
        shard, held = self._shard, self._shard.slots[slot]
        normalisers, queries = None, prompt.q
        if remembers_normalisers(held.retention):
            assert held.retention.propagate is not None
            # Of adjacent tokens; those before them did not all enter the layer.
            recent = held.retention.propagate.recent_tokens(held.prompt_tokens)
            queries = queries[-recent:]
            if lse is None:
                normalisers = self._part.backend.normalisers(queries, prompt.k, self._part.scale)
            else:
                normalisers = lse[-recent:]
        shard.rings.store(slot, local_layer, queries, held.prompt_tokens, normalisers)

    def _remember(
        self,
        local_layer: int,
        slot: int,
        num_tokens: int,
        indices: Selection,
        masses: Tensor | None,
    ) -> None:
        """Note what compactions while decoding start from, on every rank, refused or not."""
        shard = self._shard
        if slot not in shard.retained.cycles:
            return
        num_tokens = min(num_tokens, self._part.windows[local_layer] or num_tokens)
        counts = num_tokens if indices is None else [len(head) for head in indices]
        shard.retained.after_prefill[slot][local_layer] = counts
        if masses is not None:
            room = self._part.max_model_len - shard.slots[slot].prompt_tokens
            more = min(shard.retained.cycles[slot].most, room)
            shard.sums.store(slot, local_layer, masses, indices, more)

    def _select(
        self,
        layer: int,
        slot: int,
        prompt: QKV,
        lse: Tensor | None,
        pads: NDArray[np.int64] | None,
    ) -> tuple[Selection, Tensor | None]:
        """Which of the tokens that entered each kv head keeps, or None for all; see `select`.

        Where compactions will go by sums of attention, also what all of these tokens got, [H, n]. A
        layer with a window keeps what is in it, and is never compacted. `pads` are as in `Keyed`.
        """
        if self._part.spec.layers.windows[layer]:
            return None, None
        spec, held = self._part.spec, self._shard.slots[slot]
        masses = prompt_mass(self._part, prompt, lse) if sums_mass(held.retention) else None
        rows = held.retention.row_tokens(held.prompt_tokens, spec.layers, spec.num_kv_heads)
        goes_on = held.resumed_tokens > 0
        if goes_on and held.retention.shape.heads_differ:
            # On other ranks rows may differ where they do not here: who asks whom is up to numbers
            # that all ranks know.
            is_whole = rows[layer].min() >= held.prompt_tokens
            return None if is_whole else self._select_rows(layer, slot, prompt, lse, pads), masses
        if rows[layer].min() >= len(prompt.k):
            return None, masses
        observation = observe_prompt(
            self._part,
            layer,
            prompt,
            lse,
            held.retention,
            held.prompt_tokens,
            masses,
            goes_on=goes_on,
        )
        return select(held.retention, observation), masses

    def _select_rows(
        self,
        layer: int,
        slot: int,
        prompt: QKV,
        lse: Tensor | None,
        pads: NDArray[np.int64] | None,
    ) -> list[Tensor] | None:
        """What each local kv head keeps of its row and the tokens after it, where heads differ."""
        part, held = self._part, self._shard.slots[slot]
        if pads is None:
            pads = np.zeros(len(part.heads.kv), dtype=np.int64)
        how = (lse, held.retention, held.prompt_tokens)
        seen = observe_each_length(part, layer, prompt, *how, pads)
        gather = part.gather_heads if part.mesh.layout.tensor_size > 1 else None
        chosen = select_rows(held.retention, seen, part.heads.kv, gather)
        if all(len(row) + pad == len(prompt.k) for row, pad in zip(chosen, pads, strict=True)):
            return None
        return [row + int(pad) for row, pad in zip(chosen, pads, strict=True)]


def _with_reused(positions: Tensor, num_keys: int) -> Tensor:
    """Positions of the tokens whose keys are there, int64 [n], from those that were computed.

    Those before them are taken to be adjacent, as cached ones are.
    """
    num_reused = num_keys - len(positions)
    if not num_reused:
        return positions
    places = torch.arange(-num_reused, 0, device=positions.device)
    return torch.cat([positions[0] + places, positions])
