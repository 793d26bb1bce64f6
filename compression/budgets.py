"""How a budget spreads over the layers.

A shape says how many tokens each layer (`profile`: each row, which is a kv head of a layer) would
keep, as exact fractions that sum to the total; `settle` makes them integers. All numbers are tokens
per kv head.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .retention import Retention


def uniform(
    retention: "Retention", mean_tokens: Fraction, prompt_tokens: int, num_layers: int
) -> list[Fraction]:
    """Give every layer the same."""
    return [mean_tokens] * num_layers


def pyramid(
    retention: "Retention", mean_tokens: Fraction, prompt_tokens: int, num_layers: int
) -> list[Fraction]:
    """Give less to each layer than to the one below it, in equal steps.

    PyramidKV, arXiv 2406.02069, section 4.1. Besides the window, the top layer keeps the
    `beta`-th part of the mean (never less than the sinks) and the bottom layer as much more than
    the mean as the top one keeps less; where that is more than the prompt has, the bottom layer
    keeps the prompt and the top one rises.

    The shape never changes silently: KVCache-Factory goes uniform when the prompt is shorter than
    twice the context budget, kvpress when the top layer would keep less than the window. Here a
    short prompt gets a flatter pyramid of the same mean. A model of one layer gets the mean.
    """
    if num_layers == 1:
        return [mean_tokens]
    bottom, top = _ends(retention, mean_tokens, prompt_tokens)
    step = (bottom - top) / (num_layers - 1)
    return [bottom - layer * step for layer in range(num_layers)]


def cosine(
    retention: "Retention", mean_tokens: Fraction, prompt_tokens: int, num_layers: int
) -> list[Fraction]:
    """Give less to each layer than to the one below it, along half a cosine.

    The lowest and the highest layer keep what they keep under `pyramid`. Between them layer l of L
    lies at (cos(pi * l / (L - 1)) + 1) / 2 of the way from the highest's to the lowest's: the curve
    of PyramidInfer (arXiv 2405.12532), which has `l / L`, so stretched that it ends at the top
    layer; its mean is then the budget, with nothing to correct. A model of one layer gets the mean.
    """
    if num_layers == 1:
        return [mean_tokens]
    bottom, top = _ends(retention, mean_tokens, prompt_tokens)
    return [top + (bottom - top) * part for part in _half_cosine(num_layers)]


def _half_cosine(num_layers: int) -> list[Fraction]:
    """From 1 down to 0; symmetric, so the mean is exactly 1/2.

    In steps of 2^-32: every machine gets the same, whatever the last bit of its cosine.
    """
    parts = [(math.cos(math.pi * i / (num_layers - 1)) + 1) / 2 for i in range(num_layers // 2)]
    lower = [Fraction(round(part * 2**32), 2**32) for part in parts]
    middle = [Fraction(1, 2)] if num_layers % 2 else []
    return [*lower, *middle, *(1 - part for part in reversed(lower))]


def adaptive(
    retention: "Retention", mean_tokens: Fraction, prompt_tokens: int, num_layers: int
) -> list[Fraction]:
    """Spread over the layers as the shape `mean` does; a layer's heads compete for what it has.

    Ada-KV, arXiv 2407.11550; with `mean: pyramid` its Ada-PyramidKV. How a layer's tokens are
    divided over its heads is up to their scores: see `select.compete`.
    """
    return MEANS[retention.mean](retention, mean_tokens, prompt_tokens, num_layers)


def profile(
    retention: "Retention",
    mean_tokens: Fraction,
    prompt_tokens: int,
    layers: Sequence[int],
    weights: Sequence[Sequence[Fraction]],
) -> list[Fraction]:
    """Give each head a small equal part of the budget and divide the rest by their measured scores.

    HeadKV, arXiv 2410.19258, section 3.2. Besides the window, with b the mean of the rows, each
    row keeps `b * (1 - 1 / head_beta)` and its share of all other tokens, which is its weight among
    all weights. Rows are bounded by the prompt and by window and sinks, and what the bounds take or
    give is redistributed by weight; only once all rows with a weight are full do those without get
    more.

    Args:
        retention: the settings.
        mean_tokens: mean tokens of these layers' rows.
        prompt_tokens: length of the prompt.
        layers: the layers that share the budget.
        weights: of all layers' kv heads, [layers of the model][kv heads].

    Returns:
        One target per row, layer by layer.
    """
    flat = [weight for layer in layers for weight in weights[layer]]
    total = mean_tokens * len(flat)
    floor, cap = retention.window + retention.sinks, prompt_tokens
    equal = (mean_tokens - retention.window) * (1 - 1 / Fraction(str(retention.head_beta)))
    base = max(retention.window + equal, Fraction(floor))
    num_weighted = sum(weight > 0 for weight in flat)
    num_others = len(flat) - num_weighted
    if num_weighted * cap + num_others * base < total:
        rest = (total - num_weighted * cap) / num_others
        return [Fraction(cap) if weight else rest for weight in flat]
    amount = _shift([retention.window + equal] * len(flat), total, floor, cap, flat)
    return [_bound(retention.window + equal + weight * amount, floor, cap) for weight in flat]


MEANS = {"uniform": uniform, "pyramid": pyramid, "cosine": cosine}
"""The shapes that `adaptive` can take its layers' budgets from."""


