"""Time, as the engine sees it. Tests and simulations have their own."""

import time
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any


class Clock:
    """The machine's time, in seconds from some fixed point; it never runs backwards."""

    def now(self) -> float:
        """The time."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def wait(self, future: "Future[Any]", seconds: float) -> None:
        """Let time pass until a future is done, at most so much."""
        wait_for([future], seconds)
