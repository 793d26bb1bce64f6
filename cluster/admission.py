"""How much a server takes on at once: a bounded queue, and an end of admission."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_RETRY_SECONDS = 60
_SMOOTHING = 0.2  # share of the latest request in the mean


class OverloadedError(RuntimeError):
    """The queue is full. `retry_seconds` is when it is likely to have room."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"the server's queue is full; try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


class DrainingError(RuntimeError):
    """The server finishes what it has and takes nothing new."""


class Admission:
    """Counts the sequences of a server; used in one event loop.

    Args:
        max_running: sequences that the engine runs at once.
        max_waiting: sequences that may wait beyond those.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._capacity = max_running + max_waiting
        self._num_sequences = 0
        self._num_requests = 0
        self._mean_seconds = 1.0
        self._is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def capacity(self) -> int:
        """Sequences that are taken at most."""
        return self._capacity

    @property
    def is_closed(self) -> bool:
        """Whether nothing new is taken."""
        return self._is_closed

    @property
    def num_requests(self) -> int:
        """Requests that are being served or wait."""
        return self._num_requests

    @contextmanager
    def enter(self, num_sequences: int) -> Iterator[None]:
        """Hold room for the sequences of a request.

        Raises:
            DrainingError: the server is ending.
            OverloadedError: there is no room now.
        """
        if self._is_closed:
            raise DrainingError("the server is shutting down and takes no more requests")
        assert num_sequences <= self._capacity, "there never will be room for so many"
        if self._num_sequences + num_sequences > self._capacity:
            raise OverloadedError(self._retry_seconds())
        self._change(num_sequences, 1)
        started = time.monotonic()
        try:
            yield
        finally:
            self._change(-num_sequences, -1)
            seconds = time.monotonic() - started
            self._mean_seconds += _SMOOTHING * (seconds - self._mean_seconds)

    def close(self) -> None:
        """Take nothing new from now on."""
        self._is_closed = True

    async def wait_idle(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is being served; whether that came within the time."""
        if self._idle.is_set():
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True

    def _change(self, num_sequences: int, num_requests: int) -> None:
        self._num_sequences += num_sequences
        self._num_requests += num_requests
        if self._num_requests == 0:
            self._idle.set()
        else:
            self._idle.clear()

    def _retry_seconds(self) -> int:
        """Until as many sequences as wait now have had their turn, at the pace of late."""
        waiting = max(self._num_sequences - self._max_running, 1)
        seconds = self._mean_seconds * waiting / self._max_running
        return min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS)
