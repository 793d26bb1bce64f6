"""From scores to the positions that are kept. Exact: given the scores there is one answer.

At prefill (`select`), behind rows of an earlier turn which differ in length (`select_rows`), at a
cut while decoding (`select_stored`, `select_trimmed`), and from one layer to the next
(`surviving_tokens`).

Shapes: n prompt tokens, w recent tokens (the window, or `h2o`'s recent part), s sinks, H local kv
heads, K kv heads of the model, R rows of one layer, N sequences, c context tokens.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .growth import Trim
from .observation import Observation
from .retention import Retention
from .scoring import context_scores
from .shapes import Adaptive


def select(retention: Retention, observation: Observation) -> Tensor | list[Tensor] | None:
    """Choose the prompt tokens that one layer keeps.

    Returns:
        Positions, int64 and ascending, on the keys' device: [H, keep], or one [keep] per local
        head where heads may differ; None when the layer keeps all that the observation shows.

    Raises:
        ValueError: the budget cannot be met (see `Retention.row_tokens`).
    """
    num_tokens, heads = observation.prompt_tokens, observation.heads
    assert isinstance(heads, range), "a prompt is observed with all of the rank's heads"
    rows = retention.row_tokens(
        observation.original_tokens, observation.layers, observation.num_heads
    )
    keep = [min(int(count), num_tokens) for count in rows[observation.layer]]
    if min(keep) == num_tokens:
        return None
    assert retention.score is not None
    scores = context_scores(retention.score, observation, retention.window)
    if retention.ragged:
        return _compete_over_ranks(scores, keep[0], retention, observation)
    mine = keep[heads.start : heads.stop]
    if len(set(keep)) == 1:
        return _kept(scores, mine[0], retention)
    return [_kept(scores[i : i + 1], count, retention)[0] for i, count in enumerate(mine)]


def _kept(scores: Tensor, keep: int, retention: Retention) -> Tensor:
    """Positions [H, keep], given the scores of all tokens before the window."""
    recent = retention.recent_tokens(keep)
    context = scores[:, : scores.shape[1] + retention.window - recent]
    return kept_positions(context, keep, recent, retention.sinks)


def _compete_over_ranks(
    scores: Tensor, keep: int, retention: Retention, observation: Observation
) -> list[Tensor]:
    """What the local heads keep when all of the model's heads compete.

    No rank has to tell the others what it selected: all have the same bits of all heads' scores,
    and from there on numbers are only compared, so all select the same.
    """
    recent = retention.recent_tokens(keep)
    everyone = observation.all_heads(scores)
    context = everyone[:, : scores.shape[1] + retention.window - recent]
    chosen = compete(context, keep, _floor(retention, keep - recent), recent, retention.sinks)
    return [chosen[head] for head in observation.heads]


def _floor(retention: Retention, context_tokens: int) -> int:
    """Of so many context tokens, those that no head shares."""
    assert isinstance(retention.shape, Adaptive), f"heads do not compete under {retention.shape}"
    return math.floor(Fraction(str(retention.shape.floor_ratio)) * context_tokens)


def select_rows(
    retention: Retention,
    observations: Sequence[Observation],
    heads: range,
    gather_heads_fn: Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """`select` among what rows of one layer have, which differ in length.

    Each row is scored by itself, at places in itself, as a prompt of its tokens. It keeps what
    `Retention.row_tokens` gives it of the whole text, or what it has, if that is less. Where the
    heads of a layer compete, they divide as many tokens as the layer is given, or all that they
    have: see `compete`.

    Args:
        retention: that drops some of a text as long as this one.
        observations: the rows of this rank by their length, each with global ids of their heads.
        heads: of this rank; every head is in one observation.
        gather_heads_fn: as of `Observation`.

    Returns:
        Places in its row, int64 [kept] and ascending, for each head.
    """
    assert retention.score is not None
    first = observations[0]
    counts = retention.row_tokens(first.original_tokens, first.layers, first.num_heads)
    keep = counts[first.layer].tolist()
    scored: dict[int, Tensor] = {}
    lengths: dict[int, int] = {}
    for seen in observations:
        lengths |= dict.fromkeys(seen.heads, seen.prompt_tokens)
        if retention.ragged or min(keep[head] for head in seen.heads) < seen.prompt_tokens:
            scores = context_scores(retention.score, seen, retention.window)
            scored |= dict(zip(seen.heads, scores, strict=True))
    if retention.ragged:
        rows = [scored[head] for head in heads]
        return _compete_uneven(rows, keep[0], retention, heads, gather_heads_fn)
    return [
        _kept(scored[head][None], keep[head], retention)[0]
        if keep[head] < lengths[head]
        else torch.arange(lengths[head], device=first.keys.device)
        for head in heads
    ]


def _compete_uneven(
    scores: Sequence[Tensor],
    keep: int,
    retention: Retention,
    heads: range,
    gather_heads_fn: Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """`_compete_over_ranks` of rows whose scores, [n - w] each, differ in length."""

    def all_heads(x: Tensor) -> Tensor:
        return x if gather_heads_fn is None else gather_heads_fn(x)

    recent, device = retention.recent_tokens(keep), scores[0].device
    contexts = [row[: len(row) + retention.window - recent] for row in scores]
    lengths = torch.tensor([[len(row)] for row in contexts], dtype=torch.float32, device=device)
    lengths = all_heads(lengths).long()[:, 0]  # exact: no text has 2^24 tokens
    together = scores[0].new_full((len(heads), int(lengths.max())), -math.inf)
    for padded, row in zip(together, contexts, strict=True):
        padded[together.shape[1] - len(row) :] = row
    num_before = together.shape[1] - lengths
    floor = _floor(retention, keep - recent)
    chosen = compete(all_heads(together), keep, floor, recent, retention.sinks, num_before)
    return [chosen[head] - num_before[head] for head in heads]


def compete(
    scores: Tensor,
    keep: int,
    floor: int,
    recent: int,
    sinks: int,
    num_before: Tensor | None = None,
) -> list[Tensor]:
    """Divide the tokens of one layer over its heads by their scores.

    Each head keeps its recent tokens and sinks. Its best context tokens (sinks are the best) fill
    its first `floor` slots; the rest of the layer's `K * (keep - recent)` slots go to the best
    remaining tokens of all heads together. Of equal scores the later token wins, and of the same
    token the lower head's. Rows of several lengths end together; a head that has fewer context
    tokens than the floor keeps these, and all that all heads have is kept if it is no more.

    Args:
        scores: [K, n - recent], one column per context token (sinks included).
        keep: mean tokens to keep per head, at least `recent + sinks` and at most n.
        floor: context tokens that every head keeps.
        recent: last tokens that are always kept.
        sinks: first tokens that are always kept.
        num_before: so many columns of each head are no tokens, int64 [K]; None: all are.

    Returns:
        Columns, one int64 [kept] per head, ascending; they sum to exactly `K * keep`, or to all
        that there are.
    """
    num_heads, num_context = scores.shape
    safe = max(floor - sinks, 0)
    taken = torch.zeros(num_heads, num_context, dtype=torch.bool, device=scores.device)
    if num_before is None:
        taken[:, :sinks] = True
        taken.scatter_(1, topk_positions(scores[:, sinks:], safe) + sinks, True)
    else:
        place = torch.arange(num_context, device=scores.device) - num_before[:, None]
        is_sink = (place >= 0) & (place < sinks)
        best = topk_positions(scores.masked_fill(is_sink, math.inf), min(safe + sinks, num_context))
        taken.scatter_(1, best, True)
        taken &= place >= 0
    # Best first; among equals the last column first, and in a column the lowest head.
    order = scores.flip(1).T.reshape(-1).sort(descending=True, stable=True).indices
    column, head = num_context - 1 - order // num_heads, order % num_heads
    free = ~taken[head, column]
    if num_before is not None:
        free &= column >= num_before[head]
    rest = num_heads * (keep - recent) - taken.sum()
    taken[head, column] |= free & (free.cumsum(0) <= rest)
    # The host waits for the device twice, whatever the number of heads.
    counts = taken.sum(dim=1).tolist()
    chosen = torch.split(taken.nonzero()[:, 1], counts)
    last = torch.arange(num_context, num_context + recent, device=scores.device)
    return [torch.cat([row, last]) for row in chosen]


def select_stored(retention: Retention, observation: Observation, keep: int) -> Tensor:
    """Choose which stored tokens of some rows stay at a compaction, by the score of the prefill.

    The observation is that of a prompt, with the stored tokens for its tokens: they lie in the
    order of the text, the first are the sinks, and the last w are the last w tokens of the text,
    because every compaction keeps these. So each score means what it means at prefill: the window
    scores look at what the last w queries attend to among the stored keys, `streaming` keeps the
    most recent, `knorm` the keys of least norm, `h2o` those that all queries so far attended to
    the most (besides the recent part of the row). `random` draws anew at each compaction, by the
    place in storage and `observation.compaction`, because the original positions are not known.

    Args:
        retention: with a decode stage and a score.
        observation: R rows of n stored tokens each, as `heads`; all of one sequence, and all its
            local heads in order, where the score's scope is more than a head.
        keep: tokens that stay in each row. Where propagation left a row fewer than window and
            sinks, the sinks and as many of the last tokens stay.

    Returns:
        int64 [R, keep], places in storage, ascending in each row.
    """
    assert retention.score is not None
    num_rows, num_tokens = len(observation.heads), observation.prompt_tokens
    recent, sinks = retention.recent_tokens(keep), retention.sinks
    if keep <= recent + sinks:
        places = torch.arange(num_tokens, device=observation.keys.device)
        sinks = min(sinks, keep)
        stays = torch.cat([places[:sinks], places[num_tokens - keep + sinks :]])
        return stays.expand(num_rows, -1)
    scores = context_scores(retention.score, observation, retention.window)
    return kept_positions(scores[:, : num_tokens - recent], keep, recent, sinks)


def select_ends(
    retention: Retention, observation: Observation, lengths: Tensor, keep: Tensor, recent: Tensor
) -> Tensor:
    """`select_stored` for rows of different lengths, which end together.

    What stands before a row's first token must get no attention.

    Args:
        retention: with a decode stage, and a score that depends on no other head and not on places.
        observation: R rows of n columns; the tokens of each are the last ones.
        lengths: of each row, int64 [R].
        keep: tokens that stay in each, int64 [R].
        recent: last ones of these that stay whatever their score, int64 [R].

    Returns:
        bool [R, n], whether a column stays.
    """
    assert retention.score is not None
    num_tokens = observation.prompt_tokens
    scores = observation.keys.new_full((len(lengths), num_tokens), -math.inf, dtype=torch.float32)
    if num_tokens > retention.window:  # else all that stays is certain
        context = context_scores(retention.score, observation, retention.window)
        scores[:, : context.shape[1]] = context
    place = torch.arange(num_tokens, device=scores.device) - (num_tokens - lengths)[:, None]
    scores.masked_fill_(place < 0, -math.inf)
    sinks = (keep - recent).clamp_max(retention.sinks)
    certain = (place >= 0) & (place < sinks[:, None]) | (place >= (lengths - recent)[:, None])
    scores.masked_fill_(certain, math.inf)
    order = scores.flip(1).sort(dim=1, descending=True, stable=True).indices
    is_kept = torch.arange(num_tokens, device=scores.device) < keep[:, None]
    return torch.zeros_like(certain).scatter_(1, order, is_kept).flip(1)


def select_trimmed(scores: Tensor, trim: Trim) -> Tensor:
    """Choose what stays of one layer of sequences that are trimmed; all its heads keep the same.

    Args:
        scores: of the tokens of each sequence that may be cut, [N, stop - start]: the attention
            that they get, as a mean over all query heads. With the published trigger that is
            PyramidInfer's own (arXiv 2405.12532): the mean over the last query and the recent
            ones, weighted from 1 for the oldest to `distance_weight`. With ours it is the last
            query's. Of equal scores the later token wins.
        trim: what is cut.

    Returns:
        int64 [N, stored - (stop - start) + keep], places in storage, ascending in each row.
    """
    chosen = topk_positions(scores, trim.keep) + trim.start
    places = torch.arange(trim.stored, device=scores.device).expand(len(scores), -1)
    return torch.cat([places[:, : trim.start], chosen, places[:, trim.stop :]], dim=1)


def surviving_tokens(scores: Tensor, num_kept: int, num_recent: int, sinks: int) -> Tensor:
    """The sinks, the best other context tokens, and the recent ones; of equal scores the later.

    Args:
        scores: [c], one per context token, sinks included.
        num_kept: tokens to keep in all, at least `num_recent + sinks`.
        num_recent: r.
        sinks: first tokens that are always kept.

    Returns:
        int64 [num_kept], ascending.
    """
    num_context = len(scores)
    sinks = min(sinks, num_context)
    best = topk_positions(scores[None, sinks:], num_kept - num_recent - sinks)[0] + sinks
    tokens = torch.arange(num_context + num_recent, device=scores.device)
    return torch.cat([tokens[:sinks], best, tokens[num_context:]])


def kept_positions(scores: Tensor, keep: int, window: int, sinks: int) -> Tensor:
    """The sinks, the best of the other context tokens, and the window.

    Args:
        scores: [H, n - window], one column per context token (sinks included).
        keep: tokens to keep per head, at least `window + sinks` and at most n.
        window: last tokens that are always kept.
        sinks: first tokens that are always kept.

    Returns:
        int64 [H, keep], ascending in each row.
    """
    num_heads, num_context = scores.shape
    chosen = topk_positions(scores[:, sinks:], keep - window - sinks) + sinks
    positions = torch.arange(num_context + window, device=scores.device).expand(num_heads, -1)
    return torch.cat([positions[:, :sinks], chosen, positions[:, num_context:]], dim=1)


def topk_positions(scores: Tensor, k: int) -> Tensor:
    """The columns of the k largest scores of each row; of equal scores the later column wins.

    Args:
        scores: [H, m].
        k: columns to take, 0 <= k <= m.

    Returns:
        int64 [H, k], ascending in each row.
    """
    assert 0 <= k <= scores.shape[1]
    order = scores.flip(1).sort(dim=1, descending=True, stable=True).indices
    columns = scores.shape[1] - 1 - order[:, :k]
    return columns.sort(dim=1).values
