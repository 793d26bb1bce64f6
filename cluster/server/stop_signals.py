"""SIGTERM and SIGINT of a server: an exit while it starts, an answer to `wait` once it runs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Takes SIGTERM and SIGINT from `with` on; main thread only.

    Nothing is lost, whenever a signal comes: one that came while it could not interrupt is raised
    by the next `interrupting` or returned by the next `wait`.
    """

    def __init__(self) -> None:
        self._came: int | None = None
        self._interrupts = False
        self._queue: SimpleQueue[int] = SimpleQueue()  # an Event's own lock could be held
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals again: `ray.init` puts a handler of its own, which exits, there."""
        for number in _SIGNALS:
            signal.signal(number, self._take)

    @property
    def came(self) -> bool:
        """Whether there was a signal."""
        return self._came is not None

    def check(self) -> None:
        """Raise `SystemExit` if there was a signal."""
        if self.came:
            raise SystemExit(0)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, a signal raises `SystemExit`, wherever the main thread is.

        Somebody else's code may catch it, so it is raised again at the end.
        """
        self._interrupts = True
        try:
            self.check()
            yield
            self.check()
        finally:
            self._interrupts = False

    def wait(self) -> None:
        """Return when there is a signal, or at once if there was one that nobody waited for."""
        self._queue.get()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._came = number
        self._queue.put(number)
        if self._interrupts:
            self._interrupts = False  # what now cleans up must not be interrupted in its turn
            raise SystemExit(0)
