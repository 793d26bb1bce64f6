"""Turns of conversations as sequences take and leave slots: what stays, where, and what goes.

Shapes: L layers, H kv heads, W workers.
"""

import logging
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.retention import Retention
from saqqara.workers.plan import Parking

from .cached import CachedPrefixes, Pages
from .conversations import REASONS, Anew, Conversations, Kept, Key, goes_on
from .limits import why_not_reused
from .parked import HostMemory

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

    What is kept lies in pages. Where they are short, whoever was quiet for longest moves to the
    host's memory, in which those that were quiet for longer make room for it, or is given up. What
    its rows share with blocks stays where it is, pinned as long as the conversation is kept.

    Args:
        conversations: what is known of them; nothing is held of any.
        pages: where theirs are charged.
        cached: the blocks that their rows may share.
        host: memory for them.
        num_layers: that compute a token again, all workers' together.
    """

    def __init__(
        self,
        conversations: Conversations,
        pages: Pages,
        cached: CachedPrefixes,
        host: HostMemory,
        num_layers: int,
    ) -> None:
        conversations.forget_all()
        self.conversations = conversations
        self._pages = pages
        self._cached = cached
        self._host = host
        self._num_layers = num_layers
        self._dropped: list[int] = []
        self._parked: list[Parking] = []
        self._offloaded: list[int] = []
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

    def take_offloaded(self) -> list[int]:
        """Parked ids that the plan in the making is to move to the host's memory."""
        offloaded, self._offloaded = self._offloaded, []
        return offloaded

    def find(
        self, key: Key, prompt_token_ids: NDArray[np.int32], retention: Retention
    ) -> Resumption | Anew | None:
        """How a turn goes on, or why its prompt is computed anew; None: it is the first."""
        kept = self.conversations.get(key)
        if kept is None:
            return self.conversations.why_lost(key)
        reason = why_not_resumed(retention)
        if reason is not None:
            return reason
        found = goes_on(kept, prompt_token_ids, retention)
        if isinstance(found, str):
            return found
        num_shared = kept.use.num_shared * self._cached.page_tokens
        if found < num_shared:
            return "tokens"
        return Resumption(key, kept, found)

    def begin(self, resumption: Resumption) -> Ints:
        """A turn is to take a slot, where the pages of its conversation are charged instead.

        Returns:
            pages, int64 [W], that its rows take for a moment, as they come from the host.
        """
        kept = resumption.kept
        assert self.conversations.take(resumption.key) is kept
        self._take_back(kept)
        return kept.pages if kept.parked_id in self._host else np.zeros_like(kept.pages)

    def undo(self, resumption: Resumption) -> None:
        """The turn takes no slot after all."""
        kept = resumption.kept
        self._set_aside(kept)
        self.conversations.put_back(resumption.key, kept)

    def count(self, resumption: Resumption) -> None:
        """A turn has taken a slot."""
        counts, parked_id = self.conversations.counts, resumption.kept.parked_id
        counts.resumed += 1
        counts.resumed_tokens += resumption.num_tokens
        if parked_id in self._host:
            self._host.bring_back(parked_id)
            counts.brought_back += 1

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

    def lose(self, key: Key, parked_id: int) -> None:
        """Give up what a turn has left, if it is still kept: a worker does not have it."""
        kept = self.conversations.get(key)
        if kept is not None and kept.parked_id == parked_id:
            self._give_up(self.conversations.drop(key))

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
        """Take conversations out of pages until so many are free, int64 [W], as far as that goes.

        If all their own pages are too few, those go, wherever they lie, whose blocks are free then.
        """
        if (need_W <= self._pages.free).all():
            return
        for key, kept in self.conversations.oldest_first():
            needs_blocks = (need_W > self._pages.free + self._held_W).any()
            if needs_blocks and self._cached.has_quiet(kept.use):
                self._give_up(self.conversations.drop(key))
            elif kept.parked_id in self._host:
                continue
            elif not self._offload(key, kept):
                self._give_up(self.conversations.drop(key))
            self._cached.give(need_W)  # what only its rows have shared
            if (need_W <= self._pages.free).all():
                return

    def make_room_on_host(self, bytes_W: Ints, before: Key | None = None) -> bool:
        """Have so much of the host's memory free, int64 [W]; False, and nothing goes, if not.

        Conversations that lie there go, of those that were quiet for longer than `before`, if that
        is given; the one that was quiet for longest goes first.
        """
        older = takewhile(lambda item: item[0] != before, self.conversations.oldest_first())
        going = [(key, kept) for key, kept in older if kept.parked_id in self._host]
        have_W = self._host.free_bytes + sum(kept.host_bytes for _, kept in going)
        if (bytes_W > have_W).any():
            return False
        for key, _ in going:
            if (bytes_W <= self._host.free_bytes).all():
                break
            self._give_up(self.conversations.drop(key))
        return True

    def reset(self) -> None:
        """Give up all that have pages, if only those of blocks."""
        for key, kept in self.conversations.oldest_first():
            if kept.use.is_shared or kept.parked_id not in self._host:
                self._give_up(self.conversations.drop(key))

    def drop(self, resumption: Resumption) -> None:
        """Have workers forget what they may still hold of a turn whose slot one has refused."""
        self._dropped.append(resumption.kept.parked_id)

    def _offload(self, key: Key, kept: Kept) -> bool:
        """Have the plan in the making move one to the host's memory, if that has room for it."""
        layer_tokens = self._num_layers * len(kept.token_ids)
        if not self._host.is_worth(kept.host_bytes, layer_tokens):
            return False
        if not self.make_room_on_host(kept.host_bytes, before=key):
            return False
        self._charge(kept, -1)
        self._host.offload(kept.parked_id, kept.host_bytes)
        self._offloaded.append(kept.parked_id)
        self.conversations.counts.offloaded += 1
        return True

    def _give_up(self, kept: Kept) -> None:
        self._take_back(kept)
        if kept.parked_id in self._host:
            self._host.drop_quiet(kept.parked_id)
        self._cached.leave(kept.use)
        self._dropped.append(kept.parked_id)

    def _set_aside(self, kept: Kept) -> None:
        if kept.parked_id not in self._host:
            self._charge(kept, 1)
        self._cached.set_quiet(kept.use, is_quiet=True)

    def _take_back(self, kept: Kept) -> None:
        if kept.parked_id not in self._host:
            self._charge(kept, -1)
        self._cached.set_quiet(kept.use, is_quiet=False)

    def _charge(self, kept: Kept, sign: int) -> None:
        """Charge the pages of one that lies in them, or give them back."""
        self._held_W = self._held_W + sign * kept.pages
        if sign > 0:
            self._pages.set_aside(kept.pages)
        else:
            self._pages.take_back(kept.pages)


def why_not_resumed(retention: Retention) -> Anew | None:
    """Why what a turn would leave is of no use for the next; None: it is."""
    is_resumed = retention.propagate is None and why_not_reused(retention) is None
    return None if is_resumed else "method"
