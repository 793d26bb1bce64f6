"""PyramidInfer's generation stage: while a sequence decodes, layers drop a few tokens at a time.

Yang et al., arXiv 2405.12532 (ACL 2024), section 3.3. A layer that fires looks at the `exceed`
stored tokens before its recent ones and keeps some of them, fewer in higher layers. All heads of a
layer keep the same tokens, so lengths are numbers per layer, and they follow from the prompt's
length and the number of fed tokens alone: the scheduler counts with the same class as the workers.

Shapes: L layers of the model.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
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
        trigger: when a layer fires. "published", as the authors' code: once the tokens ever seen,
            less the recent ones and less those stored after its last cut, are `exceed`. Where
            prefill dropped tokens that is every step, so prompt tokens go as well. "stored"
            (ours): once it stores `exceed` more tokens than after its last cut.
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

    def kept(self, layer: int, num_layers: int) -> int:
        """How many of the `exceed` tokens a layer keeps."""
        cosine = _RHO + (1 - _RHO) * (math.cos(math.pi * layer / num_layers) + 1) / 2
        return max(part_of(_SHARE * cosine, self.exceed), 1)


@dataclass(frozen=True, slots=True)
class Trim:
    """A cut of one layer: of its stored tokens `[start, stop)` the best `keep` stay."""

    layer: int
    stored: int
    start: int
    stop: int
    keep: int


class TrimmedRows:
    """Stored tokens of each layer's rows of one sequence, as it is fed.

    A layer fires after a step. Its recent tokens are the last one and `recent_ratio` of what layer
    0 stores at that moment, before it is cut itself; sinks are never cut. A layer that has not
    `exceed` tokens between sinks and recent ones waits until it has.

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
        self._after_cut = self._stored.copy()
        kept = [stage.kept(layer, len(stored)) for layer in range(len(stored))]
        self._kept: NDArray[np.int64] = np.array(kept, dtype=np.int64)

    def copy(self) -> "TrimmedRows":
        """Another one that goes its own way from here."""
        other = copy(self)
        other._stored, other._after_cut = self._stored.copy(), self._after_cut.copy()
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
        exceed = self._stage.exceed
        stop_L = self._stored - 1 - self._recent()
        fires_L = self._excess() >= exceed
        fires_L &= stop_L - exceed >= self._propagate.sinks
        trims = []
        for layer in np.flatnonzero(fires_L).tolist():
            stored, stop, keep = (int(x[layer]) for x in (self._stored, stop_L, self._kept))
            trims.append(Trim(layer, stored, stop - exceed, stop, keep))
        self._stored[fires_L] -= exceed - self._kept[fires_L]
        self._after_cut[fires_L] = self._stored[fires_L]
        return trims

    def _recent(self) -> int:
        """`recent_ratio` of what layer 0 stores."""
        return part_of(self._propagate.recent_ratio, int(self._stored[0]))

    def _excess(self) -> NDArray[np.int64]:
        """What is compared with `exceed`, by layer; a fed token adds at most 1 to it."""
        if self._stage.trigger == "stored":
            return self._stored - self._after_cut
        return self._seen - self._recent() - self._after_cut
