"""Where a few decode steps go on the device: busy against wall, by kernel, for `gpu_check.py`."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_report import Row
from torch.autograd import DeviceType

STEPS = 5
MAX_FILE_BYTES = 16 << 20
_NUM_NAMED = 6
_NAME_LENGTH = 60


@dataclass
class StepTrace:
    """Records `STEPS` steps, from the one numbered `first` on.

    Attributes:
        device: what it looks at; on a CPU, operators stand in for kernels.
        file: for the trace, gzipped; it is left out where it is larger than may be brought back.
        first: steps before these only warm up.
    """

    device: torch.device
    file: Path
    first: int
    wall_seconds: float = 0.0
    _step: int = 0
    _profile: Any = field(default=None)
    _started: float = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        if self._step == self.first:
            self._begin()
        yield
        self._step += 1
        if self._step == self.first + STEPS:
            self._end()

    def row(self, what: str) -> Row:
        """A line of the table."""
        if self._profile is None or self.wall_seconds == 0:
            return Row(what, f"fewer than {self.first + STEPS} steps", state="failed")
        spans = self._spans()
        busy = _union([(start, stop) for _, start, stop in spans]) / 1e6
        by_name: Counter[str] = Counter()
        for name, start, stop in spans:
            by_name[name[:_NAME_LENGTH]] += stop - start
        total = sum(by_name.values()) or 1.0
        nodes = len(spans) / STEPS
        top = ", ".join(f"{n} {t / total:.0%}" for n, t in by_name.most_common(_NUM_NAMED))
        wall = self.wall_seconds / STEPS
        return Row(
            what,
            f"{wall * 1e3:.2f} ms a step, busy {busy / self.wall_seconds:.0%}; {nodes:.0f} kernels "
            f"a step, {wall / max(nodes, 1) * 1e6:.1f} us each; {top}",
            {
                "wall_seconds": wall,
                "busy_seconds": busy / STEPS,
                "kernels": nodes,
                "seconds_of_a_node": wall / max(nodes, 1),
            },
        )

    def _begin(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.device)
        self._profile = torch.profiler.profile(activities=kinds)
        self._profile.start()
        self._started = time.perf_counter()

    def _end(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.wall_seconds = time.perf_counter() - self._started
        self._profile.stop()
        self._profile.export_chrome_trace(str(self.file))
        if self.file.stat().st_size > MAX_FILE_BYTES:
            self.file.unlink()

    def _spans(self) -> list[tuple[str, float, float]]:
        """Name, start and end in microseconds of each kernel."""
        wanted = DeviceType.CUDA if self.device.type == "cuda" else DeviceType.CPU
        return [
            (event.name, event.time_range.start, event.time_range.end)
            for event in self._profile.events()
            if event.device_type == wanted
            and (wanted == DeviceType.CUDA or event.cpu_parent is None)
        ]


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of what spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return covered
