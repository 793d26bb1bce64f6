"""Conversations that wait for their next turn: whose they are, what was fed, and when they go.

A conversation belongs to an owner: its name is its owner's own. What its last turn has left, the
rows of its sequence, is parked under a number that this table remembers, with the tokens that were
fed. The next turn goes on from there as far as its prompt begins with these tokens. Times are
passed in. Whoever asks what is to go drops it on the workers.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.errors import ConversationBusyError
from saqqara.compression.retention import Retention

from .cached import Use

Key = tuple[str, str]  # owner, id

# Why a turn of a conversation that is known is computed from its first token.
Anew = Literal["tokens", "retention", "method", "lost"]
REASONS: dict[Anew, str] = {
    "tokens": "its prompt does not begin with what was fed before",
    "retention": "it has another retention than the turn before",
    "method": "its retention chooses by what is no longer known of earlier tokens",
    "lost": "what was kept had to make room, or was lost with its workers or its turn",
}


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the last turn of a conversation has left.

    Attributes:
        parked_id: of its rows.
        token_ids: that were fed, int32 [n].
        retention: that it was kept by.
        rows: tokens of each row, int32 [L, H].
        is_whole: every row has every token, so what was fed last can go again.
        pages: that it holds on each worker, int64 [W], but for those of blocks; or held, if it
            lies on the host.
        host_bytes: that it would take on each worker's host, int64 [W], at most.
        num_bytes: of its pages on all workers, and of the queries that are remembered with them.
        use: what its rows share with blocks of prefixes, which stay with it.
        last_used: when its turn ended, or the next one came.
    """

    parked_id: int
    token_ids: NDArray[np.int32]
    retention: Retention
    rows: NDArray[np.int32]
    is_whole: bool
    pages: NDArray[np.int64]
    host_bytes: NDArray[np.int64]
    num_bytes: int
    use: Use
    last_used: float


@dataclass(slots=True)
class Counts:
    """What has come of conversations since the start."""

    resumed: int = 0
    resumed_tokens: int = 0
    anew: Counter[Anew] = field(default_factory=Counter)
    expired: int = 0
    dropped: int = 0  # to make room
    ended: int = 0
    offloaded: int = 0  # from pages to the host's memory
    brought_back: int = 0  # from there, by a turn that goes on


