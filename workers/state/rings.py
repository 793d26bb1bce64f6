"""The queries of each sequence's last tokens, for the scores that look at them while decoding.

Only sequences whose retention needs them have a ring. A ring of w queries takes as much memory as
w * G / 2 tokens of KV in each row; where it remembers the queries' normalisers, too, 4 bytes more
for each query and head. How many queries a ring has follows from the prompt's length
(`growth.ring_size`), so the ledger counts the same bytes. Rings are not charged to the page
pool: they all lie in one buffer, which grows on demand, moves together before it grows (so it never
has more than `max_num_seqs` times the largest ring, which on a GPU is set aside before the pool is
sized) and goes when the last ring is closed. `WorkerMemory.ring_bytes` reports it.

Shapes: T packed tokens, N sequences, L local layers, Hq local query heads, D head dim, w queries of
a ring, C queries of the whole buffer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device, to_host


@dataclass(frozen=True, slots=True)
class Ring:
    """The contents of one ring, on the host.

    Attributes:
        queries: by place, [L, w, Hq, D].
        normalisers: float32 [L, w, Hq], where it has them.
    """

    queries: Tensor
    normalisers: Tensor | None


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
        self._no_lse = torch.empty(num_layers, 0, num_heads, dtype=torch.float32, device=device)
        self._buffer = self._empty  # [L, C, Hq, D]
        self._lse = self._no_lse  # [L, C, Hq], or without entries while no ring has normalisers
        self._start_S: NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
        self._size_S: NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
        self._normalised_S: NDArray[np.bool_] = np.zeros(num_slots, dtype=np.bool_)
        self._device = device
        self.num_open = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return self._buffer.nbytes + self._lse.nbytes

    def open(self, slot: int, num_queries: int, *, with_normalisers: bool = False) -> None:
        """Give a slot a ring of so many queries; 0 for none."""
        assert self._size_S[slot] == 0, f"slot {slot} has a ring"
        if num_queries == 0:
            return
        start, capacity = self._first_gap(num_queries), self._buffer.shape[1]
        if start + num_queries > capacity:
            used = int(self._size_S.sum())
            doubled = min(2 * capacity, len(self._size_S) * num_queries)
            self._move_together(max(capacity, used + num_queries, doubled))
            start = used
        self._start_S[slot], self._size_S[slot] = start, num_queries
        self._normalised_S[slot] = with_normalisers
        if with_normalisers and self._lse.shape[1] == 0:
            self._lse = self._no_lse.new_zeros(self._buffer.shape[:3])
        self.num_open += 1

    def close(self, slot: int) -> None:
        """Take a slot's ring back, if it has one."""
        if self._size_S[slot] == 0:
            return
        self._size_S[slot] = 0
        self._normalised_S[slot] = False
        self.num_open -= 1
        if self.num_open == 0:
            self._buffer = self._empty
        if not self._normalised_S.any():
            self._lse = self._no_lse

    def copy_of(self, slot: int) -> Ring | None:
        """A copy of a slot's ring; None if it has none."""
        if self._size_S[slot] == 0:
            return None
        places = self._places(slot)
        normalisers = None
        if self._normalised_S[slot]:
            normalisers = to_host(self._lse[:, places].clone())
        return Ring(to_host(self._buffer[:, places].clone()), normalisers)

    def restore(self, slot: int, ring: Ring | None) -> None:
        """Give a slot a ring with these contents, or none."""
        if ring is None:
            return
        has_normalisers = ring.normalisers is not None
        self.open(slot, ring.queries.shape[1], with_normalisers=has_normalisers)
        places = self._places(slot)
        self._buffer[:, places].copy_(ring.queries, non_blocking=True)
        if ring.normalisers is not None:
            self._lse[:, places].copy_(ring.normalisers, non_blocking=True)

    def refill(self, slot: int, ring: Ring | None) -> None:
        """Fill a slot's ring, if it has one, with the queries of another of its size.

        Queries to come go behind them, by their positions.
        """
        if self.size(slot) == 0:
            return
        assert ring is not None, f"no queries for the ring of slot {slot}"
        assert ring.queries.shape[1] == self.size(slot), "a ring of another size"
        assert not self._normalised_S[slot], "normalisers are of queries of one prefill"
        self._buffer[:, self._places(slot)].copy_(ring.queries, non_blocking=True)

    def _places(self, slot: int) -> slice:
        start = int(self._start_S[slot])
        return slice(start, start + self.size(slot))

    def size(self, slot: int) -> int:
        """Queries of a slot's ring; 0 for none."""
        return int(self._size_S[slot])

    def normalised(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these slots remember normalisers, [N]."""
        has: NDArray[np.bool_] = self._normalised_S[slots]
        return has

    def store(
        self,
        slot: int,
        layer: int,
        queries: Tensor,
        next_position: int,
        normalisers: Tensor | None = None,
    ) -> None:
        """Remember the last of a prompt's queries.

        Does nothing for a slot without a ring.

        Args:
            slot: the sequence's.
            layer: local layer.
            queries: [T, Hq, D], of adjacent tokens as far as the ring reaches.
            next_position: follows that of their last one.
            normalisers: float32 [T, Hq], where the ring has them.
        """
        size = self.size(slot)
        if size == 0:
            return
        last = queries[-size:]
        positions = np.arange(next_position - len(last), next_position)
        refs = to_device(self._start_S[slot] + positions % size, self._device)
        self._buffer[layer].index_copy_(0, refs, last)
        assert (normalisers is not None) == self._normalised_S[slot]
        if normalisers is not None:
            self._lse[layer].index_copy_(0, refs, normalisers[-size:])

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
        return RingWrites(
            None if every else to_device(rows, self._device), to_device(refs, self._device)
        )

    def append(self, writes: RingWrites, layer: int, queries: Tensor) -> None:
        """Remember the queries [T, Hq, D] of a step in one layer."""
        chosen = queries if writes.rows is None else queries.index_select(0, writes.rows)
        self._buffer[layer].index_copy_(0, writes.refs, chosen)

    def append_layers(self, writes: RingWrites, queries_LTHD: Tensor) -> None:
        """Remember the queries [L, T, Hq, D] of a step in all layers."""
        rows = writes.rows
        chosen = queries_LTHD if rows is None else queries_LTHD.index_select(1, rows)
        self._buffer.index_copy_(1, writes.refs, chosen)

    def places(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Where the queries at these positions [N] of these slots [N] lie, for `normalise`."""
        return to_device(self._start_S[slots] + positions % self._size_S[slots], self._device)

    def normalise(self, places: Tensor, layer: int, normalisers: Tensor) -> None:
        """Remember the normalisers [N, Hq] of the queries at these `places`."""
        self._lse[layer].index_copy_(0, places, normalisers)

    def last(
        self, slots: NDArray[np.int64], next_positions: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """All queries, [L, C, Hq, D], and where the last of these slots lie, int64 [N, w]; a view.

        Arguments as for `read`.
        """
        return self._buffer, self._last(slots, next_positions, None)

    def normalise_layers(self, places: Tensor, normalisers_LNH: Tensor) -> None:
        """Remember the normalisers [L, N, Hq] of the queries at these `places` in all layers."""
        self._lse.index_copy_(1, places, normalisers_LNH)

    def read(
        self,
        slots: NDArray[np.int64],
        layer: int,
        next_positions: NDArray[np.int64],
        num_queries: int | None = None,
    ) -> Tensor:
        """The last queries of slots with rings, oldest first, [N, w, Hq, D].

        Args:
            slots: [N].
            layer: local layer.
            next_positions: the position after the last token of each, at least w, [N].
            num_queries: w; default: all that the rings have, which then are of one size.
        """
        refs = self._last(slots, next_positions, num_queries)
        queries = self._buffer[layer].index_select(0, refs.view(-1))
        return queries.view(*refs.shape, *queries.shape[1:])

    def read_normalisers(
        self,
        slots: NDArray[np.int64],
        layer: int,
        next_positions: NDArray[np.int64],
        num_queries: int,
    ) -> Tensor:
        """The normalisers of the queries that `read` returns, float32 [N, w, Hq]."""
        assert self._normalised_S[slots].all(), "a ring has no normalisers"
        refs = self._last(slots, next_positions, num_queries)
        lse = self._lse[layer].index_select(0, refs.view(-1))
        return lse.view(*refs.shape, -1)

    def _last(
        self,
        slots: NDArray[np.int64],
        next_positions: NDArray[np.int64],
        num_queries: int | None,
    ) -> Tensor:
        """Places of the last queries, int64 [N, w]."""
        size_N = self._size_S[slots]
        if num_queries is None:
            num_queries = int(size_N[0])
            assert (size_N == num_queries).all(), "rings of different sizes"
        assert num_queries > 0, f"slot {slots[0]} has no ring"
        assert (size_N >= num_queries).all(), f"rings of {size_N} have no {num_queries} queries"
        assert (next_positions >= num_queries).all(), "a ring is not full yet"
        positions = next_positions[:, None] - num_queries + np.arange(num_queries)
        return to_device(self._start_S[slots][:, None] + positions % size_N[:, None], self._device)

    def _first_gap(self, num_queries: int) -> int:
        """The lowest place where so many entries lie free (maybe past the end)."""
        end = 0
        for slot in self._in_order():
            if self._start_S[slot] - end >= num_queries:
                break
            end = int(self._start_S[slot] + self._size_S[slot])
        return end

    def _move_together(self, capacity: int) -> None:
        """Lay all rings side by side in a new buffer of so many entries."""
        num_layers, _, num_heads, dim = self._buffer.shape
        old = [
            np.arange(self._start_S[slot], self._start_S[slot] + self._size_S[slot])
            for slot in self._in_order()
        ]
        end = 0
        for slot in self._in_order():
            self._start_S[slot], end = end, end + int(self._size_S[slot])
        buffer = self._buffer.new_zeros(num_layers, capacity, num_heads, dim)
        lse = self._no_lse
        if self._normalised_S.any():
            lse = self._lse.new_zeros(num_layers, capacity, num_heads)
        if old:
            refs = to_device(np.concatenate(old), self._device)
            buffer[:, :end] = self._buffer.index_select(1, refs)
            if lse is not self._no_lse:
                lse[:, :end] = self._lse.index_select(1, refs)
        self._buffer, self._lse = buffer, lse

    def _in_order(self) -> list[int]:
        """The slots with rings, as these lie in the buffer."""
        taken = np.flatnonzero(self._size_S)
        slots: list[int] = taken[np.argsort(self._start_S[taken])].tolist()
        return slots
