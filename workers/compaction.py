"""Cuts rows while their sequences decode: compacts those at their limit, trims PyramidInfer's.

All rows of a sequence with targets reach their limits in the same step (`growth.Cycle`). After the
layers of that step, layer by layer, the rows of all such sequences that are scored alike are
selected and compacted together. What is trimmed (`growth.TrimmedRows`) is cut in the layers that
fire, together where sequences are cut alike, which is where their prompts are of one length.

Shapes: N sequences, R rows of one layer, n stored tokens of each, w queries, Hq local query heads,
H local kv heads, G = Hq / H, D head dim.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.growth import (
    Trim,
    num_ring_queries,
    remembers_normalisers,
    sums_mass,
)
from saqqara.compression.observation import Observation
from saqqara.compression.retention import Retention
from saqqara.compression.scoring import ordered_mean, query_weights
from saqqara.compression.selecting import select_stored, select_trimmed

from .kv.rows import Rows, compact_rows, read_places, read_rows
from .plan import DecodeItem
from .shard import Shard

Ints = NDArray[np.int64]

_MASS_BYTES = 32 << 20  # bounds the fp32 attention weights of one piece of work


@dataclass(frozen=True, slots=True)
class _Firing:
    """A sequence whose rows are to be compacted; `next_position` is that of its next token."""

    slot: int
    retention: Retention
    prompt_tokens: int
    next_position: int
    compaction: int


def compact(shard: Shard, items: tuple[DecodeItem, ...]) -> None:
    """Cut the rows of those sequences for which it is time after the items just fed."""
    firing = [f for item in items if (f := _firing(shard, item)) is not None]
    trims = [
        (item, trim)
        for item in items
        if item.slot in shard.trimmed
        for trim in shard.trimmed[item.slot].feed(item.num_tokens)
        if trim.layer in shard.layers
    ]
    if not (firing or trims):
        return
    together: dict[tuple[object, ...], list[_Firing]] = defaultdict(list)
    for number, f in enumerate(firing):
        alone = number if _asks_ranks(shard, f.retention) else -1
        together[f.retention, f.compaction, alone].append(f)
    trims_together: dict[tuple[Trim, Retention, int], list[DecodeItem]] = defaultdict(list)
    for number, (item, trim) in enumerate(trims):
        alone = -1 if shard.mesh.layout.tensor_size == 1 else number
        trims_together[trim, shard.slots[item.slot].retention, alone].append(item)
    with shard.clock.phase("compact"):
        for group in together.values():
            with shard.faults.blame([f.slot for f in group], "compaction"):
                for index in range(len(shard.layers)):
                    _compact_layer(shard, index, group)
        for (trim, _, _), alike in trims_together.items():
            with shard.faults.blame([item.slot for item in alike], "trimming"):
                _trim_layer(shard, alike, trim)


def _asks_ranks(shard: Shard, retention: Retention) -> bool:
    """Whether the score of a row depends on what other rows or ranks hold.

    Such sequences are selected one by one, in the same order on every rank.
    """
    assert retention.score is not None
    if retention.score.scope != "head":
        return True
    attends = num_ring_queries(retention) > 0 or sums_mass(retention)
    return shard.heads.replicated and attends


def _firing(shard: Shard, item: DecodeItem) -> _Firing | None:
    cycle = shard.cycles.get(item.slot)
    if cycle is None:
        return None
    held, stop = shard.slots[item.slot], item.position + item.num_tokens
    fed = stop - held.prompt_tokens
    assert cycle.room(fed - item.num_tokens) >= item.num_tokens, f"{item} spans a compaction"
    if not cycle.fires(fed):
        return None
    compaction = cycle.num_compactions(fed)
    return _Firing(item.slot, held.retention, held.prompt_tokens, stop, compaction)


def _compact_layer(shard: Shard, index: int, group: list[_Firing]) -> None:
    """Compact one local layer of sequences of one retention."""
    present = [f for f in group if f.slot not in shard.refused]
    if not present:
        if _asks_ranks(shard, group[0].retention):
            _join_others(shard, index, group[0])
        return
    retention, slack = present[0].retention, shard.cycles[present[0].slot].slack
    slots = np.array([f.slot for f in present], dtype=np.int64)
    lengths = shard.kv.table.kept[slots, index]  # [N, H]
    for length in np.unique(lengths).tolist():
        number, heads = np.nonzero(lengths == length)
        rows = Rows(index, slots[number], heads)
        k_RND, v_RND = read_rows(shard.kv, rows)
        queries = masses = None
        if num_ring_queries(retention):
            queries = _queries(shard, index, present)[torch.from_numpy(number), heads]
        if sums_mass(retention):
            masses = shard.sums.read(rows.slots, index, heads, length)
        observation = _observation(
            shard, index, heads, k_RND, v_RND, queries, masses, present[0].compaction
        )
        indices = select_stored(retention, observation, length - slack)
        if not compact_rows(shard.kv, rows, indices):
            for slot in np.unique(rows.slots).tolist():
                shard.refuse(slot)
            return
        if masses is not None:
            shard.sums.compact(rows.slots, index, heads, indices)


def _trim_layer(shard: Shard, items: list[DecodeItem], trim: Trim) -> None:
    """Cut one layer of sequences that are cut alike.

    With tensor ranks that is one sequence; ranks whose slot is refused help the others.
    """
    index, num_heads = trim.layer - shard.layers.start, len(shard.heads.kv)
    present = [item for item in items if item.slot not in shard.refused]
    if not present and shard.mesh.layout.tensor_size == 1:
        return
    seen = present or items
    slots = np.array([item.slot for item in seen], dtype=np.int64)
    heads = np.tile(np.arange(num_heads), len(seen))
    rows = Rows(index, slots.repeat(num_heads), heads)
    stops = np.array([item.position + item.num_tokens for item in seen])
    weigh = _recent_mass if remembers_normalisers(shard.slots[slots[0]].retention) else _last_mass
    scores = weigh(shard, rows, slots, stops, trim, holds_rows=bool(present))
    indices = select_trimmed(scores, trim).repeat_interleave(num_heads, dim=0)
    if not present or compact_rows(shard.kv, rows, indices):
        return
    if len(present) == 1:
        shard.refuse(present[0].slot)
        return
    for item in present:  # some may fit
        _trim_layer(shard, [item], trim)


def _last_mass(
    shard: Shard, rows: Rows, slots: Ints, stops: Ints, trim: Trim, *, holds_rows: bool
) -> Tensor:
    """Attention of the last query on the tokens that may be cut, [N, stop - start]: of all heads.

    It is over what the rows store now, [R, stored] by sequence and head.
    """
    if holds_rows:
        k_RND, v_RND = read_rows(shard.kv, rows)
        assert k_RND.shape[1] == trim.stored, f"{k_RND.shape[1]} stored tokens, not {trim.stored}"
    else:
        k_RND = v_RND = _nothing(shard, trim.stored)
    ring = shard.rings.read(slots, rows.layer, stops)  # [N, 1, Hq, D]
    queries = ring.view(len(rows.slots), 1, -1, ring.shape[-1])
    observation = _observation(shard, rows.layer, rows.heads, k_RND, v_RND, queries)
    mass_RN = observation.window_mass()[:, trim.start : trim.stop]
    return _mean_of_heads(shard, mass_RN.view(len(slots), -1, mass_RN.shape[1]))


def _recent_mass(
    shard: Shard, rows: Rows, slots: Ints, stops: Ints, trim: Trim, *, holds_rows: bool
) -> Tensor:
    """As `_last_mass`, but the weighted mean over the last queries, each as it once attended."""
    retention, layer, num_heads = shard.slots[slots[0]].retention, rows.layer, len(shard.heads.kv)
    num_candidates = trim.stop - trim.start
    if holds_rows:
        k_RCD = read_places(shard.kv, rows, trim.start, trim.stop)
    else:
        k_RCD = _nothing(shard, num_candidates)
    assert retention.propagate is not None
    weights = query_weights(retention.propagate, trim.num_queries, shard.device)
    assert weights is not None
    mass = torch.empty(len(slots), num_heads, num_candidates, device=shard.device)
    query_bytes = 4 * len(shard.heads.query) * (shard.spec.head_dim + num_candidates)
    step = max(1, _MASS_BYTES // (trim.num_queries * query_bytes))
    for first in range(0, len(slots), step):
        part = slice(first, first + step)
        q = shard.rings.read(slots[part], layer, stops[part], trim.num_queries)
        lse = shard.rings.read_normalisers(slots[part], layer, stops[part], trim.num_queries)
        k = k_RCD.view(len(slots), num_heads, num_candidates, -1)[part]
        mass[part] = remembered_mass(q, lse, k, shard.scale, weights)
    if shard.heads.replicated:
        mass = shard.mesh.reduce_replicas(mass)
    return _mean_of_heads(shard, mass / (trim.num_queries * shard.spec.group_size))


def _mean_of_heads(shard: Shard, mass_NHC: Tensor) -> Tensor:
    """Mean over all kv heads of the model, [N, C]: the same bits on every tensor rank.

    Ranks take one sequence at a time.
    """
    if shard.mesh.layout.tensor_size == 1:
        return ordered_mean(mass_NHC.transpose(0, 1))
    assert len(mass_NHC) == 1
    return ordered_mean(shard.gather_heads(mass_NHC[0]))[None]


def remembered_mass(
    q: Tensor, lse: Tensor, k: Tensor, scale: float, query_weights: Tensor
) -> Tensor:
    """Attention on keys that all of these queries saw, by the normalisers that it then had.

    Args:
        q: [N, w, H G, D].
        lse: float32 [N, w, H G].
        k: [N, H, C, D].
        scale: factor of the scores.
        query_weights: [w].

    Returns:
        float32 [N, H, C], summed over the queries, with their weights, and over the group.
    """
    (num, num_queries, _, dim), num_heads = q.shape, k.shape[1]
    q_NHMD = q.view(num, num_queries, num_heads, -1, dim).transpose(1, 2).flatten(2, 3)
    lse_NHM = lse.view(num, num_queries, num_heads, -1).transpose(1, 2).flatten(2, 3)
    scores = torch.matmul(q_NHMD.float(), k.float().transpose(2, 3)).mul_(scale)
    weights = scores.sub_(lse_NHM[..., None]).exp_()
    group = weights.shape[2] // num_queries
    return (weights * query_weights.repeat_interleave(group)[:, None]).sum(dim=2)


def _queries(shard: Shard, index: int, firing: list[_Firing]) -> Tensor:
    """The remembered queries of one local layer by kv head, [N, H, w, G, D]."""
    slots = np.array([f.slot for f in firing], dtype=np.int64)
    stops = np.array([f.next_position for f in firing], dtype=np.int64)
    ring = shard.rings.read(slots, index, stops)  # [N, w, Hq, D]
    grouped = ring.view(*ring.shape[:2], len(shard.heads.kv), -1, ring.shape[-1])
    return grouped.transpose(1, 2)


def _observation(
    shard: Shard,
    index: int,
    heads: Ints,
    k_RND: Tensor,
    v_RND: Tensor,
    queries_RWGD: Tensor | None,
    masses_RN: Tensor | None = None,
    compaction: int = 0,
) -> Observation:
    """What a score may look at: rows of one local layer, each with the local kv head `heads[i]`."""
    queries = None if queries_RWGD is None else queries_RWGD.transpose(0, 1).flatten(1, 2)
    return Observation(
        layer=shard.layers[index],
        num_layers=shard.spec.num_layers,
        prompt_tokens=k_RND.shape[1],
        keys=k_RND.transpose(0, 1),
        values=v_RND.transpose(0, 1),
        queries=queries,
        scale=shard.scale,
        heads=(shard.heads.kv.start + heads).tolist(),
        num_heads=shard.spec.num_kv_heads,
        group_size=shard.spec.group_size,
        mass_fn=lambda q, k: rows_mass(q, k, shard.scale),
        reduce_fn=shard.mesh.reduce_replicas if shard.heads.replicated else None,
        gather_heads_fn=shard.gather_heads if shard.mesh.layout.tensor_size > 1 else None,
        compaction=compaction,
        masses=masses_RN,
    )


def _join_others(shard: Shard, index: int, refused: _Firing) -> None:
    """Answer the ranks that select for a slot that this one refused and holds nothing of.

    They wait for its part of the scores, row length by row length. What they make of it does not
    matter: the sequence will start anew.
    """
    retention, cycle = refused.retention, shard.cycles[refused.slot]
    lengths = shard.after_prefill[refused.slot][index] + cycle.most
    group, dim = len(shard.heads.query) // len(shard.heads.kv), shard.spec.head_dim
    for length in np.unique(lengths).tolist():
        heads = np.flatnonzero(lengths == length)
        nothing = _nothing(shard, length)[: len(heads)]
        queries = masses = None
        if num_queries := num_ring_queries(retention):
            queries = torch.zeros(len(heads), num_queries, group, dim, device=shard.device)
        if sums_mass(retention):
            masses = torch.zeros(len(heads), length, device=shard.device)
        observation = _observation(
            shard, index, heads, nothing, nothing, queries, masses, refused.compaction
        )
        select_stored(retention, observation, length - cycle.slack)


def _nothing(shard: Shard, num_tokens: int) -> Tensor:
    """Keys or values of zeros, [H, n, D]."""
    shape = (len(shard.heads.kv), num_tokens, shard.spec.head_dim)
    return torch.zeros(shape, device=shard.device)


def rows_mass(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention mass as the backends' `mass`, for many rows at once.

    Args:
        q: queries of the last w tokens of each row, [w, R G, D].
        k: [n, R, D].
        scale: factor of the scores.

    Returns:
        float32 [R, n]: causal softmax attention, summed over the queries and the group.
    """
    (num_queries, _, dim), (num_keys, num_rows, _) = q.shape, k.shape
    q_RMD = q.view(num_queries, num_rows, -1, dim).permute(1, 2, 0, 3).reshape(num_rows, -1, dim)
    k_RDN = k.permute(1, 2, 0)
    first = num_keys - num_queries
    position = torch.arange(num_keys, device=k.device)
    future = (position > position[first:, None]).repeat(q_RMD.shape[1] // num_queries, 1)
    mass = torch.empty(num_rows, num_keys, dtype=torch.float32, device=k.device)
    step = max(1, _MASS_BYTES // (4 * q_RMD.shape[1] * num_keys))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        scores = torch.bmm(q_RMD[rows].float(), k_RDN[rows].float()).mul_(scale)
        weights = scores.masked_fill_(future, -torch.inf).softmax(dim=-1)
        torch.sum(weights, dim=1, out=mass[rows])
    return mass
