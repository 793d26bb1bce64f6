"""The budget shapes: how a budget spreads over the layers, or over the heads of all layers.

A shape says how many tokens each layer (`profile`: each row, which is a kv head of a layer) would
keep, as exact fractions that sum to the total; `settle` makes them integers. All numbers are tokens
per kv head.

To add one: a class here and its line in `SHAPES`; its definition as slow loops in
`tests/support/definitions.py` and a row in `tests/support/methods.py`.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from saqqara.configs.shown import shown

from .bounds import check
from .profiles.head_profile import AUTO, HeadProfile


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a shape spreads, in tokens.

    Attributes:
        mean: mean of all rows that share the budget.
        window: last tokens of the prompt, which every row keeps.
        sinks: first tokens of the prompt, which every row keeps.
        prompt_tokens: length of the prompt; no row keeps more.
    """

    mean: Fraction
    window: int
    sinks: int
    prompt_tokens: int

    @property
    def floor(self) -> int:
        """What every row keeps at the least."""
        return self.window + self.sinks


@dataclass(frozen=True, slots=True)
class Shape:
    """How to spread a budget; the fields are the settings that this shape alone reads.

    A value: frozen, hashable, picklable, valid once made. Either a `LayerShape` or a `RowShape`.

    Class attributes:
        name: how users write it.
        spreads: how, for the list of methods; "" where every row gets the same.
        ragged: the heads of a layer divide its tokens by their scores, so how many each keeps is
            known only once they are selected.
        heads_differ: the heads of one layer may keep different numbers of tokens.
    """

    name: ClassVar[str]
    spreads: ClassVar[str] = ""
    ragged: ClassVar[bool] = False
    heads_differ: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class LayerShape(Shape):
    """A shape that gives each layer a number of tokens per head."""

    def targets(self, allowance: Allowance, num_layers: int) -> list[Fraction]:
        """How many tokens each of the layers that share the budget would keep per head."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RowShape(Shape):
    """A shape that gives each head of each layer a number of tokens."""

    heads_differ: ClassVar[bool] = True

    def weights(self, num_layers: int, num_heads: int) -> Sequence[Sequence[Fraction]]:
        """What `targets` goes by, for all layers' kv heads; ValueError: not for such a model."""
        raise NotImplementedError

    def targets(
        self, allowance: Allowance, weights: Sequence[Sequence[Fraction]]
    ) -> list[Fraction]:
        """How many tokens each row would keep, layer by layer, of those that share the budget."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Uniform(LayerShape):
    """Give every layer the same."""

    name: ClassVar[str] = "uniform"

    def targets(self, allowance: Allowance, num_layers: int) -> list[Fraction]:
        """The mean for each."""
        return [allowance.mean] * num_layers


UNIFORM = Uniform()


@dataclass(frozen=True, slots=True)
class _Tapered(LayerShape):
    """Less in higher layers, between ends that do not depend on the curve.

    Besides the window, the top layer keeps the `beta`-th part of the mean (never less than the
    sinks) and the bottom layer as much more than the mean as the top one keeps less; where that is
    more than the prompt has, the bottom layer keeps the prompt and the top one rises. A model of
    one layer gets the mean.

    Attributes:
        beta: steepness, at least 1: the top layer keeps the beta-th part of the mean.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        check("beta", self.beta)

    def targets(self, allowance: Allowance, num_layers: int) -> list[Fraction]:
        """From the lowest layer's to the highest's along the curve."""
        if num_layers == 1:
            return [allowance.mean]
        context = allowance.mean - allowance.window
        least = max(Fraction(allowance.sinks), context / Fraction(str(self.beta)))
        most = 2 * context - least
        if most > allowance.prompt_tokens - allowance.window:
            most = Fraction(allowance.prompt_tokens - allowance.window)
            least = 2 * context - most
        top, drop = allowance.window + least, most - least
        return [top + drop * part for part in self._curve(num_layers)]

    def _curve(self, num_layers: int) -> list[Fraction]:
        """From 1 at the lowest layer to 0 at the highest, with a mean of 1/2."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Pyramid(_Tapered):
    """Give less to each layer than to the one below it, in equal steps.

    PyramidKV, arXiv 2406.02069, section 4.1; see `_Tapered` for the ends.

    The shape never changes silently: KVCache-Factory goes uniform when the prompt is shorter than
    twice the context budget, kvpress when the top layer would keep less than the window. Here a
    short prompt gets a flatter pyramid of the same mean.
    """

    name: ClassVar[str] = "pyramid"
    spreads: ClassVar[str] = "fewer in higher layers, in equal steps"

    def _curve(self, num_layers: int) -> list[Fraction]:
        return [Fraction(num_layers - 1 - i, num_layers - 1) for i in range(num_layers)]


@dataclass(frozen=True, slots=True)
class Cosine(_Tapered):
    """Give less to each layer than to the one below it, along half a cosine.

    The lowest and the highest layer keep what they keep under `Pyramid`. Between them layer l of L
    lies at (cos(pi * l / (L - 1)) + 1) / 2 of the way from the highest's to the lowest's: the curve
    of PyramidInfer (arXiv 2405.12532), which has `l / L`, so stretched that it ends at the top
    layer; its mean is then the budget, with nothing to correct.
    """

    name: ClassVar[str] = "cosine"
    spreads: ClassVar[str] = "fewer in higher layers, along a cosine"

    def _curve(self, num_layers: int) -> list[Fraction]:
        """Symmetric, so the mean is exactly 1/2.

        In steps of 2^-32: every machine gets the same, whatever the last bit of its cosine.
        """
        halves = range(num_layers // 2)
        parts = [(math.cos(math.pi * i / (num_layers - 1)) + 1) / 2 for i in halves]
        lower = [Fraction(round(part * 2**32), 2**32) for part in parts]
        middle = [Fraction(1, 2)] if num_layers % 2 else []
        return [*lower, *middle, *(1 - part for part in reversed(lower))]


MEANS: dict[str, type[LayerShape]] = {kind.name: kind for kind in (Uniform, Pyramid, Cosine)}
"""The shapes that `adaptive` can take its layers' budgets from."""


