"""Where a worker's time goes: seconds by phase in every step, single spans when they are traced."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

_NOTHING = nullcontext()
_OF_THE_HOST = ("total", "receive", "reserve")  # phases that are the host's own time on a GPU, too


class Event(Protocol):
    """A moment in the work of a device, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None:
        """Mark the work that has been enqueued so far."""
        ...

    def query(self) -> bool:
        """Whether that work is done."""
        ...

    def elapsed_time(self, end_event: "Event", /) -> float:
        """Milliseconds from this moment to a later one, both of which have come."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work: `phase` is what it belongs to (prefill, decode, head) or itself."""

    name: str
    phase: str
    start_seconds: float
    seconds: float


class StepClock:
    """Times the phases of a step, and spans within them while `spans` is a list.

    Where the host only enqueues work, a phase takes as long as the device works on it. Nobody waits
    to find out: what is not done when the step ends is counted in the next one.

    Args:
        make_event: of the device; None where the host does the work.

    Attributes:
        seconds: of the current step, by phase.
        spans: every phase, and every span within one, since tracing began; None when not tracing.
    """

    def __init__(self, make_event: Callable[[], Event] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._make_event = make_event
        self._open: list[tuple[str, Event, Event]] = []  # phases that the device may be at
        self.spans: list[Span] | None = None
        self._phase = ""

    @property
    def is_of_device(self) -> bool:
        """Whether the device times its own work."""
        return self._make_event is not None

    def begin_step(self) -> None:
        """Forget the seconds of the step before."""
        self.seconds = {}

    def close_step(self) -> None:
        """Add the phases that the device is done with."""
        while self._open and self._open[0][2].query():
            name, start, stop = self._open.pop(0)
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(stop) / 1e3

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; phases do not nest, but `receive` may lie within one."""
        outer, self._phase = self._phase, name
        on_device = self._make_event is not None and name not in _OF_THE_HOST
        start = self._mark() if on_device else None
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            if start is None:
                self.seconds[name] = self.seconds.get(name, 0.0) + spent
            else:
                self._open.append((name, start, self._mark()))
            self._phase = outer
            if self.spans is not None:
                self.spans.append(Span(name, name, started, spent))

    def _mark(self) -> Event:
        assert self._make_event is not None
        event = self._make_event()
        event.record()
        return event

    def span(self, name: str) -> AbstractContextManager[None]:
        """Time a span of the current phase; costs next to nothing when not tracing."""
        return _NOTHING if self.spans is None else self._span(self.spans, name)

    def note(self, name: str, start_seconds: float, seconds: float) -> None:
        """Add a span of the current phase that was timed elsewhere; only while tracing."""
        assert self.spans is not None, "nothing is traced"
        self.spans.append(Span(name, self._phase, start_seconds, seconds))

    @contextmanager
    def _span(self, spans: list[Span], name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spans.append(Span(name, self._phase, started, time.perf_counter() - started))
