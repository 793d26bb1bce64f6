"""Running sums of the attention that stored tokens get, for the scores that compact rows by them.

Only sequences whose retention needs them have sums. A sum takes 4 bytes per stored token of a row,
where the token's key and value take `4 * D` bytes in bfloat16. Like the query rings the sums are
not charged to the page pool: they all lie in one buffer, which grows on demand and goes when the
last of its sequences leaves. `WorkerMemory.mass_bytes` reports it.

Shapes: N sequences, R rows of one layer, n tokens of a prompt, L local layers, H local kv heads,
C places for sequences, W tokens of the longest row there may be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device, to_host


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums of one slot, on the host.

    Attributes:
        masses: float32 [L, H, tokens of its longest row].
        most_tokens: tokens that a row of it may grow to.
    """

    masses: Tensor
    most_tokens: int


class MassSums:
    """Sums by place in storage: entry t of a row belongs to its t-th stored token.

    What lies past the end of a row is 0, so a token that is appended starts with nothing.

    Args:
        num_slots: slots of the worker.
        num_layers: local layers, L.
        num_heads: local kv heads, H.
        device: where they live.
    """

    def __init__(
        self, num_slots: int, num_layers: int, num_heads: int, device: torch.device
    ) -> None:
        self._empty = torch.empty(num_layers, 0, num_heads, 0, device=device)
        self._sums = self._empty  # [L, C, H, W]
        self._place_S: NDArray[np.int64] = np.full(num_slots, -1, dtype=np.int64)
        self._most_S: NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)  # tokens of a row
        self._free_places: list[int] = []
        self._device = device

    @property
    def buffer(self) -> Tensor:
        """All sums, float32 [L, C, H, W]; those of a slot lie at its place."""
        return self._sums

    def places(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of slots with sums, [N]."""
        places: NDArray[np.int64] = self._place_S[slots]
        return places

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return self._sums.nbytes

    @property
    def num_open(self) -> int:
        """Sequences with sums."""
        return int(np.count_nonzero(self._place_S >= 0))

    def __contains__(self, slot: int) -> bool:
        return bool(self._place_S[slot] >= 0)

    def open(self, slot: int) -> None:
        """Give a slot sums, all 0."""
        assert self._place_S[slot] < 0, f"slot {slot} has sums"
        if not self._free_places:
            places = self._sums.shape[1]
            more = max(1, min(places, len(self._place_S) - places))
            self._grow(places + more, self._sums.shape[3])
            self._free_places = list(range(places, places + more))[::-1]
        place = self._free_places.pop()
        self._place_S[slot], self._most_S[slot] = place, 0
        self._sums[:, place] = 0

    def close(self, slot: int) -> None:
        """Take a slot's sums back, if it has any."""
        if self._place_S[slot] < 0:
            return
        self._free_places.append(int(self._place_S[slot]))
        self._place_S[slot] = -1
        if self.num_open == 0:
            self._sums, self._free_places = self._empty, []

    def copy_of(self, slot: int, num_tokens: int) -> Sums | None:
        """A copy of a slot's sums, whose longest row has so many tokens; None if it has none."""
        if self._place_S[slot] < 0:
            return None
        mine = self._sums[:, self._place_S[slot], :, :num_tokens]
        return Sums(to_host(mine.clone()), int(self._most_S[slot]))

    def restore(self, slot: int, sums: Sums | None) -> None:
        """Give a slot these sums, or none."""
        if sums is None:
            return
        self.open(slot)
        num_tokens = sums.masses.shape[2]
        self._most_S[slot] = sums.most_tokens
        self._grow(self._sums.shape[1], max(sums.most_tokens, num_tokens))
        mine = self._sums[:, self._place_S[slot], :, :num_tokens]
        mine.copy_(sums.masses, non_blocking=True)

    def has(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these slots have sums, [N]."""
        owns: NDArray[np.bool_] = self._place_S[slots] >= 0
        return owns

    def store(
        self,
        slot: int,
        layer: int,
        masses: Tensor,
        indices: Tensor | Sequence[Tensor] | None,
        more_tokens: int,
    ) -> None:
        """Start with what prefill counted for the tokens that were kept.

        Args:
            slot: with sums.
            layer: local layer.
            masses: of all tokens that entered the layer, float32 [H, n].
            indices: which tokens each head keeps, as `KVStore.write` takes them.
            more_tokens: by which the rows may grow.
        """
        kept = masses if indices is None else [m[i] for m, i in zip(masses, indices, strict=True)]
        longest = max(len(row) for row in kept)
        self._most_S[slot] = max(self._most_S[slot], longest + more_tokens)
        self._grow(self._sums.shape[1], int(self._most_S[slot]))
        mine = self._sums[layer, self._place_S[slot]]
        for head, row in enumerate(kept):
            mine[head, : len(row)] = row

    def add(self, slots: NDArray[np.int64], layer: int, masses: Tensor) -> None:
        """Add the attention of one decode step.

        Args:
            slots: different ones, with sums, [N].
            layer: local layer.
            masses: float32 [N, H, any width], 0 past the end of a row.
        """
        places = to_device(self._place_S[slots], self._device)
        width = min(masses.shape[2], self._sums.shape[3])
        self._sums[layer, :, :, :width].index_add_(0, places, masses[:, :, :width])

    def read(
        self, slots: NDArray[np.int64], layer: int, heads: NDArray[np.int64], num_tokens: int
    ) -> Tensor:
        """Sums of the rows `(slots[i], layer, heads[i])` of one length, float32 [R, num_tokens]."""
        return self._sums[layer, *self._rows(slots, heads), :num_tokens]

    def read_ends(
        self,
        slots: NDArray[np.int64],
        layer: int,
        heads: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Tensor:
        """Sums of rows of these lengths [R], which end in the last column; before them 0."""
        most = int(lengths.max())
        rows = self._sums[layer, *self._rows(slots, heads), :most]
        first = to_device(most - lengths, self._device)[:, None]
        place = torch.arange(most, device=self._device) - first
        return rows.gather(1, place.clamp_min(0)).masked_fill_(place < 0, 0)

    def compact(
        self, slots: NDArray[np.int64], layer: int, heads: NDArray[np.int64], indices: Tensor
    ) -> None:
        """Keep only those of the tokens `indices` [R, keep], in this order; see `compact_rows`."""
        place, head = self._rows(slots, heads)
        rows = self._sums[layer, place, head]
        kept = torch.zeros_like(rows)
        kept[:, : indices.shape[1]] = rows.gather(1, indices)
        self._sums[layer, place, head] = kept

    def compact_each(
        self,
        slots: NDArray[np.int64],
        layer: int,
        heads: NDArray[np.int64],
        indices: Tensor,
        counts: NDArray[np.int32],
    ) -> None:
        """`compact` for rows that keep different numbers [R], `indices` row after row."""
        place, head = self._rows(slots, heads)
        rows = self._sums[layer, place, head]
        count = to_device(counts.astype(np.int64), self._device)
        row = torch.repeat_interleave(count, output_size=len(indices))
        nth = torch.arange(len(indices), device=self._device) - (count.cumsum(0) - count)[row]
        kept = torch.zeros_like(rows)
        kept[row, nth] = rows[row, indices]
        self._sums[layer, place, head] = kept

    def _rows(self, slots: NDArray[np.int64], heads: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return to_device(self._place_S[slots], self._device), to_device(heads, self._device)

    def _grow(self, num_places: int, num_tokens: int) -> None:
        """Make room for so many places and tokens of a row, at least."""
        num_layers, places, num_heads, tokens = self._sums.shape
        if num_places <= places and num_tokens <= tokens:
            return
        shape = (num_layers, max(num_places, places), num_heads, max(num_tokens, tokens))
        larger = self._sums.new_zeros(shape)
        larger[:, :places, :, :tokens] = self._sums
        self._sums = larger
