"""Where a worker's time goes: seconds by phase in every step, single spans when they are traced."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work: `phase` is what it belongs to (prefill, decode, head) or itself."""

    name: str
    phase: str
    start_seconds: float
    seconds: float


class StepClock:
    """Times the phases of a step, and spans within them while `spans` is a list.

    Attributes:
        seconds: of the current step, by phase.
        spans: every phase, and every span within one, since tracing began; None when not tracing.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] | None = None
        self._phase = ""

    def begin_step(self) -> None:
        """Forget the seconds of the step before."""
        self.seconds = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; phases do not nest, but `receive` may lie within one."""
        outer, self._phase = self._phase, name
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._phase = outer
            if self.spans is not None:
                self.spans.append(Span(name, name, started, spent))

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
