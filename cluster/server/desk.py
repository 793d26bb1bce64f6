"""A thread beside the event loop for what takes long, in which those who ask have turns."""

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

from .admission import OverloadedError

T = TypeVar("T")

_RETRY_SECONDS = 5


class Desk:
    """Runs functions in one thread, one after the other; used in one event loop.

    Owners have turns by cost (start-time fair queueing, as `scheduling/queue.py` has for
    sequences), so nobody waits behind all that another one brings; an owner's own go in order.

    Args:
        name: of the thread.
        most_waiting: how many calls of an owner may wait.
    """

    def __init__(self, name: str, most_waiting: Callable[[str], int]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._most_waiting = most_waiting
        self._is_busy = False
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._num_waiting: Counter[str] = Counter()
        self._now = 0.0  # where the one that runs began, in cost
        self._ends: dict[str, float] = {}  # where the last of each owner ends
        self._order = count()

    async def run(self, owner: str, cost: float, function: Callable[[], T]) -> T:
        """What a function gives, when it is its turn.

        Args:
            owner: who asks; empty where nobody shares with others.
            cost: how long it may take, in any unit that all calls have.
            function: called in the thread.

        Raises:
            OverloadedError: too many of the owner's calls wait.
        """
        if self._is_busy:
            await self._turn(owner, cost)
        else:
            self._is_busy = True
            self._ends[owner] = self._now + cost
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        finally:
            self._let_next_in()

    def close(self) -> None:
        """Take nothing more."""
        self._thread.shutdown(wait=False)

    async def _turn(self, owner: str, cost: float) -> None:
        if self._num_waiting[owner] >= self._most_waiting(owner):
            raise OverloadedError(_RETRY_SECONDS, is_share=bool(owner))
        start = max(self._now, self._ends.get(owner, 0.0))
        self._ends[owner] = start + cost
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (start, next(self._order), turn))
        self._num_waiting[owner] += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had come already
                self._let_next_in()
            raise
        finally:
            self._num_waiting[owner] -= 1

    def _let_next_in(self) -> None:
        while self._waiting:
            self._now, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._is_busy = False
        self._now = 0.0
        self._ends.clear()
        self._num_waiting.clear()
