"""How rows grow while a sequence decodes, and are cut back: counts, without tensors.

When a row with a target has grown by the slack beyond it, its kept tokens are scored and the target
number of them stays. All rows of a sequence grow by one per fed token, so all of them are compacted
in the same step, and how much they keep is a pure function of how many tokens were fed: `Cycle`.

PyramidInfer, which has no targets, trims its rows (`TrimmedRows`). All heads of a layer keep the
same tokens, so lengths are numbers per layer, and they follow from the prompt's length and the
number of fed tokens alone: the scheduler counts with the same class as the workers.

Shapes: L layers of the model.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decode import DecodeStage, TrimStage
from .layers import Layers
from .propagate import Propagate, part_of
from .retention import Retention


@dataclass(frozen=True, slots=True)
class Cycle:
    """How the rows of one sequence grow and shrink, all numbers in tokens.

    A row that kept c tokens after prefill has the target `c + grace`. It is compacted to it
    whenever it has reached `c + grace + slack`: after `grace + slack` fed tokens, and then once
    every `slack` tokens. It never keeps more.

    `grace` is 0 where prefill dropped tokens. A prompt that was kept whole is shorter than the
    budget, and each of its rows may first grow up to it.
    """

    grace: int
    slack: int

    @property
    def most(self) -> int:
        """The most tokens by which rows ever outgrow what prefill kept."""
        return self.grace + self.slack

    def grown(self, fed_tokens: int) -> int:
        """How many tokens more than after prefill a row keeps, once so many are fed."""
        return int(grown(np.int64(fed_tokens), np.int64(self.grace), np.int64(self.slack)))

    def fires(self, fed_tokens: int) -> bool:
        """Whether rows are compacted after the last of so many fed tokens."""
        return fed_tokens >= self.most and (fed_tokens - self.grace) % self.slack == 0

    def num_compactions(self, fed_tokens: int) -> int:
        """Compactions so far, including one after the last of so many fed tokens."""
        return max(fed_tokens - self.grace, 0) // self.slack

    def room(self, fed_tokens: int) -> int:
        """Tokens that can be fed before the next compaction, the one that triggers it included."""
        return self.most - self.grown(fed_tokens)


def grown(fed: Any, grace: Any, slack: Any) -> NDArray[np.int64]:
    """`Cycle.grown` for arrays; a slack of 0 means that rows are never compacted."""
    cyclic = grace + (fed - grace) % np.maximum(slack, 1)
    grows: NDArray[np.int64] = np.where((slack > 0) & (fed >= grace + slack), cyclic, fed)
    return grows


@dataclass(frozen=True, slots=True)
class Trim:
    """A cut of one layer: of its stored tokens `[start, stop)` the best `keep` stay.

    The attention of the last `num_queries` queries decides; with more than one, each row of it as
    it was normalised when the query was computed.
    """

    layer: int
    stored: int
    start: int
    stop: int
    keep: int
    num_queries: int


class TrimmedRows:
    """Stored tokens of each layer's rows of one sequence, as it is fed.

    A layer fires after a step. Its recent tokens are the last one and `recent_ratio` of what layer
    0 stores at that moment, before it is cut itself.

    The recent tokens are always the last ones of the text, in every layer: they begin no earlier
    than those of the step before, and only tokens before them are ever cut. So whatever may be cut
    was seen by all of their queries.

    Args:
        stage: the setting.
        propagate: what the prefill went by; gives `recent_ratio` and `sinks`.
        prompt_tokens: length of the prompt.
        stored: tokens of each layer after prefill, [L].
    """

    def __init__(
        self, stage: TrimStage, propagate: Propagate, prompt_tokens: int, stored: Sequence[int]
    ) -> None:
        self._stage = stage
        self._propagate = propagate
        self._seen = prompt_tokens
        self._stored: NDArray[np.int64] = np.array(stored, dtype=np.int64)
        self._mark = self._stored.copy()

    def copy(self) -> "TrimmedRows":
        """Another one that goes its own way from here."""
        other = copy(self)
        other._stored, other._mark = self._stored.copy(), self._mark.copy()
        return other

    @property
    def stored(self) -> NDArray[np.int64]:
        """Tokens that each layer stores now, int64 [L]."""
        return self._stored.copy()

    @property
    def room(self) -> int:
        """Tokens that may be fed at once: no layer fires before the last of them."""
        return max(1, self._stage.exceed - int(self._excess().max()))

    def feed(self, num_tokens: int) -> list[Trim]:
        """Count the tokens of a step; returns the cuts after it, the lowest layer first."""
        assert 1 <= num_tokens <= self.room, f"{num_tokens} tokens span a cut"
        self._seen += num_tokens
        self._stored += num_tokens
        before, recent = self._stored.copy(), self._recent()
        fires_L = self._excess() >= self._stage.exceed
        stop_L = np.maximum(before - 1 - recent, 0)
        if self._stage.is_published:
            start_L = np.maximum(stop_L - self._stage.exceed, 0)
        else:
            start_L = stop_L - self._stage.exceed
            fires_L &= start_L >= self._propagate.sinks
        fired = np.flatnonzero(fires_L)
        candidates = (stop_L - start_L)[fired]
        keep = self._keep(fired, candidates)
        self._stored[fired] -= candidates - keep
        self._mark[fired] = self._stored[fired] - (recent if self._stage.is_published else 0)
        num_queries = 1 + recent if self._stage.is_published else 1
        numbers = np.stack([fired, before[fired], start_L[fired], stop_L[fired], keep], axis=1)
        cuts = numbers[keep < candidates].tolist()
        return [
            Trim(layer, stored, start, stop, keep, num_queries)
            for layer, stored, start, stop, keep in cuts
        ]

    def _keep(self, layers: NDArray[np.int64], candidates: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of its candidates each of some layers keeps."""
        pairs = zip(layers.tolist(), candidates.tolist(), strict=True)
        kept = [_kept(self._stage, layer, len(self._stored), count) for layer, count in pairs]
        return np.array(kept, dtype=np.int64)

    def _recent(self) -> int:
        """Tokens besides the last one that are not cut: `recent_ratio` of what layer 0 stores."""
        return _recent(self._propagate, int(self._stored[0]))

    def _excess(self) -> NDArray[np.int64]:
        """What is compared with `exceed`, by layer; a fed token adds at most 1 to it."""
        if self._stage.is_published:
            return self._seen - self._recent() - self._mark
        return self._stored - self._mark


