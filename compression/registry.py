"""The scores and budget shapes by name. Any score goes with any shape.

To add a score: a function in `scores.py`, its line in `SCORES`, its oracle in
`tests/numerics/test_retention_methods.py`. To add a shape: a function in `budgets.py`, its line in
`SHAPES`. A setting that only it reads becomes a field of `Retention` and is named in its line. A
name that users should find goes into `configs/retention/<name>.yaml`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from . import budgets, scores
from .observation import Observation

if TYPE_CHECKING:
    from .retention import Retention

Scope = Literal["head", "layer", "token"]
AtDecode = Literal["none", "window queries", "last query"]


@dataclass(frozen=True, slots=True)
class ScoreMethod:
    """How to score the context tokens of one layer.

    Attributes:
        function: (observation, retention) -> [H, n - w] fp32; see `scores.py`.
        num_window_queries: (retention, prompt tokens) -> trailing queries that it looks at.
        scope: what has to be known to select: one head, all heads of the layer, or their mean.
        settings: fields of `Retention` that it reads, besides those of every budgeted method.
        min_window: smallest `window` that it can work with.
        at_decode: what it must be shown of the tokens that a sequence decodes, besides their keys,
            to compact rows (`decode_stage.py`): nothing, the queries of the last `window` tokens,
            or that of the last one. None: it cannot compact, so it takes no `decode` setting.
    """

    function: "Callable[[Observation, Retention], Tensor]"
    num_window_queries: "Callable[[Retention, int], int]" = scores.observe_none
    scope: Scope = "head"
    settings: tuple[str, ...] = ()
    min_window: int = 0
    at_decode: AtDecode | None = None


@dataclass(frozen=True, slots=True)
class BudgetShape:
    """How to spread a budget.

    Attributes:
        function: (retention, mean tokens, prompt tokens, layers) -> exact target of each layer;
            see `budgets.py`.
        settings: fields of `Retention` that it reads, besides those of every budgeted method.
        ragged: the heads of one layer may keep different numbers of tokens.
    """

    function: "Callable[[Retention, Fraction, int, int], list[Fraction]]"
    settings: tuple[str, ...] = ()
    ragged: bool = False


SCORES = {
    "streaming": ScoreMethod(scores.streaming, at_decode="none"),
    "snapkv": ScoreMethod(
        scores.snapkv,
        scores.observe_window,
        settings=("kernel_size", "pooling"),
        min_window=1,
        at_decode="window queries",
    ),
    "knorm": ScoreMethod(scores.knorm, at_decode="none"),
    "random": ScoreMethod(scores.random, settings=("seed",), at_decode="none"),
}

SHAPES = {
    "uniform": BudgetShape(budgets.uniform),
    "pyramid": BudgetShape(budgets.pyramid, settings=("beta",)),
}

COMMON_SETTINGS = ("budget", "window", "sinks", "skip_layers", "decode")
"""What every budgeted method reads."""


def score_method(name: object) -> ScoreMethod:
    """The score of that name; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in SCORES:
        raise ValueError(f"score: unknown {name!r}; known: {', '.join(sorted(SCORES))}")
    return SCORES[name]


def budget_shape(name: object) -> BudgetShape:
    """The budget shape of that name; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in SHAPES:
        raise ValueError(f"shape: unknown {name!r}; known: {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def settings_of(score: object, shape: object) -> tuple[str, ...]:
    """The settings that a score with a shape takes, in the order of reports."""
    return COMMON_SETTINGS + score_method(score).settings + budget_shape(shape).settings
