"""Layers that drop tokens: which of a group's tokens go on, cached ones among them.

Below its first cut a prompt behind cached blocks is computed as any other. At the cut it selects
from all of its tokens, and of the cached ones that go on hidden states are needed. Blocks have them
on the stage of the layer behind the cut; where that is the next stage, it is handed what it stores,
and of a prompt behind blocks only what was computed.

Shapes: T packed tokens that are computed, F of them that go on, S all that go on, N prompts, E
hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.kv.spans import spans
from saqqara.workers.retain.propagate import PropagatingPrompt, surviving_places
from saqqara.workers.shard import Shard
from saqqara.workers.transfer import to_device

from .parked import ParkedPrefill
from .prefixes import Keyed, Prefixes

Places = list[Tensor | None]


@dataclass(frozen=True, slots=True)
class GoingOn:
    """What goes on of a group behind a layer.

    Attributes:
        rows_F: packed rows of the computed tokens that go on, int64.
        positions_S: of all that go on, prompt after prompt, int64.
        cu: where each prompt's begin.
        known: of each prompt the places of those that are cached, among its cached tokens, int64;
            None: there are none, or they go on to be cached.
    """

    rows_F: Tensor
    positions_S: Tensor
    cu: CuSeqlens
    known: Places


class Cuts:
    """Narrows prefill groups where their retention propagates.

    Args:
        shard: whose layers these are.
        prefixes: what is known before the prompts.
    """

    def __init__(self, shard: Shard, prefixes: Prefixes) -> None:
        self._shard, self._part, self._prefixes = shard, shard.part, prefixes

    def select(self, layer: int, parked: ParkedPrefill, keyed: Keyed, lse: Tensor | None) -> Places:
        """Places of each prompt's tokens that go on among those that entered; None: all do.

        `lse` [T, Hq] is what prefill returned of all queries, None if it did not.
        """
        slots, known = self._shard.slots, self._prefixes
        entering = [known.entering(slot)[layer : layer + 2] for slot in parked.families]
        if all(entered == going_on for entered, going_on in entering):
            return [None] * len(entering)
        of_prompts = zip(
            parked.families, entering, keyed.prompts(), pairwise(keyed.cu_q.host), strict=True
        )
        prompts = [
            PropagatingPrompt(
                propagate=slots[slot].retention.propagate,
                prompt_tokens=slots[slot].prompt_tokens,
                num_kept=num_kept,
                qkv=qkv,
                lse=None if lse is None else lse[start:stop],
            )
            for slot, (_, num_kept), qkv, (start, stop) in of_prompts
        ]
        return surviving_places(self._part, prompts)

    def going_on(self, parked: ParkedPrefill, places: Places) -> GoingOn:
        """Which tokens of a group go on, from the `places` that were selected."""
        num_cached = [
            0 if chosen is None else len(pages) * self._shard.kv.page_tokens
            for chosen, pages in zip(places, parked.cached, strict=True)
        ]
        num_known = _counts_below(places, num_cached)
        rows, positions, known = [], [], list[Tensor | None]()
        for chosen, cached, num, (start, stop) in zip(
            places, num_cached, num_known, pairwise(parked.cu.host), strict=True
        ):
            if chosen is None:
                fresh = torch.arange(start, stop, device=self._part.device)
            else:
                fresh = chosen[num:] + (start - cached)
            of_fresh = parked.places.positions_T[fresh]
            rows.append(fresh)
            # All tokens entered the first layer that drops some: places are positions there.
            known.append(chosen[:num] if chosen is not None and cached else None)
            positions += [chosen[:num], of_fresh] if chosen is not None and num else [of_fresh]
        lengths = [
            length if chosen is None else len(chosen)
            for chosen, length in zip(places, parked.cu.lengths, strict=True)
        ]
        cu = CuSeqlens.of(lengths, self._part.device)
        return GoingOn(torch.cat(rows), torch.cat(positions), cu, known)

    def narrow(
        self, layer: int, parked: ParkedPrefill, going_on: GoingOn, hidden_FE: Tensor
    ) -> None:
        """Go on behind a layer with these tokens only.

        `hidden_FE` are those that were computed, behind the layer. Where the next stage has the
        cached ones it is they that `parked` ends with.
        """
        pages = parked.cached
        parked.cached = [
            of_prompt if known is None else of_prompt[:0]
            for of_prompt, known in zip(pages, going_on.known, strict=True)
        ]
        if layer + 1 < self._part.layers.stop:
            hidden_FE = self.join(layer + 1, pages, going_on.known, going_on.cu, hidden_FE)
        places = self._part.decoder.places(going_on.positions_S)
        parked.narrow(hidden_FE, places, going_on.cu)

    def join(
        self,
        layer: int,
        pages: Sequence[NDArray[np.int32]],
        known: Places,
        cu: CuSeqlens,
        hidden_FE: Tensor,
    ) -> Tensor:
        """All hidden states that enter a layer, [S, E]: each prompt's cached ones come first.

        Args:
            layer: of this stage, the one behind the cut.
            pages: of each prompt's cached blocks.
            known: as in `GoingOn`.
            cu: where each prompt's tokens begin.
            hidden_FE: those that were computed.
        """
        counts = np.array([0 if places is None else len(places) for places in known])
        if not counts.any():
            return hidden_FE
        blocks, local_layer = self._shard.blocks, layer - self._part.layers.start
        hidden_size, device = hidden_FE.shape[1], hidden_FE.device
        cached = torch.cat(
            [
                blocks.read_hidden(of_prompt, local_layer, places, hidden_size)
                for of_prompt, places in zip(pages, known, strict=True)
                if places is not None
            ]
        )
        starts, lengths = np.array(cu.host[:-1]), np.array(cu.lengths)
        joined = hidden_FE.new_empty(sum(cu.lengths), hidden_size)
        joined.index_copy_(0, to_device(spans(starts, counts), device), cached)
        fresh = spans(starts + counts, lengths - counts)
        joined.index_copy_(0, to_device(fresh, device), hidden_FE)
        return joined

    def stores(self, layer: int, slots: Iterable[int]) -> list[tuple[int, int]]:
        """Leaders whose blocks get hidden states behind this layer, and how many tokens these are.

        The same on all ranks, whether or not they have these blocks.
        """
        held, page_tokens = self._shard.slots, self._shard.kv.page_tokens
        return [
            (slot, len(held[slot].prefix.stored) * page_tokens)
            for slot in slots
            if held[slot].prefix.stored and self._prefixes.cut(slot) == layer
        ]

    def stored(self, layer: int, parked: ParkedPrefill) -> Tensor:
        """Hidden states for blocks from those of all tokens behind a layer, leader after leader."""
        starts = dict(zip(parked.families, parked.cu.host, strict=False))
        of_leaders = self.stores(layer, parked.families)
        return torch.cat([parked.hidden_TE[starts[slot] :][:num] for slot, num in of_leaders])

    def store(self, layer: int, slots: Iterable[int], hidden: Tensor) -> None:
        """Fill the blocks that have their hidden states here: `stored` behind a layer."""
        local_layer = layer + 1 - self._part.layers.start
        of_leaders = self.stores(layer, slots)
        parts = torch.split(hidden, [num for _, num in of_leaders])
        for (slot, _), of_leader in zip(of_leaders, parts, strict=True):
            if ids := self._prefixes.stored(slot):
                self._shard.blocks.write_hidden(ids, local_layer, of_leader)

    def known(
        self, layer: int, families: dict[int, list[int]], positions_S: Tensor, cu: CuSeqlens
    ) -> Places:
        """Of prompts that come from a stage whose last layer is `layer`, as in `GoingOn`."""
        num_cached = [
            self._prefixes.num_reused(slot) if self._prefixes.cut(slot) == layer else 0
            for slot in families
        ]
        places: Places = [positions_S[start:stop] for start, stop in pairwise(cu.host)]
        counts = _counts_below(places, num_cached)
        return [
            of_prompt[:num] if of_prompt is not None and cached else None
            for of_prompt, num, cached in zip(places, counts, num_cached, strict=True)
        ]


def _counts_below(places: Places, limits: Sequence[int]) -> list[int]:
    """How many of each prompt's places are below its limit; the device is waited for once."""
    if not any(limits):
        return [0] * len(limits)
    counts = [
        (chosen < limit).sum()
        for chosen, limit in zip(places, limits, strict=True)
        if chosen is not None and limit
    ]
    found = iter(torch.stack(counts).tolist())
    return [next(found) if limit else 0 for limit in limits]
