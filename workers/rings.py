"""The queries of each sequence's last tokens, for the scores that look at them while decoding.

Only sequences whose retention needs them have a ring. A ring of w queries takes as much memory as
w * G / 2 tokens of KV in each row. Rings are not charged to the page pool: they all lie in one
buffer, which grows on demand (with one w to at most `max_num_seqs * w` queries per layer, which on
a GPU is set aside before the pool is sized) and goes when the last ring is closed.
`WorkerMemory.ring_bytes` reports it.

Shapes: T packed tokens, N sequences, L local layers, Hq local query heads, D head dim, w queries of
a ring, C queries of the whole buffer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .transfer import to_device


@dataclass(frozen=True, slots=True)
class RingWrites:
    """Where one step's queries go, in every layer.

    Attributes:
        rows: int64 [M], the tokens of the step whose queries are remembered; None for all.
        refs: int64 [M], their places in the buffer.
    """

    rows: Tensor | None
    refs: Tensor


class QueryRings:
    """Ring buffers of rotated queries: the one at position p is entry `p % w` of its slot's ring.

    Args:
        num_slots: slots of the worker.
        num_layers: local layers, L.
        num_heads: local query heads, Hq.
        head_dim: numbers of one query, D.
        dtype: of queries.
        device: where they live.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._empty = torch.empty(num_layers, 0, num_heads, head_dim, dtype=dtype, device=device)
        self._buffer = self._empty  # [L, C, Hq, D]
        self._start_S: NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
        self._size_S: NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
        self.num_open = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return self._buffer.nbytes

    def open(self, slot: int, num_queries: int) -> None:
        """Give a slot a ring of so many queries; 0 for none."""
        assert self._size_S[slot] == 0, f"slot {slot} has a ring"
        if num_queries == 0:
            return
        start = self._first_gap(num_queries)
        capacity = self._buffer.shape[1]
        if start + num_queries > capacity:
            num_layers, _, num_heads, dim = self._buffer.shape
            doubled = min(2 * capacity, len(self._size_S) * num_queries)
            more = max(start + num_queries, doubled) - capacity
            added = self._buffer.new_zeros(num_layers, more, num_heads, dim)
            self._buffer = torch.cat([self._buffer, added], dim=1)
        self._start_S[slot], self._size_S[slot] = start, num_queries
        self.num_open += 1

    def close(self, slot: int) -> None:
        """Take a slot's ring back, if it has one."""
        if self._size_S[slot] == 0:
            return
        self._size_S[slot] = 0
        self.num_open -= 1
        if self.num_open == 0:
            self._buffer = self._empty

    def store(self, slot: int, layer: int, queries: Tensor, next_position: int) -> None:
        """Remember the last of these queries [T, Hq, D]; `next_position` follows their last one.

        Does nothing for a slot without a ring.
        """
        size = int(self._size_S[slot])
        if size == 0:
            return
        last = queries[-size:]
        positions = np.arange(next_position - len(last), next_position)
        refs = self._to_device(self._start_S[slot] + positions % size)
        self._buffer[layer].index_copy_(0, refs, last)

    def writes(
        self, slots: NDArray[np.int64], num_tokens: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> RingWrites | None:
        """Plan the writes of a step; None if none of its sequences has a ring.

        Args:
            slots: different slots, [N].
            num_tokens: fed tokens of each, [N]; they sum to T.
            positions: of the tokens, slot after slot, [T].
        """
        if not self._size_S[slots].any():
            return None
        slot_T = np.repeat(slots, num_tokens)
        size_T = self._size_S[slot_T]
        until_end_T = np.repeat(np.cumsum(num_tokens), num_tokens) - np.arange(len(slot_T))
        rows = np.flatnonzero(until_end_T <= size_T)
        refs = self._start_S[slot_T[rows]] + positions[rows] % size_T[rows]
        every = len(rows) == len(slot_T)
        return RingWrites(None if every else self._to_device(rows), self._to_device(refs))

    def append(self, writes: RingWrites, layer: int, queries: Tensor) -> None:
        """Remember the queries [T, Hq, D] of a step in one layer."""
        chosen = queries if writes.rows is None else queries.index_select(0, writes.rows)
        self._buffer[layer].index_copy_(0, writes.refs, chosen)

    def read(
        self, slots: NDArray[np.int64], layer: int, next_positions: NDArray[np.int64]
    ) -> Tensor:
        """The last w queries of slots with rings of one size, oldest first, [N, w, Hq, D].

        Args:
            slots: [N].
            layer: local layer.
            next_positions: the position after the last token of each, at least w, [N].
        """
        size = int(self._size_S[slots[0]])
        assert size > 0, f"slot {slots[0]} has no ring"
        assert (self._size_S[slots] == size).all(), "rings of different sizes"
        assert (next_positions >= size).all(), "a ring is not full yet"
        positions = next_positions[:, None] - size + np.arange(size)
        refs = self._to_device(self._start_S[slots][:, None] + positions % size)
        queries = self._buffer[layer].index_select(0, refs.view(-1))
        return queries.view(len(slots), size, *queries.shape[1:])

    def _first_gap(self, num_queries: int) -> int:
        """The lowest place where so many entries lie free (maybe past the end)."""
        taken = np.flatnonzero(self._size_S)
        end = 0
        for slot in taken[np.argsort(self._start_S[taken])].tolist():
            if self._start_S[slot] - end >= num_queries:
                break
            end = int(self._start_S[slot] + self._size_S[slot])
        return end

    def _to_device(self, places: NDArray[np.int64]) -> Tensor:
        return to_device(places, self._buffer.device)
