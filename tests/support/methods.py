"""The table of retention methods: how each is set, and its definition as slow loops.

A new method is one row in `METHODS`: its settings as a user writes them, and `Rules` made of the
parts in `definitions.py` (a new score or spread is one function there, a score with its line in
`SCORE_DEFINITIONS`). `decode` says whether it has a decode stage; the suite then also runs it with
one. All numbers are for the small model and
the prompts of the suite: the presets' windows of 32 would keep these whole.

Ranks import this file, so it imports nothing slow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from saqqara.compression.retention import Retention

from .definitions import (
    Rules,
    by_profile,
    half_cosine,
    heavy_hitters,
    last_query,
    noise,
    once,
    pyramid,
    pyramidinfer,
    recency,
    small_keys,
    window_attention,
)

LAYERS, HEADS, QUERY_HEADS = 5, 3, 6  # of the model of the suite
BUDGET, WINDOW, SINKS = 22, 8, 2
PAGE, SLACK_PAGES = 4, 2
SLACK = PAGE * SLACK_PAGES

PROFILE = {f"{i}-{j}": [1.0 + (3 * i + j) % 4] for i in range(LAYERS) for j in range(QUERY_HEADS)}
SNAPKV = window_attention(WINDOW, 7, "max")
SMOOTH = window_attention(WINDOW, 15, "avg")  # the score of `recommended`


@dataclass(frozen=True)
class Method:
    """One row: settings beside budget and sinks, what they mean, whether it has a decode stage."""

    settings: dict[str, Any]
    rules: Rules
    decode: bool = False

    @property
    def budgeted(self) -> bool:
        """Whether it takes a budget."""
        return self.rules.score is not None

    def retention(self, name: str, decode: bool) -> Retention:
        """What a user would ask for."""
        given: dict[str, Any] = {"method": name, **self.settings}
        if self.budgeted:
            given |= {"budget": BUDGET, "sinks": SINKS}
        if decode:
            given["decode"] = {"slack_pages": SLACK_PAGES}
        return Retention.parse(given)


def _windowed(score: Any, window: int = WINDOW, **how: Any) -> Rules:
    return Rules(score, window=window, sinks=SINKS, budget=BUDGET, **how)


def _row(
    score: Any, decode: bool = True, extra: dict[str, Any] | None = None, **how: Any
) -> Method:
    return Method({"window": WINDOW, **(extra or {})}, _windowed(score, **how), decode)


def _pyramidinfer(rho: float, interval: int) -> Method:
    small = {"min_context": 8, "sinks": 3}  # the published 64 would keep our prompts whole
    how = {"rho": rho, "interval": interval, "recent_ratio": 0.2, "distance_weight": 1.2, **small}
    return Method({"propagate": small}, Rules(None, propagate=pyramidinfer(how)))


_ONCE = {"layer": 1, "keep": 0.3, "window": WINDOW, "kernel_size": 7, "pooling": "max", "sinks": 2}
_OWN_ONCE = {"layer": 1, "keep": 0.3, "window": WINDOW, "sinks": 2}
_HALF = Fraction(1, 2)

METHODS: dict[str, Method] = {
    "full": Method({}, Rules(None)),
    "streaming": _row(recency),
    "snapkv": _row(SNAPKV),
    "pyramidkv": _row(SNAPKV, spread=pyramid),
    "adakv": _row(SNAPKV, compete=True),
    "ada-pyramidkv": _row(SNAPKV, spread=pyramid, compete=True),
    "headkv": _row(SNAPKV, extra={"profile": PROFILE}, spread=by_profile(PROFILE, "1.01")),
    "h2o": Method({}, _windowed(heavy_hitters, window=0, recent_part=_HALF)),
    "tova": Method({}, _windowed(last_query, window=1), decode=True),
    "knorm": _row(small_keys),
    "random": _row(noise()),
    "pyramidinfer": _pyramidinfer(0.9, 1),
    "pyramidinfer-7b": _pyramidinfer(0.9, 1),
    "pyramidinfer-13b": _pyramidinfer(0.8, 2),
    "pyramidinfer-70b": _pyramidinfer(0.9, 3),
    "pyramidinfer-steep": _pyramidinfer(0.7, 1),
    "fastkv": Method(  # half of 5 layers, rounded down, see the whole prompt: layer 1 selects
        {"window": WINDOW, "propagate": {"keep": 0.3, "sinks": 2}},
        _windowed(SNAPKV, propagate=once(_ONCE)),
        decode=True,
    ),
    "recommended": _row(SMOOTH, extra={"profile": PROFILE}, spread=by_profile(PROFILE, "1.1")),
    "recommended-adaptive": _row(SMOOTH, compete=True),
    "recommended-fast": _row(
        SMOOTH,
        extra={"profile": PROFILE, "propagate": _OWN_ONCE},
        spread=by_profile(PROFILE, "1.1"),
        propagate=once({**_ONCE, **_OWN_ONCE, "kernel_size": 15, "pooling": "avg"}),
    ),
    # Composed: a score with another shape than its preset's.
    "snapkv-cosine": _row(SNAPKV, spread=half_cosine),
    "snapkv-adaptive": _row(
        SNAPKV, extra={"floor_ratio": 0.9}, compete=True, floor=Fraction(9, 10)
    ),
    "tova-pyramid": Method({}, _windowed(last_query, window=1, spread=pyramid), decode=True),
    "h2o-adaptive": Method({}, _windowed(heavy_hitters, window=0, recent_part=_HALF, compete=True)),
    "random-adaptive": _row(noise(), compete=True),
}


@dataclass(frozen=True)
class Case:
    """A sequence of the suite: a method, at prefill or with its decode stage, and a prompt."""

    method: str
    decode: bool
    prompt: tuple[int, ...]
    num_steps: int  # tokens that are fed after the prefill

    @property
    def retention(self) -> Retention:
        """What the engine is asked for."""
        return METHODS[self.method].retention(self.method, self.decode)


def cases_of(method: str, decode: bool, prompts: Sequence[Sequence[int]]) -> list[Case]:
    """The sequences that show one method at one stage.

    A prompt that is cut, and with a decode stage one that is shorter than the budget, too. They go
    through three compactions and one.
    """
    long, short = (tuple(prompt) for prompt in prompts)
    if not decode:
        return [Case(method, False, long, 2)]
    return [Case(method, True, prompt, 3 * SLACK + 2) for prompt in (long, short)]
