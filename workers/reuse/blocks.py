"""Blocks: full keys and values of adjacent prompt tokens, before retention, for later prompts.

A block has `page_tokens` tokens, and one page for each of this worker's rows. Which blocks there
are, what they stand for and when they go is the scheduler's; here is where they lie.

Blocks of prompts that drop tokens above a layer have no keys and values there. In pages of the rows
behind that layer they keep the hidden states of all their tokens as these leave it.

Shapes: B blocks, n = B * page_tokens tokens, L local layers, H local kv heads, D head dim, E hidden
size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from saqqara.workers.kv.prompts import copy_pages
from saqqara.workers.kv.store import KVStore
from saqqara.workers.transfer import to_device


class Blocks:
    """The blocks of one worker, in pages of its store.

    Args:
        kv: the store; `held` belongs among its `holders`.
    """

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        self._pages: dict[int, NDArray[np.int32]] = {}  # of each block [L, H]

    def __len__(self) -> int:
        return len(self._pages)

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether all of these blocks are here."""
        return all(block in self._pages for block in ids)

    def take(self, ids: Sequence[int]) -> bool:
        """Give new blocks their pages; False, with nothing taken, if these do not suffice."""
        kv = self._kv
        assert not any(block in self._pages for block in ids), f"blocks {ids} are here already"
        shape = (len(ids), kv.num_layers, kv.num_heads)
        needed = int(np.prod(shape))
        if needed > kv.pages_free:
            return False
        pages = kv.pool.allocate(needed).reshape(shape)
        self._pages.update(zip(ids, pages, strict=True))
        return True

    def evict(self, ids: Sequence[int]) -> None:
        """Give blocks up; those that are not here are passed over."""
        gone = [self._pages.pop(block) for block in ids if block in self._pages]
        if gone:
            self._kv.pool.release(np.concatenate(gone, axis=None))

    def pages_of(self, ids: Sequence[int]) -> NDArray[np.int32]:
        """The pages of blocks, [B, L, H]."""
        assert self.holds(ids), f"some of the blocks {ids} are not here"
        shape = (len(ids), self._kv.num_layers, self._kv.num_heads)
        pages = [self._pages[block] for block in ids]
        return np.array(pages, dtype=np.int32).reshape(shape)

    def write(self, ids: Sequence[int], layer: int, k: Tensor, v: Tensor) -> None:
        """Fill blocks in one layer.

        Args:
            ids: of adjacent blocks, in order.
            layer: local layer.
            k: keys of their tokens as rows store them, [n, H, D].
            v: values, [n, H, D].
        """
        pool, (_, num_heads, dim) = self._kv.pool, k.shape
        target = self._of_layer(self.pages_of(ids), layer)
        for stored, tokens in ((pool.k_pages, k), (pool.v_pages, v)):
            by_page = tokens.view(len(ids), pool.page_tokens, num_heads, dim).transpose(1, 2)
            stored.index_copy_(0, target, by_page.reshape(-1, pool.page_tokens, dim))

    def copy_rows(self, ids: Sequence[int], slot: int, first: int) -> None:
        """Fill blocks from full pages of a slot's rows, which are those from number `first` on."""
        table, pages = self._kv.table, self.pages_of(ids)
        entries = table.first_entry[slot][..., None] + np.arange(first, first + len(ids))
        of_rows = table.flat_pages[entries].transpose(2, 0, 1)  # [B, L, H]
        copy_pages(self._kv, of_rows.reshape(-1), pages.reshape(-1))

    def read(self, pages: NDArray[np.int32], layer: int, k: Tensor, v: Tensor) -> None:
        """Copy what adjacent blocks have of one layer.

        Args:
            pages: `pages_of` them, in order, [B, L, H].
            layer: local layer.
            k: receives the keys, [n, H, D].
            v: receives the values, [n, H, D].
        """
        pool, (_, num_heads, dim) = self._kv.pool, k.shape
        source = self._of_layer(pages, layer)
        by_page = (len(pages), num_heads, pool.page_tokens, dim)
        by_token = (len(pages), pool.page_tokens, num_heads, dim)
        for stored, tokens in ((pool.k_pages, k), (pool.v_pages, v)):
            found = stored.index_select(0, source).view(by_page)
            tokens.view(by_token).copy_(found.transpose(1, 2))

    def write_hidden(self, ids: Sequence[int], layer: int, hidden_nE: Tensor) -> None:
        """Fill the pages from a layer on with hidden states, as they enter that layer.

        Args:
            ids: of adjacent blocks, in order.
            layer: local layer; blocks have no keys and values there and above.
            hidden_nE: of their tokens, [n, E].
        """
        pool = self._kv.pool
        pages = self._hidden_pages(self.pages_of(ids), layer, hidden_nE.shape[1])
        num_pages, dim = pages.shape[1], pool.k_pages.shape[-1]
        wide = pad(hidden_nE, (0, 2 * num_pages * dim - hidden_nE.shape[1]))
        shape = (len(ids), pool.page_tokens, 2, num_pages, dim)
        halves = wide.view(shape).permute(2, 0, 3, 1, 4).flatten(1, 2)  # [2, B * pages, tokens, D]
        target = to_device(pages.reshape(-1), self._kv.table.device)
        pool.k_pages.index_copy_(0, target, halves[0])
        pool.v_pages.index_copy_(0, target, halves[1])

    def read_hidden(
        self, pages: NDArray[np.int32], layer: int, places: Tensor, hidden_size: int
    ) -> Tensor:
        """Hidden states of some tokens of adjacent blocks, as they enter a layer, [places, E].

        Args:
            pages: `pages_of` the blocks, in order, [B, L, H].
            layer: local layer, as for `write_hidden`.
            places: of the tokens among the blocks' n, int64.
            hidden_size: E.
        """
        pool = self._kv.pool
        of_blocks = to_device(self._hidden_pages(pages, layer, hidden_size), self._kv.table.device)
        block, token = places // pool.page_tokens, places % pool.page_tokens
        at = of_blocks[block], token[:, None]
        found = [stored[at].flatten(1) for stored in (pool.k_pages, pool.v_pages)]
        return torch.cat(found, dim=1)[:, :hidden_size]

    def _hidden_pages(
        self, pages: NDArray[np.int32], layer: int, hidden_size: int
    ) -> NDArray[np.int64]:
        """Which of the pages from a layer on hold hidden states, int64 [B, pages of a block]."""
        behind = pages[:, layer:].reshape(len(pages), -1)
        num = -(-hidden_size // (2 * self._kv.pool.k_pages.shape[-1]))
        assert num <= behind.shape[1], f"{num} pages of hidden states, and {behind.shape[1]} rows"
        return behind[:, :num].astype(np.int64)

    def _of_layer(self, pages: NDArray[np.int32], layer: int) -> Tensor:
        """Pages of one layer on the device, block after block, int64 [B * H]."""
        return to_device(pages[:, layer].astype(np.int64).reshape(-1), self._kv.table.device)

    def held(self) -> NDArray[np.int32]:
        """All of their pages."""
        return self.pages_of(list(self._pages)).reshape(-1)
