"""How a budget spreads over the layers.

A shape says how many tokens each layer would keep, as exact fractions that sum to the total;
`settle` makes them integers. All numbers are tokens per kv head.
"""

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
    window = retention.window
    context = mean_tokens - window
    least = max(Fraction(retention.sinks), context / Fraction(str(retention.beta)))
    most = 2 * context - least
    if most > prompt_tokens - window:
        most = Fraction(prompt_tokens - window)
        least = 2 * context - most
    bottom, step = window + most, (most - least) / (num_layers - 1)
    return [bottom - layer * step for layer in range(num_layers)]


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


def _shift(targets: Sequence[Fraction], total: int, floor: int, cap: int) -> Fraction:
    """Find the amount that, added to all targets, makes their bounded sum equal `total`."""

    def bounded_sum(shift: Fraction) -> Fraction:
        return sum((_bound(target + shift, floor, cap) for target in targets), Fraction(0))

    # The sum grows with the shift, in straight lines between the shifts at which a target meets a
    # bound: find the line that crosses the total.
    corners = sorted({bound - target for target in targets for bound in (floor, cap)})
    right = bisect_left(corners, Fraction(total), key=bounded_sum)
    high, sum_high = corners[right], bounded_sum(corners[right])
    if sum_high == total:
        return high
    low, sum_low = corners[right - 1], bounded_sum(corners[right - 1])
    return low + (total - sum_low) * (high - low) / (sum_high - sum_low)


def _bound(target: Fraction, floor: int, cap: int) -> Fraction:
    return min(max(target, Fraction(floor)), Fraction(cap))
