"""Which tokens go on to the next layer, given how much attention the others' keys got.

Every tensor rank selects from the same numbers by the same exact rule, so all have the same tokens.

Shapes: c context tokens of those that entered the layer, r recent ones after them, H kv heads of
the whole model.
"""

import torch
from torch import Tensor

from .propagate import Propagate
from .scores import pooled
from .select import topk_positions


def query_weights(propagate: Propagate, num_queries: int, device: torch.device) -> Tensor | None:
    """Weights of the recent queries, fp32 [r], from the first to the last; None for 1 each.

    PyramidInfer weighs nearer queries more: linear from 1 to `distance_weight`.
    """
    if propagate.kind == "once":
        return None
    return torch.linspace(1, propagate.distance_weight, num_queries, device=device)


def token_scores(propagate: Propagate, mass_Hc: Tensor, num_queries: int, group: int) -> Tensor:
    """Scores of the context tokens, fp32 [c]: means over queries and all query heads.

    Args:
        propagate: its kind decides the score. `pyramidinfer`: arXiv 2405.12532, the weighted mean
            itself. `once`: SnapKV's score (pooled over neighbours, per kv head), then the mean
            over kv heads, as FastKV (arXiv 2502.01068).
        mass_Hc: attention on the keys of the context, [H, c], summed over the recent queries (with
            their weights) and the query heads of each kv head.
        num_queries: r.
        group: query heads of one kv head.
    """
    context = mass_Hc / (num_queries * group)
    if propagate.kind == "once":
        context = pooled(context, propagate.kernel_size, propagate.pooling)
    return context.mean(dim=0)


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
