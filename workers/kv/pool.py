"""The pages themselves: fixed-size K and V pages, a stack of free ones, reference counts.

Shapes: P pages, D head dim.
"""

import math
import mmap

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class PagePool:
    """`num_pages` pages, each with the keys and the values of `page_tokens` tokens of one row.

    Every page is either on the free stack, with no references, or referenced by at least one row.
    A free page still contains what its last owner left.

    Args:
        num_pages: pages in the pool, P.
        page_tokens: tokens of one page.
        head_dim: numbers of one key, D.
        dtype: of keys and values.
        device: where the pages live; the bookkeeping is on the host.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {num_pages}")
        if page_tokens < 1:
            raise ValueError(f"page_tokens must be at least 1, not {page_tokens}")
        shape = (num_pages, page_tokens, head_dim)
        self.k_pages = _zeros(shape, dtype, device)
        self.v_pages = _zeros(shape, dtype, device)
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.refcount: NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)
        self.num_free = num_pages
        # Pops from the end: the lowest page ids go first.
        self._stack: NDArray[np.int32] = np.arange(num_pages, dtype=np.int32)[::-1].copy()
        self._num_refs = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys + values."""
        return self.k_pages[0].nbytes + self.v_pages[0].nbytes

    @property
    def any_shared(self) -> bool:
        """Whether some page has more than one reference."""
        return self._num_refs > self.num_pages - self.num_free

    @property
    def free_pages(self) -> NDArray[np.int32]:
        """Ids on the free stack, the next one to be handed out last."""
        return self._stack[: self.num_free]

    def allocate(self, count: int) -> NDArray[np.int32]:
        """Take `count` free pages, one reference each; returns their ids, int32 [count]."""
        assert 0 <= count <= self.num_free, f"{count} pages wanted, {self.num_free} are free"
        start = self.num_free - count
        pages = self._stack[start : self.num_free][::-1].copy()  # ascending, so read in order
        self.num_free = start
        self.refcount[pages] = 1
        self._num_refs += count
        return pages

    def clear(self, pages: Tensor) -> None:
        """Zero the values of pages that will be filled token by token; int64 ids on the device.

        Attention that works on whole pages multiplies values past a row's end by 0. A NaN left
        there by the last owner would reach this one.
        """
        self.v_pages.index_fill_(0, pages, 0)

    def share(self, pages: NDArray[np.int32]) -> None:
        """Add a reference to each of `pages`, different ones in use, as `KVStore.fork` does."""
        self.refcount[pages] += 1
        self._num_refs += len(pages)

    def release(self, pages: NDArray[np.int32]) -> None:
        """Drop one reference per entry of `pages`; pages without any go back to the free stack."""
        if self.any_shared:
            np.subtract.at(self.refcount, pages, np.int32(1))  # 1 of another type takes 100 times
            freed = np.unique(pages[self.refcount[pages] == 0])
        else:
            self.refcount[pages] = 0
            freed = pages
        self._stack[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)
        self._num_refs -= len(pages)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU memory that is taken from the system only as pages are first written.

    torch.zeros would touch all of it at once. Huge pages, where the system gives them, make reading
    scattered KV pages cheaper.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory would get no huge pages
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
