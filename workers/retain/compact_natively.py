"""Compacts all rows of sequences of one retention in a single native call, on a CPU.

What it keeps is what `compact.py` would keep, but for the rounding of scores.

Shapes: N sequences, L local layers without a window, H local kv heads, R = N * L * H rows.
"""

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.retention import Retention
from saqqara.compression.scores import H2O, KNorm, SnapKV, Streaming
from saqqara.workers.kv.rows import shorten
from saqqara.workers.native.compact import (
    MAX_KERNEL_SIZE,
    CutRows,
    ScoreKind,
    Scoring,
    compact,
)
from saqqara.workers.shard import Shard

Ints = NDArray[np.int64]


def compacts_natively(shard: Shard, retention: Retention) -> bool:
    """Whether `compact_slots` can do it: with native attention, and a score that it knows."""
    score, kv = retention.score, shard.kv
    if shard.part.backend.name != "cpu" or kv.table.mirror is not None or kv.moves is not None:
        return False
    if kv.pool.any_shared or (isinstance(score, SnapKV) and score.kernel_size > MAX_KERNEL_SIZE):
        return False
    # A subclass may score otherwise.
    return type(score) in (Streaming, KNorm, SnapKV, H2O)


def compact_slots(shard: Shard, retention: Retention, slots: Ints, stops: Ints, slack: int) -> None:
    """Cut `slack` tokens off every row without a window; surplus pages are free at once.

    Args:
        shard: no slot of it shares pages.
        retention: theirs, one that `compacts_natively`.
        slots: [N].
        stops: the position after the last token of each, [N].
        slack: tokens that go.
    """
    kv, layers = shard.kv, shard.kv.rings.others
    rows_of = np.ix_(slots, layers)
    length_NLH = kv.table.kept[rows_of].astype(np.int64)
    keep_NLH = length_NLH - slack
    assert keep_NLH.min() >= 0, f"{slack} of {length_NLH.min()} tokens"
    scoring, first_query_LH, first_sum_NLH = _scoring(shard, retention, slots, stops)
    sinks, recent = certain_tokens(retention, keep_NLH)
    every = keep_NLH.shape
    rows = CutRows(
        first_entry=kv.table.first_entry[rows_of].reshape(-1),
        length=length_NLH.reshape(-1),
        keep=keep_NLH.reshape(-1),
        sinks=sinks.reshape(-1),
        recent=recent.reshape(-1),
        sequence=np.arange(len(slots)).repeat(every[1] * every[2]),
        first_query=np.broadcast_to(first_query_LH, every).reshape(-1),
        first_sum=np.broadcast_to(first_sum_NLH, every).reshape(-1),
    )
    heads, pool = shard.part.heads, kv.pool
    group = len(heads.query) // len(heads.kv)
    compact(pool.k_pages, pool.v_pages, kv.table.device_pages, rows, group, scoring)
    keep = kv.table.kept[slots]
    keep[:, layers] = keep_NLH
    shorten(kv, slots, keep)


def certain_tokens(retention: Retention, keep: Ints) -> tuple[Ints, Ints]:
    """The sinks and the recent tokens of rows that keep so many, as `select_stored` has them.

    All of any shape, the same.
    """
    counts, where = np.unique(keep, return_inverse=True)
    recent = np.array([retention.recent_tokens(count) for count in counts.tolist()])
    sinks = np.where(counts <= recent + retention.sinks, counts, retention.sinks)
    sinks = np.minimum(sinks, retention.sinks)
    recent = np.minimum(recent, counts - sinks)
    where = where.reshape(keep.shape)
    return sinks[where], recent[where]


def _scoring(
    shard: Shard, retention: Retention, slots: Ints, stops: Ints
) -> tuple[Scoring, Ints, Ints]:
    """How rows are scored, and where their queries, [L, H], and sums, [N, L, H], begin."""
    part, score, nothing = shard.part, retention.score, np.zeros(1, dtype=np.int64)
    layers, heads = shard.kv.rings.others[:, None], np.arange(len(part.heads.kv))
    if isinstance(score, SnapKV):
        queries, places = shard.rings.last(slots, stops)
        _, num_places, num_query_heads, dim = queries.shape
        group = num_query_heads // len(heads)
        first_query = (layers * num_places * num_query_heads + heads * group) * dim
        scoring = Scoring(
            ScoreKind.WINDOW,
            divisor=places.shape[1] * part.spec.group_size,
            scale=part.scale,
            softcap=part.backend.softcap,
            window=retention.window,
            kernel_size=score.kernel_size,
            pooling=score.pooling,
            queries=queries,
            places=places,
        )
        return scoring, first_query, nothing
    if isinstance(score, H2O):
        sums = shard.sums.buffer
        _, num_places, num_heads, width = sums.shape
        place = shard.sums.places(slots)[:, None, None]
        row = (layers * num_places + place) * num_heads + heads
        scoring = Scoring(ScoreKind.SUMS, divisor=part.spec.group_size, sums=sums)
        return scoring, nothing, row * width
    kind = ScoreKind.NORMS if isinstance(score, KNorm) else ScoreKind.RECENCY
    return Scoring(kind), nothing, nothing
