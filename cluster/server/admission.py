"""How much a server takes on at once: a bounded queue, and an end of admission."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MAX_RETRY_SECONDS = 60
_UNKNOWN_RETRY_SECONDS = 5  # nothing has finished yet under load
_ROUNDING = 1e-9
_NUM_FINISHED = 32  # sequences that the rate is measured over


class OverloadedError(RuntimeError):
    """The queue is full, or an owner's share of it. `retry_seconds`: when it may have room."""

    def __init__(self, retry_seconds: int, *, is_share: bool = False) -> None:
        what = "this key's share of the server's queue" if is_share else "the server's queue"
        super().__init__(f"{what} is full; try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds
        self.is_share = is_share


class DrainingError(RuntimeError):
    """The server finishes what it has and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no more requests")


class Admission:
    """Counts the sequences of a server; used in one event loop.

    An owner may wait with as many sequences as `max_share` says when it is alone, and with fewer
    the fuller the queue is: with no more than so and so many times what is free. So others find
    room however much it asks for (the dynamic thresholds of Choudhury and Hahne, IEEE/ACM
    Transactions on Networking 6(2), 1998).

    Args:
        max_running: sequences that the engine runs at once.
        max_waiting: sequences that may wait beyond those.
        clock: seconds that only grow.
        max_share: of the queue that one owner may have; 1: all of it.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_share: float = 1.0,
    ) -> None:
        self._max_running = max_running
        self._capacity = max_running + max_waiting
        self._max_share = max_share
        self._held: Counter[str] = Counter()
        self._num_sequences = 0
        self._num_requests = 0
        self._pace = _Pace(max_running, clock)
        self._closing = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def capacity(self) -> int:
        """Sequences that are taken at most."""
        return self._capacity

    def capacity_of(self, owner: str) -> int:
        """Sequences of one owner that are taken at most; without one, of all together."""
        if not owner:
            return self._capacity
        return self._max_running + int(
            self._max_share * (self._capacity - self._max_running) + _ROUNDING
        )

    @property
    def max_running(self) -> int:
        """Sequences that the engine runs at once."""
        return self._max_running

    @property
    def num_free(self) -> int:
        """Slots of the engine that no sequence has or waits for; below 0 if more wait."""
        return self._max_running - self._num_sequences

    @property
    def num_requests(self) -> int:
        """Requests that are being served or wait."""
        return self._num_requests

    @contextmanager
    def enter(self, num_sequences: int, owner: str = "") -> Iterator[None]:
        """Hold room for the sequences of a request; without an owner all of the queue is its.

        Raises:
            DrainingError: the server is ending.
            OverloadedError: there is no room now.
        """
        self.check_open()
        assert num_sequences <= self.capacity_of(owner), "there never will be room for so many"
        if self._num_sequences + num_sequences > self._capacity:
            waiting = self._num_sequences - self._max_running
            raise OverloadedError(self._retry_seconds(waiting))
        if owner and not self._has_share(num_sequences, owner):
            num_owners = len(self._held)
            waiting = num_owners * self._held[owner] - self._max_running
            raise OverloadedError(self._retry_seconds(waiting), is_share=True)
        self._change(num_sequences, 1, owner)
        try:
            yield
        finally:
            self._change(-num_sequences, -1, owner)

    def _has_share(self, num_sequences: int, owner: str) -> bool:
        if self._max_share >= 1 or self._num_sequences + num_sequences <= self._max_running:
            return True
        num_owners = len(self._held.keys() | {owner})
        own = self._held[owner] + num_sequences
        free = self._capacity - self._num_sequences - num_sequences
        most = self._max_share / (1 - self._max_share) * free
        return own - self._max_running / num_owners <= most + _ROUNDING

    def check_open(self) -> None:
        """Raise `DrainingError` if nothing new is taken."""
        if self._closing.is_set():
            raise DrainingError

    def close(self) -> None:
        """Take nothing new from now on."""
        self._closing.set()

    async def wait_closed(self) -> None:
        """Wait until nothing new is taken."""
        await self._closing.wait()

    async def wait_idle(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is being served; whether that came within the time."""
        if self._idle.is_set():
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True

    def _change(self, num_sequences: int, num_requests: int, owner: str) -> None:
        if owner:
            self._held[owner] += num_sequences
            if self._held[owner] == 0:
                del self._held[owner]
        self._pace.note(self._num_sequences, num_finished=max(-num_sequences, 0))
        self._num_sequences += num_sequences
        self._num_requests += num_requests
        if self._num_requests == 0:
            self._idle.set()
        else:
            self._idle.clear()

    def _retry_seconds(self, num_waiting: int) -> int:
        """Until so many sequences have finished, at the rate of late."""
        rate = self._pace.per_second(self._num_sequences)
        if rate is None:
            return _UNKNOWN_RETRY_SECONDS
        return min(max(math.ceil(max(num_waiting, 1) / rate), 1), _MAX_RETRY_SECONDS)


class _Pace:
    """How many sequences finish per second while all slots are taken.

    Time in which slots were free does not count: it says how much was asked for, not how much can
    be done.
    """

    def __init__(self, num_slots: int, clock: Callable[[], float]) -> None:
        self._num_slots = num_slots
        self._clock = clock
        self._noted = clock()
        self._busy_seconds = 0.0
        # When each of the latest finished, in busy seconds; before them, when the measuring began.
        self._finished: deque[float] = deque([0.0], maxlen=_NUM_FINISHED + 1)

    def note(self, num_sequences: int, num_finished: int) -> None:
        """Count the time since the last call, in which there were `num_sequences`."""
        now = self._clock()
        if num_sequences >= self._num_slots:
            self._busy_seconds += now - self._noted
            self._finished.extend([self._busy_seconds] * num_finished)
        self._noted = now

    def per_second(self, num_sequences: int) -> float | None:
        """The rate, or None before anything has finished."""
        self.note(num_sequences, 0)
        seconds = self._busy_seconds - self._finished[0]
        num_finished = len(self._finished) - 1
        return num_finished / seconds if num_finished and seconds > 0 else None
