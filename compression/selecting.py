"""From scores to the positions that are kept. Exact: given the scores there is one answer.

At prefill (`select`), at a cut while decoding (`select_stored`, `select_trimmed`), and from one
layer to the next (`surviving_tokens`).

Shapes: n prompt tokens, w recent tokens (the window, or `h2o`'s recent part), s sinks, H local kv
heads, K kv heads of the model, R rows of one layer, N sequences, c context tokens.
"""

import math
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
    assert isinstance(retention.shape, Adaptive), f"heads do not compete under {retention.shape}"
    floor = math.floor(Fraction(str(retention.shape.floor_ratio)) * (keep - recent))
    chosen = compete(context, keep, floor, recent, retention.sinks)
    return [chosen[head] for head in observation.heads]


def compete(scores: Tensor, keep: int, floor: int, recent: int, sinks: int) -> list[Tensor]:
    """Divide the tokens of one layer over its heads by their scores.

    Each head keeps its recent tokens and sinks. Its best context tokens (sinks are the best) fill
    its first `floor` slots; the rest of the layer's `K * (keep - recent)` slots go to the best
    remaining tokens of all heads together. Of equal scores the later token wins, and of the same
    token the lower head's.

    Args:
        scores: [K, n - recent], one column per context token (sinks included).
        keep: mean tokens to keep per head, at least `recent + sinks` and at most n.
        floor: context tokens that every head keeps.
        recent: last tokens that are always kept.
        sinks: first tokens that are always kept.

    Returns:
        One int64 [kept] per head, ascending; they sum to exactly `K * keep`.
    """
    num_heads, num_context = scores.shape
    safe = max(floor - sinks, 0)
    taken = torch.zeros(num_heads, num_context, dtype=torch.bool, device=scores.device)
    taken[:, :sinks] = True
    taken.scatter_(1, topk_positions(scores[:, sinks:], safe) + sinks, True)
    # Best first; among equals the last column first, and in a column the lowest head.
    order = scores.flip(1).T.reshape(-1).sort(descending=True, stable=True).indices
    column, head = num_context - 1 - order // num_heads, order % num_heads
    free = ~taken[head, column]
    rest = num_heads * (keep - recent - max(floor, sinks))
    taken[head, column] = ~free | (free.cumsum(0) <= rest)
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
