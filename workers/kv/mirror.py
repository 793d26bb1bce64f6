"""The page tables on a device that is not the host: as long as what is used of them.

On the host a table of `max_model_len` for each row costs address space only. On a GPU it would cost
memory: 5.4 GB for 256 slots of 131,072 tokens in 80 layers x 8 kv heads. There all rows lie in one
buffer, the entries of a row together. A row that outgrows its room gets twice as much at the
buffer's end; when that is reached, all rows move together.

Shapes: L layers, H kv heads, R rows, E entries of the buffer, W entries of the longest row.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.fixed_sizes import LEAST_ROOM
from saqqara.workers.transfer import to_device

from .spans import spans


class TableMirror:
    """Page table entries of all rows on the device, and where those of each row begin.

    Args:
        pages: the host's table, int32 [slots, L, H, W].
        kept: the host's lengths, int32 [slots, L, H]; both are read when rows move.
        page_tokens: tokens of one page.
        size: entries of the buffer, E.
        device: where it is.

    Attributes:
        entries: int32 [E].
        first: int64 [slots, L, H], where a row's entries begin; of an empty row any place.
    """

    def __init__(
        self,
        pages: NDArray[np.int32],
        kept: NDArray[np.int32],
        page_tokens: int,
        size: int,
        device: torch.device,
    ) -> None:
        self._pages = pages.reshape(-1)
        self._kept_R = kept.reshape(-1)
        self._page_tokens = page_tokens
        self._width = pages.shape[-1]
        self._device = device
        num_rows = kept.size
        is_whole = size >= pages.size  # every row has its place for good
        self._first_R = np.arange(num_rows, dtype=np.int64) * (self._width if is_whole else 0)
        self._room_R = np.full(num_rows, self._width if is_whole else 0, dtype=np.int64)
        self._end = 0
        self.entries = torch.zeros(size, dtype=torch.int32, device=device)
        self.first = torch.from_numpy(self._first_R.reshape(kept.shape)).to(device, copy=True)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self.entries.nbytes + self.first.nbytes

    def set_pages(self, entries: NDArray[np.int64]) -> None:
        """Repeat what was written to flat entries of the host's table."""
        rows, columns = np.divmod(entries, self._width)
        outgrown = columns >= self._room_R[rows]
        if outgrown.any():
            used_R = self._used()
            needed_R = used_R.copy()
            np.maximum.at(needed_R, rows, columns + 1)
            grown = np.unique(rows[outgrown])
            if not self._give_room(grown, needed_R[grown]):
                self._move_together(needed_R)
                return
            entries = np.concatenate([spans(grown * self._width, used_R[grown]), entries])
            rows, columns = np.divmod(entries, self._width)
        places = to_device(self._first_R[rows] + columns, self._device)
        self.entries[places] = to_device(self._pages[entries], self._device)

    def read(self, first: Tensor, num_pages: int) -> Tensor:
        """The first entries of rows, [*, num_pages]; past a row's own they are anyone's.

        Args:
            first: where the rows begin, some of `self.first`, [*].
            num_pages: entries of each.
        """
        places = first[..., None] + torch.arange(num_pages, device=self._device)
        return self.entries[places.clamp_(max=len(self.entries) - 1)]

    def begins(self, first_entry: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where entries of rows lie here that lie in the host's flat table at `first_entry`."""
        rows = np.minimum(first_entry // self._width, len(self._first_R) - 1)  # the end is no row
        begins: NDArray[np.int64] = self._first_R[rows] + first_entry - rows * self._width
        return begins

    def _used(self) -> NDArray[np.int64]:
        """Entries that every row uses by its length, [R]."""
        return -(-self._kept_R.astype(np.int64) // self._page_tokens)

    def _give_room(self, rows: NDArray[np.int64], needed: NDArray[np.int64]) -> bool:
        """More room for rows, at the end of the buffer; False if that is reached."""
        rooms = self._rooms(needed)
        ends = self._end + np.cumsum(rooms)
        if ends[-1] > len(self.entries):
            return False
        self._first_R[rows], self._room_R[rows], self._end = ends - rooms, rooms, int(ends[-1])
        begins = to_device(self._first_R[rows], self._device)
        self.first.view(-1)[to_device(rows, self._device)] = begins
        return True

    def _move_together(self, needed_R: NDArray[np.int64]) -> None:
        """Give every row its place anew, one after the other."""
        self._room_R = self._rooms(needed_R)
        ends = np.cumsum(self._room_R)
        self._first_R, self._end = ends - self._room_R, int(ends[-1])
        size = len(self.entries)
        assert self._end <= size, f"rows that share pages need {self._end} entries of {size}"
        packed = np.zeros(self._end, dtype=np.int32)
        begins = np.arange(len(needed_R)) * self._width
        packed[spans(self._first_R, needed_R)] = self._pages[spans(begins, needed_R)]
        self.first.view(-1).copy_(to_device(self._first_R.copy(), self._device))
        self.entries[: self._end].copy_(to_device(packed, self._device))

    def _rooms(self, needed: NDArray[np.int64]) -> NDArray[np.int64]:
        """Entries to set aside for rows that use so many: the next power of two."""
        exponent = np.ceil(np.log2(np.maximum(needed, LEAST_ROOM))).astype(np.int64)
        rooms: NDArray[np.int64] = np.where(needed > 0, np.int64(1) << exponent, 0)
        return np.minimum(rooms, self._width)
