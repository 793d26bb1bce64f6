"""Compacts rows while their sequences decode.

All rows of a sequence with targets reach their limits in the same step (`growth.Cycle`).
After the layers of that step the rows of all such sequences that are scored alike are selected and
compacted together: on a CPU in one native call (`compact_natively.py`), else layer by layer.

Shapes: N sequences, R rows of one layer, n stored tokens of each, w queries, Hq local query heads,
H local kv heads, G = Hq / H, D head dim.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.growth import num_ring_queries, sums_mass
from saqqara.compression.retention import Retention
from saqqara.compression.scores import H2O, KNorm, SnapKV, Streaming, Tova
from saqqara.compression.selecting import select_ends, select_stored
from saqqara.workers.kv.rows import Rows, compact_each, compact_rows, read_ends, read_rows
from saqqara.workers.plan import DecodeItem
from saqqara.workers.shard import Shard
from saqqara.workers.transfer import to_device

from .compact_natively import certain_tokens, compact_slots, compacts_natively
from .observe import no_rows, observe_rows

_SAME_EACH_TIME = {Streaming, SnapKV, KNorm, H2O, Tova}  # whichever compaction of a sequence it is


@dataclass(frozen=True, slots=True)
class _Firing:
    """A sequence whose rows are to be compacted; `next_position` is that of its next token."""

    slot: int
    retention: Retention
    next_position: int
    compaction: int


def compact_firing(shard: Shard, items: tuple[DecodeItem, ...]) -> None:
    """Compact the rows of those sequences that are at their limits after the items just fed."""
    firing = [f for item in items if (f := _firing(shard, item)) is not None]
    if not firing:
        return
    with shard.clock.phase("compact"):
        for group in _alike(shard, firing):
            with shard.faults.blame([f.slot for f in group], "compaction"):
                _compact(shard, group)


def _compact(shard: Shard, group: list[_Firing]) -> None:
    """Compact sequences of one retention: in one native call, or layer by layer.

    Layers with a window are left out: what their rows hold is what its tokens see. Within a layer
    all rows are compacted together, but where ranks are asked or scores depend on
    places: then those of one length are.
    """
    retention, layers = group[0].retention, shard.kv.rings.others.tolist()
    if not layers:
        return  # this stage has none but with a window
    if _asks_ranks(shard, retention) or _counts_compactions(retention):
        for index in layers:
            _compact_layer(shard, index, group)
        return
    present = [f for f in group if f.slot not in shard.faults.refused]
    if present and not compacts_natively(shard, retention):
        for index in layers:
            _compact_rows(shard, index, [f for f in present if f.slot not in shard.faults.refused])
    elif present:
        slots = np.array([f.slot for f in present], dtype=np.int64)
        stops = np.array([f.next_position for f in present], dtype=np.int64)
        slack = shard.retained.cycles[present[0].slot].slack
        compact_slots(shard, retention, slots, stops, slack)


def _alike(shard: Shard, firing: list[_Firing]) -> list[list[_Firing]]:
    """The sequences by what selects their tokens; each by itself where ranks are asked."""
    together: dict[tuple[object, ...], list[_Firing]] = defaultdict(list)
    for number, f in enumerate(firing):
        alone = number if _asks_ranks(shard, f.retention) else -1
        draw = f.compaction if _counts_compactions(f.retention) else 0
        together[f.retention, draw, alone].append(f)
    return list(together.values())


def _counts_compactions(retention: Retention) -> bool:
    """Whether scores may depend on how often a sequence was compacted.

    Of ours `random` draws anew each time; what a score from elsewhere does is not known.
    """
    return type(retention.score) not in _SAME_EACH_TIME


def _asks_ranks(shard: Shard, retention: Retention) -> bool:
    """Whether the score of a row depends on what other rows or ranks hold.

    Such sequences are selected one by one, in the same order on every rank.
    """
    assert retention.score is not None
    if retention.score.scope != "head":
        return True
    attends = num_ring_queries(retention) > 0 or sums_mass(retention)
    return shard.part.heads.replicated and attends


def _firing(shard: Shard, item: DecodeItem) -> _Firing | None:
    cycle = shard.retained.cycles.get(item.slot)
    if cycle is None:
        return None
    held, stop = shard.slots[item.slot], item.position + item.num_tokens
    fed = stop - held.prompt_tokens
    assert cycle.room(fed - item.num_tokens) >= item.num_tokens, f"{item} spans a compaction"
    if not cycle.fires(fed):
        return None
    compaction = cycle.num_compactions(fed)
    return _Firing(item.slot, held.retention, stop, compaction)


def _compact_layer(shard: Shard, index: int, group: list[_Firing]) -> None:
    """Compact one local layer of sequences of one retention, row length by row length."""
    present = [f for f in group if f.slot not in shard.faults.refused]
    if not present:
        if _asks_ranks(shard, group[0].retention):
            _join_others(shard, index, group[0])
        return
    slots = np.array([f.slot for f in present], dtype=np.int64)
    lengths = shard.kv.table.kept[slots, index]  # [N, H]
    for length in np.unique(lengths).tolist():
        number, heads = np.nonzero(lengths == length)
        rows = Rows(index, slots[number], heads)
        indices = _select(shard, rows, present, number, length)
        if not compact_rows(shard.kv, rows, indices):
            for slot in np.unique(rows.slots).tolist():
                shard.refuse(slot)
            return
        if sums_mass(present[0].retention):
            shard.sums.compact(rows.slots, index, heads, indices)


def _compact_rows(shard: Shard, index: int, present: list[_Firing]) -> None:
    """Compact all rows of one local layer of sequences of one retention together."""
    if not present:
        return
    retention, num_heads = present[0].retention, len(shard.part.heads.kv)
    slots = np.array([f.slot for f in present], dtype=np.int64)
    heads = np.tile(np.arange(num_heads), len(slots))
    rows = Rows(index, slots.repeat(num_heads), heads)
    length = shard.kv.table.kept[rows.slots, index, heads].astype(np.int64)
    keep = length - shard.retained.cycles[present[0].slot].slack
    _, recent = certain_tokens(retention, keep)
    num_before = to_device(length.max() - length, shard.part.device)
    k_RND, v_RND = read_ends(shard.kv, rows)
    queries = masses = None
    if num_ring_queries(retention):
        queries = _queries(shard, index, present).flatten(0, 1)
    if sums_mass(retention):
        masses = shard.sums.read_ends(rows.slots, index, heads, length)
    observation = observe_rows(
        shard.part, index, heads, k_RND, v_RND, queries, masses, num_before=num_before
    )
    of_rows = (to_device(count, shard.part.device) for count in (length, keep, recent))
    stays = select_ends(retention, observation, *of_rows)
    row, column = torch.nonzero_static(stays, size=int(keep.sum())).unbind(1)
    indices, counts = column - num_before[row], keep.astype(np.int32)
    if not compact_each(shard.kv, rows, indices, counts):
        for slot in slots.tolist():
            shard.refuse(slot)
        return
    if sums_mass(retention):
        shard.sums.compact_each(rows.slots, index, heads, indices, counts)


def _select(
    shard: Shard, rows: Rows, firing: list[_Firing], number: NDArray[np.int64], length: int
) -> Tensor:
    """Which tokens rows of one length keep, int64 [R, keep]; row i is of `firing[number[i]]`."""
    retention, slack = firing[0].retention, shard.retained.cycles[firing[0].slot].slack
    k_RND, v_RND = read_rows(shard.kv, rows)
    queries = masses = None
    if num_ring_queries(retention):
        by_sequence = _queries(shard, rows.layer, firing)
        queries = by_sequence[torch.from_numpy(number), rows.heads]
    if sums_mass(retention):
        masses = shard.sums.read(rows.slots, rows.layer, rows.heads, length)
    observation = observe_rows(
        shard.part, rows.layer, rows.heads, k_RND, v_RND, queries, masses, firing[0].compaction
    )
    return select_stored(retention, observation, length - slack)


def _queries(shard: Shard, index: int, firing: list[_Firing]) -> Tensor:
    """The remembered queries of one local layer by kv head, [N, H, w, G, D]."""
    slots = np.array([f.slot for f in firing], dtype=np.int64)
    stops = np.array([f.next_position for f in firing], dtype=np.int64)
    ring = shard.rings.read(slots, index, stops)  # [N, w, Hq, D]
    grouped = ring.view(*ring.shape[:2], len(shard.part.heads.kv), -1, ring.shape[-1])
    return grouped.transpose(1, 2)


def _join_others(shard: Shard, index: int, refused: _Firing) -> None:
    """Answer the ranks that select for a slot that this one refused and holds nothing of.

    They wait for its part of the scores, row length by row length. What they make of it does not
    matter: the sequence will start anew.
    """
    part, retention, cycle = shard.part, refused.retention, shard.retained.cycles[refused.slot]
    lengths = shard.retained.after_prefill[refused.slot][index] + cycle.most
    group, dim = len(part.heads.query) // len(part.heads.kv), part.spec.head_dim
    for length in np.unique(lengths).tolist():
        heads = np.flatnonzero(lengths == length)
        nothing = no_rows(part, length)[: len(heads)]
        queries = masses = None
        if num_queries := num_ring_queries(retention):
            queries = torch.zeros(len(heads), num_queries, group, dim, device=part.device)
        if sums_mass(retention):
            masses = torch.zeros(len(heads), length, device=part.device)
        observation = observe_rows(
            part, index, heads, nothing, nothing, queries, masses, refused.compaction
        )
        select_stored(retention, observation, length - cycle.slack)
