"""Cached prefixes as sequences use them: pins, pages charged for, and what plans say of them.

Shapes: W workers.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.retention import Retention
from saqqara.workers.plan import CachedPrefix

from .limits import Cuts, keeps_whole_prompt, why_not_reused
from .prefixes import NOTHING, Block, Counts, Found, Prefixes, block_keys

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]


class Pages(Protocol):
    """Who counts the pages of all workers: the ledger."""

    free: Ints

    @property
    def rows_per_worker(self) -> Ints:
        """Rows that one sequence, and so one block, has on each worker, int64 [W]."""
        ...

    def set_aside(self, pages_W: Ints) -> None:
        """Charge pages that no slot holds."""
        ...

    def take_back(self, pages_W: Ints) -> None:
        """Give them back."""
        ...


@dataclass(slots=True, eq=False)
class Use:
    """What one sequence has to do with blocks while it holds a slot.

    Attributes:
        cached: of its first tokens; their pins are its own.
        stored: those that its prefill fills.
        is_shared: whether its rows hold the pages of `cached`, so that they stay until it goes.
        is_through: whether the end of its prefill is planned.
        is_settled: whether that is absorbed, or will never be.
        is_doomed: whether what it stores is void.
        has_left: whether its slot is free.
    """

    cached: tuple[Block, ...]
    stored: tuple[Block, ...] = ()
    is_shared: bool = False
    is_through: bool = False
    is_settled: bool = False
    is_doomed: bool = False
    has_left: bool = False

    @property
    def num_shared(self) -> int:
        """Pages of each of its global rows that are those of blocks."""
        return len(self.cached) if self.is_shared else 0

    def prefix(self) -> CachedPrefix | None:
        """What plans say of it."""
        if not self.cached and not self.stored:
            return None
        cached = tuple(block.block_id for block in self.cached)
        return CachedPrefix(cached, tuple(b.block_id for b in self.stored), self.is_shared)


class CachedPrefixes:
    """The blocks of a replica, in the pages that no sequence needs.

    Args:
        prefixes: which there are.
        pages: where they are charged; a replica that has just started holds none of them.
        most_blocks: that may be held at once; 0: nothing is cached.
        page_tokens: tokens of a block.
        cuts: what retentions that propagate may use.
        most_shared: blocks whose pages rows may hold, counted once for each sequence; None: any
            number.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        pages: Pages,
        most_blocks: int,
        page_tokens: int,
        cuts: Cuts,
        most_shared: int | None = None,
    ) -> None:
        prefixes.forget()
        self._prefixes = prefixes
        self._pages = pages
        self._most_blocks = most_blocks
        self._page_tokens = page_tokens
        self._cuts = cuts
        self._most_shared, self._num_shared = most_shared, 0
        self._evicted: list[int] = []
        self._filling = 0  # uses that store and are not settled
        self._told: set[str] = set()

    @property
    def num_blocks(self) -> int:
        """Blocks that have pages."""
        return self._prefixes.num_blocks

    @property
    def counts(self) -> Counts:
        """What was stored and evicted since the start."""
        return self._prefixes.counts

    @property
    def page_tokens(self) -> int:
        """Tokens of a block."""
        return self._page_tokens

    @property
    def idle_pages(self) -> Ints:
        """Pages of blocks that nobody uses now, int64 [W]: they are as good as free."""
        idle: Ints = self._prefixes.num_idle * self._pages.rows_per_worker
        return idle

    @property
    def quiet_pages(self) -> Ints:
        """Pages of blocks that go with the conversations whose rows share them, int64 [W]."""
        quiet: Ints = self._prefixes.num_quiet * self._pages.rows_per_worker
        return quiet

    def set_quiet(self, use: Use, *, is_quiet: bool) -> None:
        """Note whether whoever shares blocks waits for the next turn of its conversation."""
        if use.is_shared:
            self._prefixes.add_quiet(use.cached, 1 if is_quiet else -1)

    def has_quiet(self, use: Use) -> bool:
        """Whether nobody but conversations that wait shares some of the blocks in use."""
        return use.is_shared and self._prefixes.has_quiet(use.cached)

    @property
    def is_filling(self) -> bool:
        """Whether there are blocks that will be ready, or gone, once plans in flight have come."""
        return self._filling > 0

    @property
    def has_evicted(self) -> bool:
        """Whether the workers have yet to be told of blocks that are gone."""
        return bool(self._evicted)

    def take_evicted(self) -> list[int]:
        """Blocks for the plan in the making to evict."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def keys(
        self, token_ids: tuple[int, ...], retention: Retention, owner: str, cache_salt: str
    ) -> tuple[bytes, ...]:
        """The keys of a prompt's blocks; none where it takes no part."""
        if self._most_blocks == 0:
            return ()
        reason = why_not_reused(retention)
        if reason is None:
            reason = self._cuts.why_not_reused(retention, len(token_ids))
        if reason is not None:
            if retention.method not in self._told:
                self._told.add(retention.method)
                logger.info("prefix caching: %s takes no part: %s", retention.method, reason)
            return ()
        cut = self._cuts.first(retention, len(token_ids))
        return block_keys(token_ids, self._page_tokens, owner, cache_salt, cut)

    def see(self, keys: tuple[bytes, ...]) -> None:
        """A request has come with such a prompt."""
        self._prefixes.see(keys)

    def find(self, keys: tuple[bytes, ...], most_tokens: int, last: Found = NOTHING) -> Found:
        """What there is for a prompt, of whose first tokens so many may be cached ones.

        It is found sooner with what was found for the same prompt the `last` time.
        """
        if not keys:
            return NOTHING
        return self._prefixes.find(keys, most_tokens // self._page_tokens, last)

    def use(
        self, found: Found, retention: Retention, prompt_tokens: int, may_cut: bool = False
    ) -> Use:
        """Pin what was found for a sequence that is to take a slot.

        With `may_cut` a later turn of its conversation may drop some of its prompt.
        """
        self._prefixes.pin(found.blocks)
        is_kept = keeps_whole_prompt(retention, prompt_tokens) and not may_cut
        use = Use(found.blocks, is_shared=bool(found.blocks) and is_kept)
        if self._most_shared is not None and self._num_shared + use.num_shared > self._most_shared:
            if "tables" not in self._told:
                self._told.add("tables")
                logger.info("prefix caching: rows get copies: page tables are full of shared pages")
            use.is_shared = False
        self._num_shared += use.num_shared
        return use

    def undo(self, use: Use) -> None:
        """The sequence takes no slot after all."""
        self._unpin(use)

    def store(self, use: Use, found: Found, spare_W: Ints) -> None:
        """Have a sequence's prefill fill blocks, as many as there is room for.

        Args:
            use: the sequence's.
            found: for it.
            spare_W: free pages on each worker that are left alone, int64 [W].
        """
        rows_W, num_idle = self._pages.rows_per_worker, self._prefixes.num_idle
        have_W = self._pages.free + self.idle_pages - spare_W
        num_pinned = self._prefixes.num_blocks - num_idle
        num = min(
            len(found.storable), int((have_W // rows_W).min()), self._most_blocks - num_pinned
        )
        if num <= 0:
            return
        self._evict(max(self._prefixes.num_blocks + num - self._most_blocks, 0))
        self.give(num * rows_W + spare_W)
        use.stored = self._prefixes.store(found.storable[:num])
        self._pages.set_aside(num * rows_W)
        self._filling += 1

    def give(self, need_W: Ints) -> None:
        """Evict idle blocks until so many pages are free, as far as that goes, int64 [W]."""
        missing_W = need_W - self._pages.free
        num = int((-(-missing_W // self._pages.rows_per_worker)).max())
        self._evict(min(max(num, 0), self._prefixes.num_idle))

    def reset(self) -> bool:
        """Evict all idle blocks; returns whether none is left."""
        self._evict(self._prefixes.num_idle)
        return self._prefixes.num_blocks == 0

    def doom(self, use: Use) -> None:
        """What a sequence stores will be of no use: it was refused, or is at fault."""
        if not use.is_settled and not use.is_doomed:
            use.is_doomed = True
            self._prefixes.doom(use.stored)

    def settle(self, use: Use) -> None:
        """The end of a sequence's prefill is absorbed: what it stored can be used, or goes."""
        assert use.is_through, "a prefill has come to an end that was not planned"
        if use.is_settled:
            return
        use.is_settled = True
        if use.stored:
            self._filling -= 1
        if use.is_doomed:
            self._drop(use.stored)
        else:
            self._prefixes.set_ready(use.stored)
        if use.has_left or not use.is_shared:
            self._unpin(use)

    def leave(self, use: Use) -> None:
        """A sequence's slot is freed by the plan in the making."""
        use.has_left = True
        if not use.is_through:  # it was given up half-way
            self.doom(use)
            use.is_settled = True
            if use.stored:
                self._filling -= 1
            self._drop(use.stored)
            self._unpin(use)
            use.is_shared = False
        elif use.is_settled and use.is_shared:
            self._unpin(use)

    def _unpin(self, use: Use) -> None:
        """Whoever uses these blocks does no more."""
        self._num_shared -= use.num_shared
        self._prefixes.unpin(use.cached)

    def _evict(self, num_blocks: int) -> None:
        self._take_back(self._prefixes.evict(num_blocks))

    def _drop(self, blocks: tuple[Block, ...]) -> None:
        self._take_back(self._prefixes.drop(blocks))

    def _take_back(self, ids: list[int]) -> None:
        if ids:
            self._evicted += ids
            self._pages.take_back(len(ids) * self._pages.rows_per_worker)
