"""The rows: which pages hold them, and how many tokens they keep.

A row is (slot, layer, kv head). Shapes: L layers, H kv heads, R rows, N sequences.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device

from .mirror import TableMirror
from .spans import spans


class RowTable:
    """Page table and kept length of every row, on the host and on the device.

    Row `(slot, layer, head)` keeps `kept[slot, layer, head]` tokens in its first
    `ceil(kept / page_tokens)` page table entries; what its other entries hold means nothing.

    On a CPU the device tensors share the memory of the host arrays. Elsewhere lengths are a copy
    and entries a `TableMirror`, and the setters below, through which every change goes, repeat
    it there; but for the device's own decode steps, which count up the lengths of their rows on the
    device, as `KVStore.grow` does on the host.

    Args:
        num_slots: sequences that can hold pages at once.
        num_layers: local layers, L.
        num_heads: local kv heads, H.
        max_row_tokens: the most tokens a row can keep.
        page_tokens: tokens of one page.
        device: where the pages live.
        mirrored: keep separate device tensors; default: only where the device is not the host.
        mirror_entries: entries of the mirror; default: as many as all rows can have.

    Attributes:
        pages: int32 [slots, L, H, pages_per_row].
        kept: int32 [slots, L, H].
        device_pages: `pages` as a tensor that shares its memory, for a device that is the host.
        mirror: the entries on the device; None where the host's serve.
        device_kept: `kept` as a tensor on the device.
        first_entry: int64 [slots, L, H], where each row's entries start in the flat `pages`.
        flat_pages: `pages` as one dimension.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_heads: int,
        max_row_tokens: int,
        page_tokens: int,
        device: torch.device,
        mirrored: bool | None = None,
        mirror_entries: int | None = None,
    ) -> None:
        if max_row_tokens < 1:
            raise ValueError(f"max_row_tokens must be at least 1, not {max_row_tokens}")
        rows = (num_slots, num_layers, num_heads)
        pages_per_row = -(-max_row_tokens // page_tokens)
        self.max_row_tokens = max_row_tokens
        self.page_tokens = page_tokens
        self.pages: NDArray[np.int32] = np.zeros((*rows, pages_per_row), dtype=np.int32)
        self.kept: NDArray[np.int32] = np.zeros(rows, dtype=np.int32)
        self.flat_pages: NDArray[np.int32] = self.pages.reshape(-1)
        self.first_entry: NDArray[np.int64] = (
            np.arange(num_slots * num_layers * num_heads, dtype=np.int64) * pages_per_row
        ).reshape(rows)
        self.device = device
        self.device_kept = torch.from_numpy(self.kept)
        self.mirror: TableMirror | None = None
        self.device_pages = torch.from_numpy(self.pages)
        if device.type != "cpu" if mirrored is None else mirrored:
            size = self.pages.size if mirror_entries is None else mirror_entries
            self.device_kept = self.device_kept.to(device, copy=True)
            self.mirror = TableMirror(self.pages, self.kept, page_tokens, size, device)

    @property
    def num_bytes(self) -> int:
        """Bytes of entries and lengths where the device finds them."""
        entries = self.pages.nbytes if self.mirror is None else self.mirror.num_bytes
        return entries + self.device_kept.nbytes

    def layer_pages(self, slots: Tensor, layer: int, num_pages: int) -> Tensor:
        """First entries of one layer's rows of slots, int32 [N, H, num_pages] on the device."""
        if self.mirror is None:
            return self.device_pages[:, layer, :, :num_pages].index_select(0, slots)
        return self.mirror.read(self.mirror.first[:, layer].index_select(0, slots), num_pages)

    def row_pages(
        self, slots: NDArray[np.int64], layer: int, heads: NDArray[np.int64], num_pages: int
    ) -> Tensor:
        """First entries of the rows `(slots[i], layer, heads[i])`, int32 [R, num_pages]."""
        of_slots, of_heads = to_device(slots, self.device), to_device(heads, self.device)
        if self.mirror is None:
            return self.device_pages[of_slots, layer, of_heads, :num_pages]
        return self.mirror.read(self.mirror.first[of_slots, layer, of_heads], num_pages)

    def flat_rows(self, first_entry: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """All entries on the device as one dimension, and where rows lie among them.

        Args:
            first_entry: where the rows, or later entries of theirs, lie in `flat_pages`, [R].
        """
        if self.mirror is None:
            return self.device_pages.view(-1), first_entry
        return self.mirror.entries, self.mirror.begins(first_entry)

    def num_pages(self, kept: NDArray[np.int32]) -> NDArray[np.int32]:
        """Pages that rows of these lengths use; same shape."""
        pages: NDArray[np.int32] = (kept + np.int32(self.page_tokens - 1)) // np.int32(
            self.page_tokens
        )
        return pages

    def used_entries(
        self, first_entry: NDArray[np.int64], kept: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Flat page table entries in use by rows of any shape, row after row."""
        return spans(first_entry.reshape(-1), self.num_pages(kept).reshape(-1))

    def set_pages(self, entries: NDArray[np.int64], pages: NDArray[np.int32]) -> None:
        """Write page ids into flat page table entries."""
        self.flat_pages[entries] = pages
        if self.mirror is not None:
            self.mirror.set_pages(entries)

    def set_kept(self, slots: NDArray[np.int64], kept: NDArray[np.int32]) -> None:
        """Set the lengths of all rows of slots; `kept` is [N, L, H]."""
        self.kept[slots] = kept
        if self.mirror is not None:
            self.device_kept[to_device(slots, self.device)] = to_device(kept, self.device)

    def set_layer_kept(self, slots: NDArray[np.int64], layer: int, kept: NDArray[np.int32]) -> None:
        """Set the lengths of the rows of one layer of slots; `kept` is [N, H]."""
        self.kept[slots, layer] = kept
        if self.mirror is not None:
            self.device_kept[to_device(slots, self.device), layer] = to_device(kept, self.device)

    def set_rows_kept(
        self,
        slots: NDArray[np.int64],
        layer: int,
        heads: NDArray[np.int64],
        kept: NDArray[np.int32],
    ) -> None:
        """Set the lengths [R] of the rows `(slots[i], layer, heads[i])` of one layer."""
        self.kept[slots, layer, heads] = kept
        if self.mirror is not None:
            of_slots, of_heads = to_device(slots, self.device), to_device(heads, self.device)
            self.device_kept[of_slots, layer, of_heads] = to_device(kept, self.device)

    def copy_slot(self, source: int, target: int) -> None:
        """Give the rows of one slot the pages and lengths of another's."""
        self.pages[target] = self.pages[source]
        self.kept[target] = self.kept[source]
        if self.mirror is not None:
            self.device_kept[target] = self.device_kept[source]
            self.mirror.set_pages(self.used_entries(self.first_entry[target], self.kept[target]))