@dataclass(frozen=True, slots=True)
class Adaptive(LayerShape):
    """Spread over the layers as the shape `mean` does; a layer's heads compete for what it has.

    Ada-KV, arXiv 2407.11550; with a pyramid its Ada-PyramidKV. How a layer's tokens are divided
    over its heads is up to their scores: see `selecting.compete`.

    Attributes:
        mean: shape that gives each layer its mean, one of `MEANS`.
        floor_ratio: part of the budget besides the window that no head shares, from 0 to 1.
    """

    name: ClassVar[str] = "adaptive"
    spreads: ClassVar[str] = "the heads of a layer compete for its tokens"
    ragged: ClassVar[bool] = True
    heads_differ: ClassVar[bool] = True

    mean: LayerShape = UNIFORM
    floor_ratio: float = 0.2

    def __post_init__(self) -> None:
        if type(self.mean) not in MEANS.values():
            raise ValueError(f"mean: must be {' or '.join(sorted(MEANS))}, not {shown(self.mean)}")
        check("floor_ratio", self.floor_ratio)

    def targets(self, allowance: Allowance, num_layers: int) -> list[Fraction]:
        """Those of `mean`."""
        return self.mean.targets(allowance, num_layers)


@dataclass(frozen=True, slots=True)
class Profile(RowShape):
    """Give each head a small equal part of the budget and divide the rest by their measured scores.

    HeadKV, arXiv 2410.19258, section 3.2. Besides the window, with b the mean of the rows, each
    row keeps `b * (1 - 1 / head_beta)` and its share of all other tokens, which is its weight among
    all weights. Rows are bounded by the prompt and by window and sinks, and what the bounds take or
    give is redistributed by weight; only once all rows with a weight are full do those without get
    more.

    Attributes:
        profile: measured scores of the model's heads; `Retention` asks for them. "auto": those
            that an engine finds for its model.
        head_beta: at least 1: all but the head_beta-th part of the budget besides the window is
            divided equally.
    """

    name: ClassVar[str] = "profile"
    spreads: ClassVar[str] = "more in heads that were measured to matter"

    profile: HeadProfile | str | None = None
    head_beta: float = 1.01

    def __post_init__(self) -> None:
        check("head_beta", self.head_beta)
        if not isinstance(self.profile, HeadProfile | None) and self.profile != AUTO:
            raise ValueError(
                f"profile: must be a HeadProfile or {AUTO!r}, not {shown(self.profile)}"
            )

    @property
    def measured(self) -> HeadProfile | None:
        """The measured scores, where they are known."""
        return self.profile if isinstance(self.profile, HeadProfile) else None

    def weights(self, num_layers: int, num_heads: int) -> Sequence[Sequence[Fraction]]:
        """The measured scores of all layers' kv heads; ValueError: they are of another model."""
        if self.measured is None:
            raise ValueError(
                "profile: 'auto' stands for the measured profile of a model, which an engine looks "
                "up; none is known here"
            )
        return self.measured.weights(num_layers, num_heads)

    def targets(
        self, allowance: Allowance, weights: Sequence[Sequence[Fraction]]
    ) -> list[Fraction]:
        """One per row, layer by layer."""
        flat = [weight for layer in weights for weight in layer]
        if not any(flat):  # what was measured is of other layers
            return [allowance.mean] * len(flat)
        total = allowance.mean * len(flat)
        window, floor, cap = allowance.window, allowance.floor, allowance.prompt_tokens
        equal = window + (allowance.mean - window) * (1 - 1 / Fraction(str(self.head_beta)))
        base = max(equal, Fraction(floor))
        num_weighted = sum(weight > 0 for weight in flat)
        num_others = len(flat) - num_weighted
        if num_weighted * cap + num_others * base < total:
            rest = (total - num_weighted * cap) / num_others
            return [Fraction(cap) if weight else rest for weight in flat]
        amount = _shift([equal] * len(flat), total, floor, cap, flat)
        return [_bound(equal + weight * amount, floor, cap) for weight in flat]


SHAPES: dict[str, type[Shape]] = {
    kind.name: kind for kind in (Uniform, Pyramid, Cosine, Adaptive, Profile)
}


def shape_kind(name: object) -> type[Shape]:
    """The budget shape of that name; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in SHAPES:
        raise ValueError(f"shape: unknown {shown(name)}; known: {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def mean_kind(name: object) -> type[LayerShape]:
    """The shape of that name, for `adaptive`; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in MEANS:
        raise ValueError(f"mean: unknown {shown(name)}; known: {', '.join(sorted(MEANS))}")
    return MEANS[name]


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
