"""The table of retention methods: how each is set, and its definition as slow loops.

A new method is one row in `METHODS`: its settings as a user writes them, and `Rules` made of the
parts in `definitions.py` (a new score or spread is one function there, a score with its line in
`SCORE_DEFINITIONS`). `decode` names the decode stages that it takes, of `DECODE_STAGES`; the suite
then also runs it with each. All numbers are for the small model and the prompts of the suite: the
presets' windows of 32 would keep these whole.

Ranks import this file, so it imports nothing slow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from saqqara.compression.retention import Retention

from .definitions import (
    PublishedTrimming,
    Rules,
    Trimming,
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
PAGE = 4
RECENT_PART = Fraction(1, 5)  # PyramidInfer's
SMALL = {"min_context": 8, "sinks": 3}  # its published 64 would keep our prompts whole


@dataclass(frozen=True)
class Stage:
    """How long a sequence decodes, and the `decode` setting that it has."""

    num_steps: int
    slack_pages: int | None = None
    trigger: str | None = None
    exceed: int = 0

    @property
    def slack_tokens(self) -> int | None:
        """By how much rows outgrow their targets, if they have such."""
        return None if self.slack_pages is None else self.slack_pages * PAGE

    @property
    def settings(self) -> dict[str, Any]:
        """As a user writes them."""
        if self.trigger is not None:
            return {"trigger": self.trigger, "exceed": self.exceed}
        return {} if self.slack_pages is None else {"slack_pages": self.slack_pages}

    def of(self, rules: Rules) -> Rules:
        """What they mean."""
        if self.trigger is None:
            return rules
        if self.trigger == "published":
            return replace(rules, trimming=PublishedTrimming(self.exceed, RECENT_PART, 1.2))
        return replace(rules, trimming=Trimming(self.exceed, RECENT_PART, SMALL["sinks"]))


PREFILL = Stage(2)
DECODE_STAGES = {  # for a prompt that is cut, and for one that is shorter than the budget
    # A window is longer than one page: the first compaction looks at queries of the prompt, too.
    "slack": (Stage(14, slack_pages=1), Stage(25, slack_pages=2)),
    "stored": (Stage(25, trigger="stored", exceed=6),) * 2,
    "published": (Stage(25, trigger="published", exceed=6),) * 2,
}
NUM_COMPACTIONS = (3, 1)  # of the two with slack

PROFILE = {f"{i}-{j}": [1.0 + (3 * i + j) % 4] for i in range(LAYERS) for j in range(QUERY_HEADS)}
SNAPKV = window_attention(WINDOW, 7, "max")
SMOOTH = window_attention(WINDOW, 15, "avg")  # the score of `recommended`


@dataclass(frozen=True)
class Method:
    """One row: settings beside budget and sinks, what they mean, decode stages that it takes."""

    settings: dict[str, Any]
    rules: Rules
    decode: tuple[str, ...] = ()

    @property
    def budgeted(self) -> bool:
        """Whether it takes a budget."""
        return self.rules.score is not None

    def retention(self, name: str, stage: Stage) -> Retention:
        """What a user would ask for."""
        given: dict[str, Any] = {"method": name, **self.settings}
        if self.budgeted:
            given |= {"budget": BUDGET, "sinks": SINKS}
        if stage.settings:
            given["decode"] = stage.settings
        return Retention.parse(given)


def _windowed(score: Any, window: int = WINDOW, **how: Any) -> Rules:
    return Rules(score, window=window, sinks=SINKS, budget=BUDGET, **how)


_SLACK = ("slack",)


def _row(score: Any, extra: dict[str, Any] | None = None, **how: Any) -> Method:
    return Method({"window": WINDOW, **(extra or {})}, _windowed(score, **how), _SLACK)


def _h2o(**how: Any) -> Method:
    rules = _windowed(heavy_hitters, window=0, recent_part=Fraction(1, 2), **how)
    return Method({}, rules, _SLACK)


def _pyramidinfer(rho: float, interval: int) -> Method:
    how = {"rho": rho, "interval": interval, "recent_ratio": RECENT_PART, "distance_weight": 1.2}
    rules = Rules(None, propagate=pyramidinfer({**how, **SMALL}))
    return Method({"propagate": SMALL}, rules, ("stored", "published"))


_ONCE = {"layer": 1, "keep": 0.3, "window": WINDOW, "kernel_size": 7, "pooling": "max", "sinks": 2}
_OWN_ONCE = {"layer": 1, "keep": 0.3, "window": WINDOW, "sinks": 2}

METHODS: dict[str, Method] = {
    "full": Method({}, Rules(None)),
    "streaming": _row(recency),
    "snapkv": _row(SNAPKV),
    "pyramidkv": _row(SNAPKV, spread=pyramid),
    "adakv": _row(SNAPKV, compete=True),
    "ada-pyramidkv": _row(SNAPKV, spread=pyramid, compete=True),
    "headkv": _row(SNAPKV, extra={"profile": PROFILE}, spread=by_profile(PROFILE, "1.01")),
    "h2o": _h2o(),
    "tova": Method({}, _windowed(last_query, window=1), _SLACK),
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
        _SLACK,
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
    "tova-pyramid": Method({}, _windowed(last_query, window=1, spread=pyramid), _SLACK),
    "h2o-adaptive": _h2o(compete=True),
    "random-adaptive": _row(noise(), compete=True),
}


@dataclass(frozen=True)
class Case:
    """A sequence of the suite: a method, at prefill or in a decode stage, and a prompt."""

    method: str
    stage_name: str
    stage: Stage
    prompt: tuple[int, ...]

    @property
    def retention(self) -> Retention:
        """What the engine is asked for."""
        return METHODS[self.method].retention(self.method, self.stage)

    @property
    def rules(self) -> Rules:
        """What that means."""
        return self.stage.of(METHODS[self.method].rules)


def cases_of(method: str, prompts: Sequence[Sequence[int]]) -> list[Case]:
    """The sequences that show one method, given a prompt that is cut and one that is not."""
    long, short = (tuple(prompt) for prompt in prompts)
    cases = [Case(method, "prefill", PREFILL, long)]
    for name in METHODS[method].decode:
        stages = zip(DECODE_STAGES[name], (long, short), strict=True)
        cases += [Case(method, name, stage, prompt) for stage, prompt in stages]
    return cases
