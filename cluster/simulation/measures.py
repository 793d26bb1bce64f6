"""What is measured while a replica is simulated, and how replicas add up to a deployment.

Shapes: N requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .arrivals import Floats, Ints

_LOWEST, _HIGHEST, _GROWTH = 1e-5, 1e5, 1.01
_LOG_GROWTH = math.log(_GROWTH)
NUM_BINS = math.ceil(math.log(_HIGHEST / _LOWEST) / _LOG_GROWTH)
PERCENTILES = (50, 90, 99)
_TIMELINE_BINS = 120


@dataclass(frozen=True, slots=True)
class Objective:
    """What a user should see: the first token within `ttft_seconds`, and from then on a token
    every `itl_seconds`, on average over an answer."""

    ttft_seconds: float
    itl_seconds: float


class Gaps:
    """Seconds between tokens, counted in bins of 1%.

    Attributes:
        counts: int64 [bins].
    """

    def __init__(self) -> None:
        self.counts: Ints = np.zeros(NUM_BINS, dtype=np.int64)

    def add(self, seconds: Floats) -> None:
        """Count some gaps."""
        places = np.log(np.maximum(seconds, _LOWEST) / _LOWEST) / _LOG_GROWTH
        places = np.minimum(places.astype(np.int64), NUM_BINS - 1)
        self.counts += np.bincount(places, minlength=NUM_BINS)

    def percentile(self, percent: float) -> float:
        """Within half a percent; NaN if nothing was counted."""
        below = np.cumsum(self.counts)
        if below[-1] == 0:
            return math.nan
        place = int(np.searchsorted(below, percent / 100 * below[-1]))
        return float(_LOWEST * _GROWTH ** (place + 0.5))

    def shares(self) -> tuple[Floats, Floats]:
        """Upper ends of the bins in seconds, and the share of gaps that are not longer."""
        ends: Floats = _LOWEST * np.power(_GROWTH, np.arange(1.0, NUM_BINS + 1))
        return ends, np.cumsum(self.counts) / max(int(self.counts.sum()), 1)


@dataclass(slots=True, eq=False)
class ReplicaRun:
    """What happened on one replica; times are in seconds of the simulated clock.

    Attributes:
        arrived, first, last: of each request: arrival, first and last token, float64 [N]; NaN:
            none.
        tokens: new ones of each request, int64 [N].
        refused: requests that could never fit.
        gaps: between tokens of a sequence.
        tokens_by_bin: new tokens in each `bin_seconds` from 0 on.
        seconds: when the last request ended.
        busy_seconds: of all stages together.
        down_seconds: without workers.
        running_seconds: sequences that run x seconds.
        page_seconds: share of the fullest rank's pages that are charged x seconds.
        peak_pages: the largest such share.
        steps, preemptions, recoveries: how many.
    """

    arrived: Floats
    first: Floats
    last: Floats
    tokens: Ints
    bin_seconds: float
    gaps: Gaps = field(default_factory=Gaps)
    tokens_by_bin: list[int] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    down_seconds: float = 0.0
    running_seconds: float = 0.0
    page_seconds: float = 0.0
    peak_pages: float = 0.0
    steps: int = 0
    preemptions: int = 0
    recoveries: int = 0

    def count_tokens(self, now: float, number: int) -> None:
        """Note so many new tokens."""
        place = int(now / self.bin_seconds)
        while len(self.tokens_by_bin) <= place:
            self.tokens_by_bin.append(0)
        self.tokens_by_bin[place] += number


@dataclass(frozen=True, slots=True)
class Summary:
    """A deployment in numbers; seconds of the simulated clock.

    Attributes:
        requests, finished, refused: how many; refused are those that could never fit.
        seconds: from 0 until the last request ended.
        prompt_tokens, new_tokens: of finished requests.
        requests_per_second, tokens_per_second: finished ones, new ones.
        ttft_seconds, itl_seconds, latency_seconds: percentiles by name (`p50`, ...): arrival to
            first token, between tokens of an answer, arrival to last token.
        attained: share of all requests within the objective.
        goodput_requests_per_second, goodput_tokens_per_second: of those.
        preemptions, recoveries: how often.
        unavailable: share of replicas x time without workers.
        utilisation: share of ranks x time that compute or exchange.
        pages_used, pages_peak: share of the KV pool that is charged, mean and largest.
        running: sequences at once, mean, all replicas together.
        steps: of all replicas.
    """

    requests: int
    finished: int
    refused: int
    seconds: float
    prompt_tokens: int
    new_tokens: int
    requests_per_second: float
    tokens_per_second: float
    ttft_seconds: dict[str, float]
    itl_seconds: dict[str, float]
    latency_seconds: dict[str, float]
    attained: float
    goodput_requests_per_second: float
    goodput_tokens_per_second: float
    preemptions: int
    recoveries: int
    unavailable: float
    utilisation: float
    pages_used: float
    pages_peak: float
    running: float
    steps: int


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """All replicas together: the numbers, and what is drawn.

    Attributes:
        summary: the numbers.
        ttft: of requests that have a first token, float64, ascending.
        gaps: between tokens.
        bin_seconds, tokens_per_second: new tokens a second over time, one number for each bin.
    """

    summary: Summary
    ttft: Floats
    gaps: Gaps
    bin_seconds: float
    tokens_per_second: Floats


def bin_seconds_of(seconds: float) -> float:
    """Width of the bins of a timeline that is about so long."""
    return max(seconds, 1.0) / _TIMELINE_BINS


def measured(
    runs: Sequence[ReplicaRun], prompt_tokens: Ints, objective: Objective, num_stages: int
) -> Measured:
    """Add up the replicas; `prompt_tokens`, int64 [N], are in the order of the runs' requests."""
    arrived, first, last = (
        np.concatenate([getattr(run, name) for run in runs])
        for name in ("arrived", "first", "last")
    )
    tokens = np.concatenate([run.tokens for run in runs])
    is_done = ~np.isnan(last)
    seconds = max(run.seconds for run in runs)
    ttft, latency = first - arrived, (last - arrived)[is_done]
    attained = is_done & attains(objective, ttft, last - first, tokens)
    gaps = Gaps()
    for run in runs:
        gaps.counts += run.gaps.counts
    total = len(runs) * max(seconds, 1e-9)

    def mean(name: str) -> float:
        return math.fsum(getattr(run, name) for run in runs) / total

    summary = Summary(
        requests=len(arrived),
        finished=int(is_done.sum()),
        refused=sum(run.refused for run in runs),
        seconds=seconds,
        prompt_tokens=int(prompt_tokens[is_done].sum()),
        new_tokens=int(tokens[is_done].sum()),
        requests_per_second=float(is_done.sum() / seconds),
        tokens_per_second=float(tokens[is_done].sum() / seconds),
        ttft_seconds=_percentiles(ttft[~np.isnan(ttft)]),
        itl_seconds={f"p{percent}": gaps.percentile(percent) for percent in PERCENTILES},
        latency_seconds=_percentiles(latency),
        attained=float(attained.mean()),
        goodput_requests_per_second=float(attained.sum() / seconds),
        goodput_tokens_per_second=float(tokens[attained].sum() / seconds),
        preemptions=sum(run.preemptions for run in runs),
        recoveries=sum(run.recoveries for run in runs),
        unavailable=mean("down_seconds"),
        utilisation=mean("busy_seconds") / num_stages,
        pages_used=mean("page_seconds"),
        pages_peak=max(run.peak_pages for run in runs),
        running=mean("running_seconds") * len(runs),
        steps=sum(run.steps for run in runs),
    )
    return Measured(
        summary,
        np.sort(ttft[~np.isnan(ttft)]),
        gaps,
        runs[0].bin_seconds,
        _timeline(runs) / runs[0].bin_seconds,
    )


def attains(
    objective: Objective, ttft: Floats, decode_seconds: Floats, tokens: Ints
) -> NDArray[np.bool_]:
    """Which requests are within the objective, bool [N]."""
    in_time = ttft <= objective.ttft_seconds
    steady = decode_seconds <= objective.itl_seconds * np.maximum(tokens - 1, 0) + 1e-12
    both: NDArray[np.bool_] = in_time & steady
    return both


def _percentiles(values: Floats) -> dict[str, float]:
    if len(values) == 0:
        return {f"p{percent}": math.nan for percent in PERCENTILES}
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}


def _timeline(runs: Sequence[ReplicaRun]) -> Floats:
    total = np.zeros(max(len(run.tokens_by_bin) for run in runs))
    for run in runs:
        total[: len(run.tokens_by_bin)] += run.tokens_by_bin
    return total
