"""What this machine can do at best, and how calls are timed in turns against it."""

import itertools
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]

READ_BYTES = 128 << 20  # of one plain read; several times the last-level cache
GEMM_SIZE = 1024
REST_SECONDS = 0.01  # before each turn: a process that has slept is not interrupted at once
TURN_SECONDS = 0.005  # about how long a turn takes, in as many calls as fit
MAX_CALLS = 30  # of a turn; like the layers of a step


def make_limits() -> dict[str, tuple[float, Call]]:
    """Work and call of what bounds each unit: a plain read of memory, a large bf16 product."""
    memory = itertools.cycle(torch.arange(2 * READ_BYTES // 8).view(2, -1))
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).bfloat16() for _ in range(2))
    return {
        "GB/s": (READ_BYTES, lambda: next(memory).sum()),
        "GFLOP/s": (2 * GEMM_SIZE**3, lambda: a @ b),
    }


@dataclass(frozen=True)
class Times:
    """Seconds of one call over the rounds that count, and how many of them were undisturbed."""

    seconds: Sequence[float]
    clean: int

    def rates(self, work: float) -> dict[str, float]:
        """Milliseconds, and work per nanosecond: median and lower quartile of the time."""
        quartile, median = np.quantile(self.seconds, [0.25, 0.5]).tolist()
        return {
            "median_ms": median * 1e3,
            "quartile_ms": quartile * 1e3,
            "median_rate": work / median / 1e9,
            "quartile_rate": work / quartile / 1e9,
            "clean": self.clean,
        }


def preemptions() -> int:
    """How often a core was taken from this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def take_turn(call: Call, num_calls: int) -> tuple[float, bool]:
    """Seconds per call of a turn, and whether it was undisturbed."""
    time.sleep(REST_SECONDS)
    call()  # wakes the other threads, which have slept as well
    before, started = preemptions(), time.perf_counter()
    for _ in range(num_calls):
        call()
    elapsed = time.perf_counter() - started
    return elapsed / num_calls, preemptions() == before


def measure(calls: dict[str, Call], rounds: int) -> dict[str, Times]:
    """Time a turn of each call per round."""
    num_calls = {}
    for name, call in calls.items():
        fastest = min(take_turn(call, 1)[0] for _ in range(3))
        num_calls[name] = min(MAX_CALLS, max(1, round(TURN_SECONDS / fastest)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    clean: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        elapsed, undisturbed = take_turn(call, num_calls[name])
        seconds[name].append(elapsed)
        if undisturbed:
            clean[name].append(elapsed)
    return {name: Times(clean[name] or seconds[name], len(clean[name])) for name in calls}


def measure_limits(rounds: int) -> dict[str, float]:
    """Rate of each limit by unit, in 1e9 a second: the median over some rounds."""
    limits = make_limits()
    times = measure({unit: call for unit, (_, call) in limits.items()}, rounds)
    return {unit: times[unit].rates(work)["median_rate"] for unit, (work, _) in limits.items()}