def _ends(
    retention: "Retention", mean_tokens: Fraction, prompt_tokens: int
) -> tuple[Fraction, Fraction]:
    """What the lowest and the highest layer of a pyramid keep; their mean is the mean."""
    window = retention.window
    context = mean_tokens - window
    least = max(Fraction(retention.sinks), context / Fraction(str(retention.beta)))
    most = 2 * context - least
    if most > prompt_tokens - window:
        most = Fraction(prompt_tokens - window)
        least = 2 * context - most
    return window + most, window + least


def settle(targets: Sequence[Fraction], total: int, floor: int, cap: int) -> list[int]:
    """Turn each layer's target into an integer within [floor, cap], summing to exactly `total`.

    The targets sum to `total` too. What the bounds give to a layer or take from it is shared
    equally by the layers that they leave free: all targets shift by the one amount that makes the
    sum right after bounding. Then all are rounded down and the remainder goes, one token each, to
    the lowest layers below the cap.
    """
    assert len(targets) * floor <= total <= len(targets) * cap
    if any(not floor * t.denominator <= t.numerator <= cap * t.denominator for t in targets):
        shift = _shift(targets, total, floor, cap)
        targets = [_bound(target + shift, floor, cap) for target in targets]
    counts = [target.numerator // target.denominator for target in targets]
    remainder = total - sum(counts)
    for layer, count in enumerate(counts):
        if remainder and count < cap:
            counts[layer] += 1
            remainder -= 1
    assert remainder == 0
    return counts


def _shift(
    targets: Sequence[Fraction],
    total: int | Fraction,
    floor: int,
    cap: int,
    weights: Sequence[Fraction] | None = None,
) -> Fraction:
    """Find the amount that makes the sum right once `weight` times it is added to each target.

    That is the sum after bounding, which must equal `total`; weights are 1 by default.
    """
    weights = weights or [Fraction(1)] * len(targets)
    pairs = list(zip(targets, weights, strict=True))

    def bounded_sum(shift: Fraction) -> Fraction:
        return sum(
            (_bound(target + weight * shift, floor, cap) for target, weight in pairs), Fraction(0)
        )

    # The sum grows with the shift, in straight lines between the shifts at which a target meets a
    # bound: find the line that crosses the total.
    corners = sorted(
        {(bound - target) / weight for target, weight in pairs if weight for bound in (floor, cap)}
    )
    right = bisect_left(corners, Fraction(total), key=bounded_sum)
    high, sum_high = corners[right], bounded_sum(corners[right])
    if sum_high == total:
        return high
    low, sum_low = corners[right - 1], bounded_sum(corners[right - 1])
    return low + (total - sum_low) * (high - low) / (sum_high - sum_low)


def _bound(target: Fraction, floor: int, cap: int) -> Fraction:
    return min(max(target, Fraction(floor)), Fraction(cap))
