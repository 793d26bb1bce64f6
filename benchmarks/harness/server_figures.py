"""Arithmetic of `benchmarks/server.py`: paired ratios, gaps between pieces, quantiles, targets."""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Buckets = Mapping[float, float]
MIN_RATIO = 0.95  # of the offline engine's tokens per second
MAX_OVERHEAD_SECONDS = 0.010  # until the first token, beyond what the engine takes
MAX_GAP_SECONDS = 0.050  # of the 99th percentile between pieces, beyond the engine's


def rotated(names: Sequence[str], number: int) -> Sequence[str]:
    """The order of one round: each begins with another, so that none always comes after one."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


def ratios(rounds: Sequence[Mapping[str, float]], name: str, base: str) -> list[float]:
    """What one rate is of another, within each round."""
    return [r[name] / r[base] for r in rounds]


def gaps(arrivals: Sequence[float]) -> list[float]:
    """Seconds between the pieces of one stream."""
    return [later - earlier for earlier, later in pairwise(arrivals)]


def buckets(metrics: str, name: str) -> dict[float, float]:
    """The cumulative counts of a histogram in the Prometheus text format, by upper bound."""
    found: dict[float, float] = {}
    pattern = re.compile(
        rf'^{re.escape(name)}_bucket\{{.*le="([^"]+)".*\}} (\S+)$', flags=re.MULTILINE
    )
    for bound, count in pattern.findall(metrics):
        found[float(bound)] = found.get(float(bound), 0.0) + float(count)
    return found


def histogram_quantile(before: Buckets, after: Buckets, share: float) -> float:
    """The value below which a share of the observations between two scrapes lies.

    Interpolates within a bucket, as Prometheus does; beyond the last bound it is that bound.

    Raises:
        ValueError: nothing was observed.
    """
    bounds = sorted(after)
    counts = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    if not counts or counts[-1] <= 0:
        raise ValueError("nothing was observed between the scrapes")
    rank = share * counts[-1]
    low_bound = low_count = 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= rank:
            if bound == float("inf"):
                return low_bound
            return low_bound + (bound - low_bound) * (rank - low_count) / (count - low_count)
        low_bound, low_count = bound, count
    raise AssertionError("cumulative counts end at their number")


@dataclass(frozen=True)
class FirstTokens:
    """Seconds until the first token, one request at a time, and of a request for nothing."""

    client: Sequence[float]
    engine: Sequence[float]
    idle: Sequence[float]

    @property
    def overhead(self) -> list[float]:
        """What is not the engine's."""
        return [c - e for c, e in zip(self.client, self.engine, strict=True)]

    @property
    def ours(self) -> list[float]:
        """What is neither the engine's nor that of HTTP and Serve alone."""
        return [o - i for o, i in zip(self.overhead, self.idle, strict=True)]


def targets(
    rounds: Sequence[Mapping[str, float]],
    first: FirstTokens,
    client_gaps: Sequence[float],
    engine_gap: float,
) -> Iterator[tuple[str, float, float, bool]]:
    """Each target: what it is, what was measured, its bound, and whether it is met."""
    for name in ("server", "server, streamed"):
        ratio = statistics.median(ratios(rounds, name, "offline"))
        yield f"{name} / offline", ratio, MIN_RATIO, ratio >= MIN_RATIO
    overhead = statistics.median(first.overhead)
    yield (
        "first token, overhead, s",
        overhead,
        MAX_OVERHEAD_SECONDS,
        overhead < MAX_OVERHEAD_SECONDS,
    )
    beyond = percentile(client_gaps, 0.99) - engine_gap
    yield "p99 gap beyond the engine's, s", beyond, MAX_GAP_SECONDS, beyond <= MAX_GAP_SECONDS


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies, by linear interpolation.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
