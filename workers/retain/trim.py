"""Trims rows while their sequences decode, as PyramidInfer does.

What is trimmed (`growth.TrimmedRows`) is cut in the layers that fire, together where sequences are
cut alike, which is where their prompts are of one length.

Shapes: N sequences, R rows of one layer, n stored tokens of each, C tokens that may be cut, w
queries, Hq local query heads, H local kv heads, D head dim.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.growth import Trim, remembers_normalisers
from saqqara.compression.retention import Retention
from saqqara.compression.scoring import ordered_mean, query_weights
from saqqara.compression.selecting import select_trimmed
from saqqara.workers.kv.rows import Rows, compact_rows, read_places, read_rows
from saqqara.workers.part import Part
from saqqara.workers.plan import DecodeItem
from saqqara.workers.shard import Shard

from .masses import MASS_BYTES, remembered_mass
from .observe import no_rows, observe_rows

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Cut:
    """One layer of sequences that are cut alike.

    Attributes:
        trim: what is cut.
        slots: theirs, [N].
        stops: the position after the last token of each, [N].
        rows: theirs in this layer, by sequence and head.
        holds_rows: False where this rank has refused the slots, and only answers the others.
    """

    trim: Trim
    slots: Ints
    stops: Ints
    rows: Rows
    holds_rows: bool

    @classmethod
    def of(cls, part: Part, items: list[DecodeItem], trim: Trim, *, holds_rows: bool) -> "_Cut":
        """What is cut after these items."""
        num_heads = len(part.heads.kv)
        slots = np.array([item.slot for item in items], dtype=np.int64)
        stops = np.array([item.position + item.num_tokens for item in items])
        heads = np.tile(np.arange(num_heads), len(items))
        rows = Rows(trim.layer - part.layers.start, slots.repeat(num_heads), heads)
        return cls(trim, slots, stops, rows, holds_rows)


def trim_rows(shard: Shard, items: tuple[DecodeItem, ...]) -> None:
    """Cut the rows of those sequences and layers for which it is time after the items just fed."""
    firing = [
        (item, trim)
        for item in items
        if item.slot in shard.retained.trimmed
        for trim in shard.retained.trimmed[item.slot].feed(item.num_tokens)
        if trim.layer in shard.part.layers
    ]
    if not firing:
        return
    together: dict[tuple[Trim, Retention, int], list[DecodeItem]] = defaultdict(list)
    for number, (item, trim) in enumerate(firing):
        alone = -1 if shard.part.mesh.layout.tensor_size == 1 else number
        together[trim, shard.slots[item.slot].retention, alone].append(item)
    with shard.clock.phase("compact"):
        for (trim, _, _), alike in together.items():
            with shard.faults.blame([item.slot for item in alike], "trimming"):
                _trim_layer(shard, alike, trim)


def _trim_layer(shard: Shard, items: list[DecodeItem], trim: Trim) -> None:
    """Cut one layer of sequences that are cut alike.

    With tensor ranks that is one sequence; ranks whose slot is refused help the others.
    """
    present = [item for item in items if item.slot not in shard.faults.refused]
    if not present and shard.part.mesh.layout.tensor_size == 1:
        return
    cut = _Cut.of(shard.part, present or items, trim, holds_rows=bool(present))
    remembers = remembers_normalisers(shard.slots[cut.slots[0]].retention)
    scores = _recent_mass(shard, cut) if remembers else _last_mass(shard, cut)
    indices = select_trimmed(scores, trim).repeat_interleave(len(shard.part.heads.kv), dim=0)
    if not present or compact_rows(shard.kv, cut.rows, indices, trim.start):
        return
    if len(present) == 1:
        shard.refuse(present[0].slot)
        return
    for item in present:  # some may fit
        _trim_layer(shard, [item], trim)


def _last_mass(shard: Shard, cut: _Cut) -> Tensor:
    """Attention of the last query on the tokens that may be cut, [N, C]: of all heads.

    It is over what the rows store now, [R, stored] by sequence and head.
    """
    trim, rows = cut.trim, cut.rows
    if cut.holds_rows:
        k_RND, v_RND = read_rows(shard.kv, rows)
        assert k_RND.shape[1] == trim.stored, f"{k_RND.shape[1]} stored tokens, not {trim.stored}"
    else:
        k_RND = v_RND = no_rows(shard.part, trim.stored)
    ring = shard.rings.read(cut.slots, rows.layer, cut.stops)  # [N, 1, Hq, D]
    queries = ring.view(len(rows.slots), 1, -1, ring.shape[-1])
    observation = observe_rows(shard.part, rows.layer, rows.heads, k_RND, v_RND, queries)
    mass_RN = observation.window_mass()[:, trim.start : trim.stop]
    return _mean_of_heads(shard.part, mass_RN.view(len(cut.slots), -1, mass_RN.shape[1]))


def _recent_mass(shard: Shard, cut: _Cut) -> Tensor:
    """As `_last_mass`, but the weighted mean over the last queries, each as it once attended."""
    part, trim, slots, layer = shard.part, cut.trim, cut.slots, cut.rows.layer
    num_heads, num_candidates = len(part.heads.kv), trim.stop - trim.start
    if cut.holds_rows:
        k_RCD = read_places(shard.kv, cut.rows, trim.start, trim.stop)
    else:
        k_RCD = no_rows(part, num_candidates)
    propagate = shard.slots[slots[0]].retention.propagate
    assert propagate is not None
    weights = query_weights(propagate, trim.num_queries, part.device)
    assert weights is not None
    mass = torch.empty(len(slots), num_heads, num_candidates, device=part.device)
    query_bytes = 4 * len(part.heads.query) * (part.spec.head_dim + num_candidates)
    step = max(1, MASS_BYTES // (trim.num_queries * query_bytes))
    for first in range(0, len(slots), step):
        some = slice(first, first + step)
        at = (slots[some], layer, cut.stops[some], trim.num_queries)
        q, lse = shard.rings.read(*at), shard.rings.read_normalisers(*at)
        k = k_RCD.view(len(slots), num_heads, num_candidates, -1)[some]
        mass[some] = remembered_mass(q, lse, k, part.scale, weights, part.backend.softcap)
    if part.heads.replicated:
        mass = part.mesh.reduce_replicas(mass)
    return _mean_of_heads(part, mass / (trim.num_queries * part.spec.group_size))


def _mean_of_heads(part: Part, mass_NHC: Tensor) -> Tensor:
    """Mean over all kv heads of the model, [N, C]: the same bits on every tensor rank.

    Ranks take one sequence at a time.
    """
    if part.mesh.layout.tensor_size == 1:
        return ordered_mean(mass_NHC.transpose(0, 1))
    assert len(mass_NHC) == 1
    return ordered_mean(part.gather_heads(mass_NHC[0]))[None]
