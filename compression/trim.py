"""PyramidInfer's generation stage: while a sequence decodes, layers drop a few tokens at a time.

Yang et al., arXiv 2405.12532 (ACL 2024), section 3.3. A layer that fires looks at the `exceed`
stored tokens before its recent ones and keeps some of them, fewer in higher layers. All heads of a
layer keep the same tokens, so lengths are numbers per layer, and they follow from the prompt's
length and the number of fed tokens alone: the scheduler counts with the same class as the workers.

There are two triggers. `published` is the authors' code. Its threshold follows what was *ever*
seen, so a layer that has fired once soon fires in every step, and it protects nothing but the
recent tokens: it eats the prompt, and of a long answer it leaves nearly nothing (over 30 layers at
the 7B setting, 5,309 tokens after 400 of prompt and 240 more, 166 after 2,000 more). `stored` is
ours: a layer fires once for `exceed` more tokens that it stores, and sinks stay.

One thing of the authors' code is left out. It multiplies the weights of the queries into the
attention that it remembers, in place, so that at each firing older rows are weighted once more;
here each query has the weight of its place.

Shapes: L layers of the model.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saqqara.configs.shown import shown

from .bounds import check
from .propagate import Propagate, part_of

TRIGGERS = ("stored", "published")

_RHO = 0.1  # what the cosine of the layers falls to
_SHARE = 0.9  # kept by layer 0


@dataclass(frozen=True, slots=True)
class TrimStage:
    """The `decode` setting of `pyramidinfer` without a score.

    Attributes:
        trigger: when a layer fires, by what it scores, and what it protects.
            "published", as the authors' code: once the tokens ever seen, less the recent ones, are
            `exceed` more than a mark, which is what the layer stored after prefill and, after a
            cut, what it stores then less the recent ones. The score is the attention of the last
            and all recent queries. Where fewer than `exceed` tokens stand before the recent ones,
            sinks included, these are cut.
            "stored" (ours): once it stores `exceed` more tokens than after its last cut. The score
            is the attention of the last query. Sinks stay; a layer that has not `exceed` tokens
            between them and the recent ones waits until it has.
        exceed: tokens that are looked at, at least 2.

    Raises:
        ValueError: no such trigger or number.
    """

    trigger: str = "stored"
    exceed: int = 16

    def __post_init__(self) -> None:
        if self.trigger not in TRIGGERS:
            raise ValueError(
                f"decode.trigger: must be {' or '.join(map(repr, TRIGGERS))}, not "
                f"{shown(self.trigger)}"
            )
        check("decode.exceed", self.exceed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `decode_stage.parse_stage` reads it back."""
        return {"trigger": self.trigger, "exceed": self.exceed}

    @property
    def label(self) -> str:
        """As reports write it."""
        return self.trigger if self.exceed == 16 else f"{self.trigger}/{self.exceed}"

    @property
    def is_published(self) -> bool:
        """Whether it is the authors' own."""
        return self.trigger == "published"

    def kept(self, layer: int, num_layers: int, candidates: int) -> int:
        """How many of so many tokens a layer keeps."""
        cosine = _RHO + (1 - _RHO) * (math.cos(math.pi * layer / num_layers) + 1) / 2
        return min(max(part_of(_SHARE * cosine, candidates), 1), candidates)


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
def most_queries(
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
