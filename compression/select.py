"""From scores to the positions that are kept. Exact: given the scores there is one answer.

Shapes: n prompt tokens, w window tokens, s sinks, H local kv heads.
"""

import torch
from torch import Tensor

from .observation import Observation
from .registry import score_method
from .retention import Retention


def select(retention: Retention, observation: Observation) -> Tensor | None:
    """Choose the prompt tokens that one layer keeps.

    Returns:
        int64 [H, keep], ascending in each row, on the keys' device; None when the layer keeps all
        that the observation shows.

    Raises:
        ValueError: the budget cannot be met (see `Retention.layer_tokens`).
    """
    num_tokens = observation.prompt_tokens
    keep = retention.layer_tokens(observation.original_tokens, observation.num_layers)[
        observation.layer
    ]
    if keep == num_tokens:
        return None
    assert retention.score is not None
    method = score_method(retention.score)
    assert method.scope == "head"
    scores = method.function(observation, retention)
    return kept_positions(scores, keep, retention.window, retention.sinks)


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