class Conversations:
    """The conversations of one replica.

    Args:
        max_bytes: that they may have together; 0: nothing is kept of any.
        max_seconds: without a turn, after which one is forgotten.

    Attributes:
        counts: see `Counts`.
        max_bytes: as given.
        now: the time, as it was told last.
        num_bytes: that they have together.
    """

    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        self.counts = Counts()
        self.num_bytes = 0
        self.max_bytes = max_bytes
        self.now = 0.0
        self._max_seconds = max_seconds
        self._kept: OrderedDict[Key, Kept] = OrderedDict()  # used longest ago first
        self._busy: set[Key] = set()
        self._lost: OrderedDict[Key, Anew] = OrderedDict()  # why the next turn finds nothing

    def __len__(self) -> int:
        return len(self._kept)

    def check(self, key: Key) -> None:
        """Raise a `ConversationBusyError` if a turn of it has not ended."""
        if key in self._busy:
            raise ConversationBusyError(
                f"conversation_id: a turn of conversation {key[1]!r} has not ended; wait for its "
                "answer, or abort it"
            )

    def begin(self, key: Key, now: float = 0.0) -> None:
        """A turn has come: however long it waits, what it goes on from was used just now."""
        self.check(key)
        self._busy.add(key)
        self.now = max(self.now, now)
        if key in self._kept:
            self._kept[key] = replace(self._kept[key], last_used=self.now)
            self._kept.move_to_end(key)

    def end(self, key: Key) -> None:
        """Its turn has ended, however."""
        self._busy.discard(key)

    def is_busy(self, key: Key) -> bool:
        """Whether a turn of it has not ended."""
        return key in self._busy

    def get(self, key: Key) -> Kept | None:
        """What its last turn has left."""
        return self._kept.get(key)

    def take(self, key: Key) -> Kept:
        """What its last turn has left, which is here no more."""
        kept = self._kept.pop(key)
        self.num_bytes -= kept.num_bytes
        return kept

    def keep(self, key: Key, kept: Kept) -> list[Kept]:
        """Its turn has ended and has left this; returns those that go so that all fit.

        One that is larger than all may be is among them.
        """
        assert key not in self._kept, f"conversation {key} is kept twice"
        self._lost.pop(key, None)
        self._kept[key] = kept
        self.num_bytes += kept.num_bytes
        gone = []
        while self.num_bytes > self.max_bytes:
            gone.append(self.drop_oldest())
        return gone

    def put_back(self, key: Key, kept: Kept) -> None:
        """Undo a `take`: it stands again where its last turn has put it."""
        later = list(
            takewhile(lambda k: self._kept[k].last_used > kept.last_used, reversed(self._kept))
        )
        self._kept[key] = kept
        self.num_bytes += kept.num_bytes
        for other in reversed(later):
            self._kept.move_to_end(other)

    def oldest_first(self) -> list[tuple[Key, Kept]]:
        """All of them; the one that was used longest ago comes first."""
        return list(self._kept.items())

    def drop_oldest(self) -> Kept:
        """Give up the one that was used longest ago, because there is no room for it."""
        return self.drop(next(iter(self._kept)))

    def drop(self, key: Key) -> Kept:
        """Give one up because there is no room for it."""
        self.counts.dropped += 1
        self.lose(key, "lost")
        return self.take(key)

    def lose(self, key: Key, reason: Anew) -> None:
        """Note why the next turn will find nothing."""
        self._lost.pop(key, None)
        self._lost[key] = reason
        while len(self._lost) > _MAX_LOST:
            self._lost.popitem(last=False)

    def why_lost(self, key: Key) -> Anew | None:
        """Why nothing is kept of what an earlier turn has left."""
        return self._lost.get(key)

    def forget_why(self, key: Key) -> None:
        """It was told."""
        self._lost.pop(key, None)

    def next_expiry(self) -> float | None:
        """When the next one is to be forgotten; None: there is none."""
        if not self._kept:
            return None
        return next(iter(self._kept.values())).last_used + self._max_seconds

    def expire(self, now: float) -> list[Kept]:
        """Forget those that had no turn for too long; `now` is the time, which only grows."""
        self.now = now
        gone = []
        while (due := self.next_expiry()) is not None and due <= now:
            gone.append(self.take(next(iter(self._kept))))
        self.counts.expired += len(gone)
        return gone

    def forget(self, key: Key) -> Kept | None:
        """End a conversation; None if nothing is kept of it."""
        self._lost.pop(key, None)
        if key not in self._kept:
            return None
        self.counts.ended += 1
        return self.take(key)

    def forget_all(self) -> None:
        """The workers hold nothing any more; turns that have not ended go on."""
        for key in self._kept:
            self.lose(key, "lost")
        self._kept.clear()
        self.num_bytes = 0


_MAX_LOST = 4096  # conversations whose loss is remembered


def goes_on(kept: Kept, prompt_token_ids: NDArray[np.int32], retention: Retention) -> int | Anew:
    """How many tokens of a prompt need not be computed, or why all of them are.

    One token at least is computed, the last, from which the next is sampled. Where rows have all
    tokens those beyond the common prefix go; else all that was fed must be there again.

    Args:
        kept: what the turn before has left.
        prompt_token_ids: int32 [n].
        retention: of this turn.
    """
    if retention != kept.retention:
        return "retention"
    fed = kept.token_ids
    num = min(len(fed), len(prompt_token_ids) - 1)
    differs = np.flatnonzero(fed[:num] != prompt_token_ids[:num])
    common = int(differs[0]) if len(differs) else num
    if common == len(fed) or (kept.is_whole and common > 0):
        return common
    return "tokens"
