"""What several engines have measured, as one report."""

from collections import Counter
from collections.abc import Callable, Sequence

from saqqara.cluster.engine.report import EngineReport, Latency


def combined(reports: Sequence[EngineReport]) -> EngineReport | None:
    """One report of several engines that ran side by side; None of none.

    Counts and bytes are sums, times the longest, rates tokens over that time. Means of latencies
    are weighted by their counts, their percentiles those of the slowest engine.
    """
    if len(reports) <= 1:
        return reports[0] if reports else None
    first = reports[0]
    wall = max(r.wall_seconds for r in reports)
    sums = {
        name: sum(getattr(r, name) for r in reports)
        for name, value in first
        if type(value) is int and name != "pages_leaked"
    }
    leaked = [r.pages_leaked for r in reports]
    phases: dict[str, float] = {}
    requests, recoveries = Counter[str](), Counter[str]()
    for report in reports:
        requests.update(report.requests)
        recoveries.update(report.recoveries)
        for phase, seconds in report.phase_seconds.items():
            phases[phase] = max(phases.get(phase, 0.0), seconds)
    return first.model_copy(
        update={
            **sums,
            "requests": dict(requests),
            "recoveries": dict(recoveries),
            "down_seconds": sum(r.down_seconds for r in reports),
            "wall_seconds": wall,
            "prefill_seconds": max(r.prefill_seconds for r in reports),
            "decode_seconds": max(r.decode_seconds for r in reports),
            "phase_seconds": phases,
            "prompt_tokens_per_second": sums["prompt_tokens"] / wall if wall else 0.0,
            "generation_tokens_per_second": sums["generation_tokens"] / wall if wall else 0.0,
            "time_to_first_token": _latency(reports, lambda r: r.time_to_first_token),
            "inter_token_latency": _latency(reports, lambda r: r.inter_token_latency),
            "e2e_latency": _latency(reports, lambda r: r.e2e_latency),
            "kept_tokens_by_layer": _by_layer(reports, lambda r: r.kept_tokens_by_layer),
            "dropped_tokens_by_layer": _by_layer(reports, lambda r: r.dropped_tokens_by_layer),
            "pages_leaked": None if None in leaked else sum(n for n in leaked if n is not None),
            "workers": tuple(worker for r in reports for worker in r.workers),
        }
    )


def _latency(reports: Sequence[EngineReport], of: Callable[[EngineReport], Latency]) -> Latency:
    parts = [of(report) for report in reports]
    count = sum(part.count for part in parts)
    return Latency(
        count=count,
        mean=sum(part.mean * part.count for part in parts) / count if count else 0.0,
        p50=max(part.p50 for part in parts),
        p99=max(part.p99 for part in parts),
    )


def _by_layer(
    reports: Sequence[EngineReport], of: Callable[[EngineReport], tuple[int, ...]]
) -> tuple[int, ...]:
    return tuple(map(sum, zip(*map(of, reports), strict=True)))