@lru_cache(maxsize=4096)
def _most_queries(
    stage: TrimStage, propagate: Propagate, prompt_tokens: int, max_tokens: int
) -> int:
    """The most queries of last tokens that a cut looks at, of a text of at most `max_tokens`.

    Layer 0 alone decides. It grows until it fires in every step and drops a token each time.
    """
    if not stage.is_published:
        return 1
    stored = mark = prompt_tokens
    most = 1 + _recent(propagate, min(stored + 1, max_tokens))
    for seen in range(prompt_tokens + 1, max_tokens + 1):
        stored += 1
        recent = _recent(propagate, stored)
        most = max(most, 1 + recent)
        if seen - recent - mark < stage.exceed:
            continue
        candidates = min(stage.exceed, stored - 1 - recent)
        stored -= candidates - stage.kept(0, 1, candidates)
        mark = stored - recent
        if seen - stored >= stage.exceed and candidates >= 2:
            break
    return most


@lru_cache(maxsize=65536)
def _kept(stage: TrimStage, layer: int, num_layers: int, candidates: int) -> int:
    return stage.kept(layer, num_layers, candidates)


def _recent(propagate: Propagate, stored: int) -> int:
    """`recent_ratio` of what layer 0 stores; the last token is none of them."""
    return min(part_of(propagate.recent_ratio, stored), stored - 1)


def cycle_of(retention: Retention, prompt_tokens: int, page_tokens: int) -> Cycle | None:
    """The cycle of a sequence with such a prompt; None where rows have no targets."""
    if not isinstance(retention.decode, DecodeStage):
        return None
    grace = 0 if retention.drops(prompt_tokens) else retention.budget_of(prompt_tokens)
    grace = max(grace - prompt_tokens, 0)
    return Cycle(grace, retention.decode.slack_pages * page_tokens)


def trimmed_rows(
    retention: Retention, prompt_tokens: int, layers: Layers | int
) -> TrimmedRows | None:
    """The rows, after prefill, of a sequence that is trimmed; None where none are."""
    if not isinstance(retention.decode, TrimStage):
        return None
    assert retention.propagate is not None, "checked by Retention"
    stored = retention.entering_tokens(prompt_tokens, layers)
    return TrimmedRows(retention.decode, retention.propagate, prompt_tokens, stored)


def num_ring_queries(retention: Retention) -> int:
    """Queries of the last tokens that a compaction of a row with a target looks at."""
    if not isinstance(retention.decode, DecodeStage):
        return 0
    observed = _observed(retention)
    return {"nothing": 0, "mass": 0, "window queries": retention.window, "last query": 1}[observed]


def ring_size(retention: Retention, prompt_tokens: int, max_tokens: int) -> int:
    """Queries of the last tokens that must be remembered while a sequence decodes.

    Args:
        retention: of the sequence.
        prompt_tokens: length of its prompt.
        max_tokens: of prompt and output together.
    """
    if not isinstance(retention.decode, TrimStage):
        # A ring that no sequence can fill is never read.
        return min(num_ring_queries(retention), max_tokens)
    assert retention.propagate is not None, "checked by Retention"
    return _most_queries(retention.decode, retention.propagate, prompt_tokens, max_tokens)


def most_ring_size(retention: Retention, max_tokens: int) -> int:
    """The largest `ring_size` of any sequence of at most so many tokens."""
    if isinstance(retention.decode, TrimStage) and retention.decode.is_published:
        assert retention.propagate is not None, "checked by Retention"
        return retention.propagate.recent_tokens(max_tokens)
    return ring_size(retention, max_tokens, max_tokens)


def remembers_normalisers(retention: Retention) -> bool:
    """Whether each remembered query needs the normaliser that its attention had.

    A later cut drops keys which that query saw, so it cannot be found again.
    """
    return isinstance(retention.decode, TrimStage) and retention.decode.is_published


def feeds_single_tokens(retention: Retention) -> bool:
    """Whether such a sequence is always fed token by token, also where it is scored.

    Decode steps alone report the attention, or the normalisers, that its cuts go by.
    """
    return sums_mass(retention) or remembers_normalisers(retention)


def sums_mass(retention: Retention) -> bool:
    """Whether the attention that each stored token gets must be summed up while decoding."""
    return isinstance(retention.decode, DecodeStage) and _observed(retention) == "mass"


def _observed(retention: Retention) -> str:
    assert retention.score is not None
    assert retention.score.at_decode is not None, "checked by Retention"
    return retention.score.at_decode
