"""How many tokens of a prompt each row keeps: a retention's shape, settled to integers.

Cached: the scheduler and every worker ask for the same prompts in every layer.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .budgets import settle
from .registry import budget_shape

if TYPE_CHECKING:
    from .retention import Retention


@lru_cache(maxsize=8192)
def layer_tokens(retention: "Retention", prompt_tokens: int, num_layers: int) -> tuple[int, ...]:
    """See `Retention.layer_tokens`."""
    entering = retention.entering_tokens(prompt_tokens, num_layers)
    layers, total = _shared_budget(retention, prompt_tokens, num_layers)
    if not layers:
        return entering
    shape = budget_shape(retention.shape).function
    assert shape is not None, f"shape {retention.shape!r} has rows, not layers"
    targets = shape(retention, Fraction(total, len(layers)), prompt_tokens, len(layers))
    counts = [prompt_tokens] * num_layers
    floor = retention.window + retention.sinks
    for layer, count in zip(layers, settle(targets, total, floor, prompt_tokens), strict=True):
        counts[layer] = count
    return tuple(map(min, counts, entering))


@lru_cache(maxsize=8192)
def row_tokens(
    retention: "Retention", prompt_tokens: int, num_layers: int, num_heads: int
) -> np.ndarray:
    """See `Retention.row_tokens`."""
    shape = budget_shape(retention.shape).row_function
    if shape is None:
        layers = np.array(layer_tokens(retention, prompt_tokens, num_layers), dtype=np.int32)
        return np.broadcast_to(layers[:, None], (num_layers, num_heads))

    assert retention.profile is not None
    weights = retention.profile.weights(num_layers, num_heads)
    shared, total = _shared_budget(retention, prompt_tokens, num_layers)
    rows = np.full((num_layers, num_heads), prompt_tokens, dtype=np.int32)
    if shared:
        mean = Fraction(total, len(shared))
        targets = shape(retention, mean, prompt_tokens, shared, weights)
        floor = retention.window + retention.sinks
        counts = settle(targets, total * num_heads, floor, prompt_tokens)
        rows[shared] = np.reshape(counts, (len(shared), num_heads))
    entering = np.array(retention.entering_tokens(prompt_tokens, num_layers), dtype=np.int32)
    np.minimum(rows, entering[:, None], out=rows)
    rows.setflags(write=False)
    return rows


def _shared_budget(
    retention: "Retention", prompt_tokens: int, num_layers: int
) -> tuple[list[int], int]:
    """The layers that drop tokens, and what they keep together per kv head; none: all keep all."""
    skipped = retention.skip_layers
    if skipped and skipped[-1] >= num_layers:
        raise ValueError(
            f"skip_layers: {skipped[-1]} is no layer of this model, which has layers 0 to "
            f"{num_layers - 1}"
        )
    budget = retention.budget_tokens(prompt_tokens)
    if budget == prompt_tokens:
        return [], 0

    layers = [layer for layer in range(num_layers) if layer not in skipped]
    total = num_layers * budget - len(skipped) * prompt_tokens
    floor = retention.window + retention.sinks
    if not layers or total < len(layers) * floor:
        least = math.ceil((len(skipped) * prompt_tokens + len(layers) * floor) / num_layers)
        raise ValueError(
            f"skip_layers: {len(skipped)} of {num_layers} layers keep all {prompt_tokens} tokens, "
            f"which with the window and sinks of the others is more than budget {budget} allows; "
            f"it takes a budget of at least {least}"
        )
    return layers, total
