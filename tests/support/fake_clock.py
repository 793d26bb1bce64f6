"""Time that passes only when somebody waits for it."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from saqqara.cluster.recovery.clock import Clock


class FakeClock(Clock):
    """A clock that jumps.

    Args:
        on_wait: see below.
        longest_sleep: seconds; who sleeps longer should not.

    Attributes:
        time: the time; may be changed.
        on_wait: called whenever somebody waits, when the time has passed.
    """

    def __init__(
        self, on_wait: Callable[[], None] = lambda: None, longest_sleep: float = 0.25
    ) -> None:
        self._longest_sleep = longest_sleep
        self.time = 1000.0
        self.on_wait = on_wait

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert 0 <= seconds <= self._longest_sleep, "the engine's thread has other things to do"
        self.time += seconds

    def wait(self, future: "Future[Any]", seconds: float) -> None:
        if not future.done():
            self.sleep(seconds)
            self.on_wait()
