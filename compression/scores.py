"""The scores: how to tell which tokens of a row to keep. Settings and counts; no tensors.

To add one: a class here, its line in `SCORES`, and its function in `scoring.py`; its definition as
slow loops in `tests/support/definitions.py` and a row in `tests/support/methods.py`. A name that
users should find goes into `configs/retention/<name>.yaml`.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from saqqara.configs.shown import shown

from .bounds import POOLINGS, check, check_choice

Scope = Literal["head", "token"]
Observes = Literal["nothing", "window", "all"]
AtDecode = Literal["nothing", "window queries", "last query", "mass"]


@dataclass(frozen=True, slots=True)
class Score:
    """How to score the context tokens of one layer; the fields are settings that it alone reads.

    A value: frozen, hashable, picklable, valid once made.

    Class attributes:
        name: how users write it.
        keeps: which tokens those of a high score are, for the list of methods.
        observes: trailing queries of a prompt that it looks at: none, the window's, or all.
        scope: "head": each head has its own scores; "token": all heads of a layer have the same,
            which come from all of them.
        min_window: smallest window that it can work with.
        fixed_window: the only window that fits its definition; None: any from `min_window` up.
        at_decode: what it must be shown of the tokens that a sequence decodes, besides their keys,
            to compact rows (`growth.py`): nothing, the queries of the last `window` tokens, that of
            the last one, or the attention mass that each stored token got so far. None: it cannot
            compact, so it takes no `decode` setting.
    """

    name: ClassVar[str]
    keeps: ClassVar[str]
    observes: ClassVar[Observes] = "nothing"
    scope: ClassVar[Scope] = "head"
    min_window: ClassVar[int] = 0
    fixed_window: ClassVar[int | None] = None
    at_decode: ClassVar[AtDecode | None] = None

    def recent_tokens(self, window: int, sinks: int, kept_tokens: int) -> int:
        """Last tokens that a row of so many keeps whatever their score; at least the window."""
        return window


@dataclass(frozen=True, slots=True)
class Streaming(Score):
    """Recency. StreamingLLM, arXiv 2309.17453."""

    name: ClassVar[str] = "streaming"
    keeps: ClassVar[str] = "the most recent tokens"
    at_decode: ClassVar[AtDecode | None] = "nothing"


@dataclass(frozen=True, slots=True)
class SnapKV(Score):
    """Attention of the window's queries, pooled. SnapKV, arXiv 2404.14469; also PyramidKV's score.

    Attributes:
        kernel_size: tokens that the score is pooled over, odd.
        pooling: "max" or "avg".
    """

    name: ClassVar[str] = "snapkv"
    keeps: ClassVar[str] = "what the last queries attend to"
    observes: ClassVar[Observes] = "window"
    min_window: ClassVar[int] = 1
    at_decode: ClassVar[AtDecode | None] = "window queries"

    kernel_size: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        check("kernel_size", self.kernel_size)
        check_choice("pooling", self.pooling, POOLINGS)


@dataclass(frozen=True, slots=True)
class KNorm(Score):
    """Minus the norm of the key. Devoto et al., arXiv 2406.11430 (EMNLP 2024)."""

    name: ClassVar[str] = "knorm"
    keeps: ClassVar[str] = "keys of a small norm"
    at_decode: ClassVar[AtDecode | None] = "nothing"


@dataclass(frozen=True, slots=True)
class Random(Score):
    """Uniform noise: the baseline that every method must beat.

    Attributes:
        seed: of the noise, a 64-bit integer from 0.
    """

    name: ClassVar[str] = "random"
    keeps: ClassVar[str] = "a seeded random choice"
    at_decode: ClassVar[AtDecode | None] = "nothing"

    seed: int = 0

    def __post_init__(self) -> None:
        check("seed", self.seed)


@dataclass(frozen=True, slots=True)
class H2O(Score):
    """Attention of all queries, and a recent part. H2O, arXiv 2306.14048.

    Attributes:
        recent_ratio: part of a row's tokens that are the prompt's last, from 0 to 1.
    """

    name: ClassVar[str] = "h2o"
    keeps: ClassVar[str] = "what all queries attend to the most, and the most recent tokens"
    observes: ClassVar[Observes] = "all"
    fixed_window: ClassVar[int | None] = 0
    at_decode: ClassVar[AtDecode | None] = "mass"

    recent_ratio: float = 0.5

    def __post_init__(self) -> None:
        check("recent_ratio", self.recent_ratio)

    def recent_tokens(self, window: int, sinks: int, kept_tokens: int) -> int:
        """`recent_ratio` of the row, but at most what the sinks leave."""
        recent = math.floor(Fraction(str(self.recent_ratio)) * kept_tokens)
        return min(recent, kept_tokens - sinks)


@dataclass(frozen=True, slots=True)
class Tova(Score):
    """Attention of the last query, over all heads of a layer. TOVA, arXiv 2401.06104."""

    name: ClassVar[str] = "tova"
    keeps: ClassVar[str] = "what the last query attends to, over all heads of a layer"
    observes: ClassVar[Observes] = "window"
    scope: ClassVar[Scope] = "token"
    fixed_window: ClassVar[int | None] = 1
    at_decode: ClassVar[AtDecode | None] = "last query"


SCORES: dict[str, type[Score]] = {
    kind.name: kind for kind in (Streaming, SnapKV, KNorm, Random, H2O, Tova)
}
"""By name. Any score goes with any shape, but for one thing: a score of scope `token` keeps the
same in all heads of a layer, so no shape that lets heads differ goes with it."""


def score_kind(name: object) -> type[Score]:
    """The score of that name; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in SCORES:
        raise ValueError(f"score: unknown {shown(name)}; known: {', '.join(sorted(SCORES))}")
    return SCORES[name]
