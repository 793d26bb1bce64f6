"""How many sequences of batches a replica runs at once, so that others find room."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

_LOOK_SECONDS = 0.05  # between two looks for a slot that nobody uses


class Room:
    """Places for sequences of batches; used in one event loop. Who comes first is let in first.

    Args:
        capacity: sequences at once.
        num_free: slots of the engine that no request has or waits for.
    """

    def __init__(self, capacity: int, num_free: Callable[[], int]) -> None:
        self.capacity = capacity
        self._num_free = num_free
        self._num_used = 0
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    async def enter(self, num_sequences: int) -> None:
        """Wait for places, and for slots that no other request wants, and take them.

        Args:
            num_sequences: at most the capacity; as many as that are alone.
        """
        assert 0 < num_sequences <= self.capacity
        async with self._turn:
            while self._num_used + num_sequences > self.capacity:
                self._left.clear()
                await self._left.wait()
            while self._num_free() < 1:
                await asyncio.sleep(_LOOK_SECONDS)
            self._num_used += num_sequences

    def leave(self, num_sequences: int) -> None:
        """Give places back."""
        self._num_used -= num_sequences
        self._left.set()

    def fitting(self, body: Mapping[str, Any]) -> int:
        """Places that a request takes: its sequences, or all where it has more."""
        given = body.get("n")
        num_choices = given if type(given) is int and given > 0 else 1
        prompt = body.get("prompt")
        is_many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return min(num_choices * (len(prompt) if is_many and prompt else 1), self.capacity)
