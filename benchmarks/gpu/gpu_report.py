"""What the sections of `gpu_check.py` share: where they run, how long they may, what they say."""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

GIB = 1024**3
CAP_GIB = 60.0  # memory of every engine that is compared at its largest batch
_WARM_UP_ROUNDS = 3
_AHEAD_CYCLES = 4_000_000  # about 2 ms of a GPU at work, in which the host launches what is timed


class OutOfTimeError(Exception):
    """A measurement would take longer than it may."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """Until when something may take; `stop` is a time of `time.monotonic`."""

    stop: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    def part(self, seconds: float) -> "Deadline":
        """A part of the time that is left: at most so many seconds from now."""
        return Deadline(min(self.stop, time.monotonic() + seconds))

    @property
    def seconds_left(self) -> float:
        """Seconds until it is over, 0 from then on."""
        return max(0.0, self.stop - time.monotonic())

    def check(self) -> None:
        """Raise `OutOfTimeError` if it is over."""
        if time.monotonic() >= self.stop:
            raise OutOfTimeError("its time is over")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was checked or measured.
        result: the outcome in words.
        numbers: the outcome for other programs; names carry their units.
        state: `ok`, `wrong` (a computation is not correct), `missed` (slower than the target),
            `failed` or `skipped` (there is no result; `result` says why).
    """

    what: str
    result: str
    numbers: dict[str, float] = field(default_factory=dict)
    state: str = "ok"


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the measurements of one section run, and until when.

    Attributes:
        device: a GPU; in tests also the CPU, where kernels run in Triton's interpreter.
        dtype: of weights, queries, keys and values.
        deadline: of the section.
        cap_bytes: memory that an engine may take on a GPU.
        pool_gib: KV pool where there is no GPU to fill.
        attention_backend: of the engines that are timed.
    """

    device: torch.device
    dtype: torch.dtype
    deadline: Deadline
    cap_bytes: int = int(CAP_GIB * GIB)
    pool_gib: float = 0.01
    attention_backend: str = "triton"

    @property
    def dtype_name(self) -> str:
        """As settings write it."""
        return str(self.dtype).removeprefix("torch.")

    def say(self, text: str) -> None:
        """Print how far things are."""
        print(f"    {text}", flush=True)

    def seconds_of(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Median seconds that some work keeps the device busy, after rounds that do not count."""
        times = []
        for number in range(repeats + _WARM_UP_ROUNDS):
            self.deadline.check()
            seconds = _gpu_seconds(work) if self.device.type == "cuda" else _host_seconds(work)
            if number >= _WARM_UP_ROUNDS:
                times.append(seconds)
        return float(statistics.median(times))

    def copy_bandwidth(self, num_bytes: int = 1 << 30) -> float:
        """Bytes per second, read and written, of a large copy on the device."""
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.seconds_of(lambda: target.copy_(source))


def _gpu_seconds(work: Callable[[], object]) -> float:
    event: Callable[..., Any] = torch.cuda.Event
    start, stop = event(enable_timing=True), event(enable_timing=True)
    # Else the time between launches would be the device's, too.
    torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _host_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def failure(what: str, error: Exception) -> Row:
    """The row of a measurement that an error ended; where it came from is printed."""
    print("".join(traceback.format_exception(error)), flush=True)
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    return Row(what, text, state="failed")


def judged(is_met: bool) -> str:
    """The state of a row that has a target."""
    return "ok" if is_met else "missed"


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    width = max((len(row.what) for row in rows), default=0)
    return "\n".join(f"{row.state:<7}  {row.what:<{width}}  {row.result}" for row in rows)
