"""Compacts rows that have outgrown their target while their sequences decode.

All rows of a sequence reach their limits in the same step (`decode_stage.Cycle`). After the layers
of that step, layer by layer, the rows of all such sequences that are scored alike are selected and
compacted together.

Shapes: N sequences, R rows of one layer, n stored tokens of each, w queries, Hq local query heads,
H local kv heads, G = Hq / H, D head dim.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.decode_stage import num_ring_queries
from saqqara.compression.observation import Observation
from saqqara.compression.registry import score_method
from saqqara.compression.retention import Retention
from saqqara.compression.stored import select_stored

from .kv.rows import Rows, compact_rows, read_rows
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
    """Compact the rows of those sequences that reached their limit with the items just fed."""
    firing = [f for item in items if (f := _firing(shard, item)) is not None]
    if not firing:
        return
    together: dict[tuple[object, ...], list[_Firing]] = defaultdict(list)
    for number, f in enumerate(firing):
        alone = number if _asks_ranks(shard, f.retention) else -1
        together[f.retention, f.compaction, alone].append(f)
    with shard.clock.phase("compact"):
        for group in together.values():
            for index in range(len(shard.layers)):
                _compact_layer(shard, index, group)


def _asks_ranks(shard: Shard, retention: Retention) -> bool:
    """Whether the score of a row depends on what other rows or ranks hold.

    Such sequences are selected one by one, in the same order on every rank.
    """
    assert retention.score is not None
    scope = score_method(retention.score).scope
    return scope != "head" or (shard.heads.replicated and num_ring_queries(retention) > 0)


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
        queries = None
        if num_ring_queries(retention):
            queries = _queries(shard, index, present)[torch.from_numpy(number), heads]
        observation = _observation(shard, index, present[0], heads, k_RND, v_RND, queries)
        indices = select_stored(retention, observation, length - slack)
        if not compact_rows(shard.kv, rows, indices):
            for slot in np.unique(rows.slots).tolist():
                shard.refuse(slot)
            return


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
    first: _Firing,
    heads: Ints,
    k_RND: Tensor,
    v_RND: Tensor,
    queries_RWGD: Tensor | None,
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
        compaction=first.compaction,
    )


def _join_others(shard: Shard, index: int, refused: _Firing) -> None:
    """Answer the ranks that select for a slot that this one refused and holds nothing of.

    They wait for its part of the scores. What they make of it does not matter: the sequence will
    start anew.
    """
    retention, heads = refused.retention, shard.heads.kv
    counts = retention.row_tokens(
        refused.prompt_tokens, shard.spec.num_layers, shard.spec.num_kv_heads
    )
    cycle = shard.cycles[refused.slot]
    length = int(counts[shard.layers[index], heads.start]) + cycle.most
    dim, group = shard.spec.head_dim, len(shard.heads.query) // len(heads)
    nothing = torch.zeros(len(heads), length, dim, device=shard.device)
    queries = torch.zeros(len(heads), num_ring_queries(retention), group, dim, device=shard.device)
    local = np.arange(len(heads))
    observation = _observation(shard, index, refused, local, nothing, nothing, queries)
    select_stored(retention, observation, length - cycle.slack)


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
