"""Rows of local layers: rings of the last W tokens of their sequences.

The token at position p of the text lies at place p mod W, so a row needs no more than its length
and the number of tokens that its sequence has seen to tell which token lies where. All heads of all
local layers of a slot are of one length.

Shapes: N sequences, T new tokens of all of them, L local layers of this worker (here "local" means
of the worker; what has a window is a *windowed* layer), H kv heads.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .spans import spans

Ints = NDArray[np.int64]


class Rings:
    """Which layers of a worker have a window, and how many tokens each slot's sequence has seen.

    Args:
        windows: of each of the worker's layers, 0 where it has none.
        num_slots: sequences that can hold pages at once.

    Attributes:
        window: W; 0 where no layer has one.
        windowed: numbers of the layers with a window.
        others: numbers of the layers without one.
        seen: tokens that went into the rows of each slot, int64 [slots]; counted only where some
            layer has a window.
    """

    def __init__(self, windows: Sequence[int], num_slots: int) -> None:
        self.window = max(windows)
        assert {*windows} <= {0, self.window}, f"windows of different size: {windows}"
        self.windowed: Ints = np.flatnonzero(windows)
        self.others: Ints = np.flatnonzero(np.array(windows) == 0)
        self.seen: Ints = np.zeros(num_slots, dtype=np.int64)
        self._caps = np.array(windows, dtype=np.int32)[:, None]  # [L, 1]
        self._is_windowed = self._caps > 0

    def __contains__(self, layer: int) -> bool:
        """Whether a layer has a window."""
        return bool(self.window) and bool(self._is_windowed[layer, 0])

    def start(self, layer: int, slot: int, num_tokens: int) -> None:
        """Note that a slot's rows in a layer have been written, of a prompt of so many tokens."""
        if layer in self:
            self.seen[slot] = num_tokens

    def capped(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """The lengths [N, L, H], of windowed layers no more than W."""
        capped: NDArray[np.int32] = np.where(
            self._is_windowed, np.minimum(lengths, self._caps), lengths
        )
        return capped

    def prompt_order(self, num_tokens: int) -> Ints | None:
        """Which token of a prompt lies at each place of a ring; None: all, in order."""
        if num_tokens <= self.window:
            return None
        newest = num_tokens - 1
        places = np.arange(self.window, dtype=np.int64)
        order: Ints = newest - (newest - places) % self.window
        return order

    def positions(self, seen: Ints, nth: Ints, stored: NDArray[np.int32]) -> NDArray[np.int32]:
        """Where new tokens go in their rows, int32 [T, L, H].

        Args:
            seen: tokens that each one's sequence has seen before the step, [T].
            nth: which of the step's new tokens of its sequence each one is, [T].
            stored: where they go in rows that grow, [T, L, H].
        """
        place = ((seen + nth) % self.window).astype(np.int32)
        positions: NDArray[np.int32] = np.where(self._is_windowed, place[:, None, None], stored)
        return positions

    def touched(self, slot: int, num_new: int, page_tokens: int) -> Ints:
        """The filled page table entries of a slot's rings that new tokens go into, rising."""
        seen = int(self.seen[slot])
        places = (seen + np.arange(min(num_new, self.window))) % self.window
        columns: Ints = np.unique(places[places < seen] // page_tokens)
        return columns

    def in_order(self, seen: Ints) -> tuple[Ints, Ints]:
        """The places of what rings hold that have seen so many tokens [N], the newest last.

        Returns:
            Places, one ring after the other, and how many each ring has, [N].
        """
        counts = np.minimum(seen, self.window)
        return spans(seen - counts, counts) % self.window, counts
