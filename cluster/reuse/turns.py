"""Turns of conversations as sequences take and leave slots: what stays, what goes, in which pages.

Shapes: L layers, H kv heads, W workers.
"""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.retention import Retention
from saqqara.workers.plan import Parking

from .cached import CachedPrefixes, Pages
from .conversations import REASONS, Anew, Conversations, Kept, Key, goes_on
from .limits import why_not_reused

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Resumption:
    """How a turn goes on from the one before: with so many tokens of its prompt fed already."""

    key: Key
    kept: Kept
    num_tokens: int

    @property
    def rows(self) -> NDArray[np.int32]:
        """Tokens that its rows begin with, int32 [L, H]."""
        if self.kept.is_whole:
            return np.minimum(self.kept.rows, np.int32(self.num_tokens))
        return self.kept.rows


class Turns:
    """What the conversations of a replica hold on its workers.

    What is kept lies in pages. Where they are short, whoever was quiet for longest goes.

    Args:
        conversations: what is known of them; nothing is held of any.
        pages: where theirs are charged.
        cached: the blocks that their rows may share.
    """

    def __init__(self, conversations: Conversations, pages: Pages, cached: CachedPrefixes) -> None:
        conversations.forget_all()
        self.conversations = conversations
        self._pages = pages
        self._cached = cached
        self._dropped: list[int] = []
        self._parked: list[Parking] = []
        self._held_W: Ints = np.zeros_like(pages.rows_per_worker)

    @property
    def idle_pages(self) -> Ints:
        """Pages that go with the conversations that wait for their next turn, int64 [W]."""
        return self._held_W + self._cached.quiet_pages

    @property
    def has_dropped(self) -> bool:
        """Whether the workers have yet to be told of conversations that are gone."""
        return bool(self._dropped)

    def take_dropped(self) -> list[int]:
        """Parked ids for the plan in the making to drop."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def take_parked(self) -> list[Parking]:
        """Slots whose rows the plan in the making is to keep."""
        parked, self._parked = self._parked, []
        return parked

    def find(
        self, key: Key, prompt_token_ids: tuple[int, ...], retention: Retention
    ) -> Resumption | Anew | None:
        """How a turn goes on, or why its prompt is computed anew; None: it is the first."""
        kept = self.conversations.get(key)
        if kept is None:
            return self.conversations.why_lost(key)
        reason = why_not_resumed(retention)
        if reason is not None:
            return reason
        found = goes_on(kept, np.asarray(prompt_token_ids, dtype=np.int32), retention)
        if isinstance(found, str):
            return found
        num_shared = kept.use.num_shared * self._cached.page_tokens
        if found < num_shared:
            return "tokens"
        return Resumption(key, kept, found)

    def begin(self, resumption: Resumption) -> None:
        """A turn is to take a slot, where the pages of its conversation are charged instead."""
        assert self.conversations.take(resumption.key) is resumption.kept
        self._take_back(resumption.kept)

    def undo(self, resumption: Resumption) -> None:
        """The turn takes no slot after all."""
        kept = resumption.kept
        self._set_aside(kept)
        self.conversations.put_back(resumption.key, kept)

    def count(self, resumption: Resumption) -> None:
        """A turn has taken a slot."""
        counts = self.conversations.counts
        counts.resumed += 1
        counts.resumed_tokens += resumption.num_tokens

    def begin_anew(self, key: Key, reason: Anew) -> None:
        """A turn has taken a slot, and is computed from its first token."""
        self.conversations.forget_why(key)
        counts = self.conversations.counts.anew
        counts[reason] += 1
        if (counts[reason] & (counts[reason] - 1)) == 0:  # the 1st, 2nd, 4th, ... of this kind
            logger.info("a turn of a conversation is computed anew: %s", REASONS[reason])
        if self.conversations.get(key) is not None:
            self._give_up(self.conversations.take(key))

    def keep(self, key: Key, slot: int, kept: Kept) -> None:
        """A turn has ended well, and its slot is freed by the plan in the making."""
        self._set_aside(kept)
        self._parked.append(Parking(slot, kept.parked_id, to_host=False))
        for gone in self.conversations.keep(key, kept):
            self._give_up(gone)

    def end(self, key: Key) -> bool:
        """Forget a conversation; whether anything was kept of it."""
        self.conversations.check(key)
        kept = self.conversations.forget(key)
        if kept is not None:
            self._give_up(kept)
        return kept is not None

    def expire(self, now: float) -> None:
        """Forget those that had no turn for too long."""
        for kept in self.conversations.expire(now):
            self._give_up(kept)

    def give(self, need_W: Ints) -> None:
        """Give up conversations until so many pages are free, int64 [W], as far as that goes."""
        while len(self.conversations) and (need_W > self._pages.free).any():
            self._give_up(self.conversations.drop_oldest())
            self._cached.give(need_W)  # what only its rows have shared

    def reset(self) -> None:
        """Give up all of them."""
        while len(self.conversations):
            self._give_up(self.conversations.drop_oldest())

    def drop(self, resumption: Resumption) -> None:
        """Have workers forget what they may still hold of a turn whose slot one has refused."""
        self._dropped.append(resumption.kept.parked_id)

    def _give_up(self, kept: Kept) -> None:
        self._take_back(kept)
        self._cached.leave(kept.use)
        self._dropped.append(kept.parked_id)

    def _set_aside(self, kept: Kept) -> None:
        self._held_W = self._held_W + kept.pages
        self._pages.set_aside(kept.pages)
        self._cached.set_quiet(kept.use, is_quiet=True)

    def _take_back(self, kept: Kept) -> None:
        self._held_W = self._held_W - kept.pages
        self._pages.take_back(kept.pages)
        self._cached.set_quiet(kept.use, is_quiet=False)


def why_not_resumed(retention: Retention) -> Anew | None:
    """Why what a turn would leave is of no use for the next; None: it is."""
    if why_not_reused(retention) is not None or retention.decode is not None:
        return "method"
    return None
