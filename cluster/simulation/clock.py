"""A clock that jumps from one thing that is due to the next, when somebody waits."""

import heapq
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Any

from saqqara.cluster.recovery.clock import Clock


class SimulatedClock(Clock):
    """Time passes only while it is waited for; what is due happens meanwhile, in order."""

    def __init__(self) -> None:
        self._time = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def now(self) -> float:
        """The time."""
        return self._time

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call something when it is so late, or as soon as time passes if it is later already."""
        heapq.heappush(self._due, (time, next(self._order), call))

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        until = self._time + seconds
        while self._due and self._due[0][0] <= until:
            self._do_next()
        self._time = until

    def wait(self, future: "Future[Any]", seconds: float) -> None:
        """Let time pass until a future is done, at most so much."""
        until = self._time + seconds
        while not future.done() and self._due and self._due[0][0] <= until:
            self._do_next()
        if not future.done():
            self._time = until

    def _do_next(self) -> None:
        time, _, call = heapq.heappop(self._due)
        self._time = max(self._time, time)
        call()
