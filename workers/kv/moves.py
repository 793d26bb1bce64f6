"""How keys and values are moved on a GPU: by kernels that copy each token once, in place.

The store decides which pages are whose; this says how their contents get there. Nothing here waits
for the device.

Shapes: T packed tokens, R rows, H kv heads, D head dim.
"""

import importlib.util
import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device

from .pool import PagePool
from .spans import spans
from .table import RowTable


def kernels_can_move(device: torch.device) -> bool:
    """Whether the kernels of `KernelMoves` run on this device.

    On a CPU that is in Triton's interpreter, for tests; the store uses them there only if told.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


class KernelMoves:
    """Moves tokens of one store's pages with Triton kernels."""

    def __init__(self, pool: PagePool, table: RowTable) -> None:
        from saqqara.workers.kernels import pages

        self._kernels = pages
        self._pool = pool
        self._table = table

    def fill(
        self,
        pages: NDArray[np.int32],
        counts: NDArray[np.int32],
        heads: NDArray[np.int64],
        starts: NDArray[np.int64],
        k: Tensor,
        v: Tensor,
        indices: Tensor | None,
    ) -> None:
        """Fill the pages of empty rows with selected tokens of their sequences.

        Args:
            pages: of all rows, row after row, in order.
            counts: tokens of each row, int32 [R].
            heads: the kv head of each row, [R].
            starts: where each row's sequence begins in `k` and `v`, [R].
            k: keys, [T, H, D].
            v: values, [T, H, D].
            indices: the tokens of its sequence that each row keeps, row after row, int64; None: the
                first ones.
        """
        num_pages = self._table.num_pages(counts)
        row = np.repeat(np.arange(len(counts)), num_pages)
        nth = spans(np.zeros(len(counts), dtype=np.int64), num_pages)  # page of its row
        first = nth * self._pool.page_tokens
        left = np.minimum(counts[row] - first, self._pool.page_tokens)
        if indices is not None:
            first = first + (np.cumsum(counts, dtype=np.int64) - counts)[row]
        jobs = np.stack([pages.astype(np.int64), heads[row], first, left, starts[row]], axis=1)
        pool = self._pool
        on_device = to_device(np.ascontiguousarray(jobs), self._table.device)
        self._kernels.fill_pages(k, v, pool.k_pages, pool.v_pages, on_device, indices)

    def append(self, k: Tensor, v: Tensor, refs: Tensor) -> None:
        """Store new tokens [T, H, D] at the flat places `refs`, int64 [T, H]."""
        dim = k.shape[-1]
        stored = (self._pool.k_pages.view(-1, dim), self._pool.v_pages.view(-1, dim))
        self._kernels.append_tokens(k, v, *stored, refs)

    def compact(
        self, first_entry: NDArray[np.int64], indices: Tensor, counts: NDArray[np.int32]
    ) -> None:
        """Move the kept tokens of rows to their fronts; no page of theirs may be shared.

        Args:
            first_entry: where the table of each row begins, [R].
            indices: the places that rows keep, row after row, ascending in each, int64.
            counts: how many tokens each keeps, at least 1, [R].
        """
        counts = counts.astype(np.int64)
        flat_pages, begins = self._table.flat_rows(first_entry)
        of_rows = np.ascontiguousarray(np.stack([begins, np.cumsum(counts) - counts, counts]))
        rows = to_device(of_rows, self._table.device)
        pool = self._pool
        stored = (pool.k_pages, pool.v_pages, flat_pages)
        self._kernels.compact_tokens(*stored, rows[0], indices, rows[1], rows[2])
