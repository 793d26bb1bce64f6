"""Values with a 95% interval: proportions (Wilson) and statistics of means (bootstrap)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution
NUM_RESAMPLES = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the 95% interval around it; `num_samples` are the prompts it is taken over.

    Where one prompt cannot give an interval, its ends are NaN.
    """

    value: float
    low: float
    high: float
    num_samples: int

    def text(self, form: str) -> str:
        """`value [low, high]`, each number written in that format, such as `.1%`."""
        if math.isnan(self.low):
            return f"{self.value:{form}} [one prompt]"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def proportion(scores: Sequence[float]) -> Estimate:
    """The mean of scores in [0, 1] with Wilson's interval.

    For scores that are 0 or 1 it is the score interval of a proportion (Wilson 1927). Scores in
    between vary less than such ones of the same mean, so for these the interval is conservative.

    Raises:
        ValueError: there is no score, or one lies outside [0, 1].
    """
    if not scores or min(scores) < 0 or max(scores) > 1:
        raise ValueError("scores: a proportion needs at least one score, all in [0, 1]")
    num = len(scores)
    mean = math.fsum(scores) / num
    shrink = 1 + Z95**2 / num
    centre = (mean + Z95**2 / (2 * num)) / shrink
    half = Z95 / shrink * math.sqrt(mean * (1 - mean) / num + Z95**2 / (4 * num**2))
    return Estimate(mean, max(centre - half, 0.0), min(centre + half, 1.0), num)


def bootstrapped(
    values: Sequence[float],
    statistic: Callable[[Floats], Floats] = lambda means: means,
    seed: int = 0,
) -> Estimate:
    """A function of the mean of values, with the percentile interval of the bootstrap.

    Args:
        values: one of each prompt; prompts are what is drawn again, with replacement.
        statistic: applied to the mean, and to the means of the resamples; rising.
        seed: of the resampling.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("values: a mean needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    centre = float(statistic(array.mean(keepdims=True))[0])
    if len(array) == 1:
        return Estimate(centre, math.nan, math.nan, 1)
    draws = np.random.default_rng(seed).integers(len(array), size=(NUM_RESAMPLES, len(array)))
    means = array[draws].mean(axis=1)
    low, high = np.quantile(statistic(means), [0.025, 0.975])
    return Estimate(centre, float(low), float(high), len(array))
