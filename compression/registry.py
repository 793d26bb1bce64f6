"""The scores and budget shapes by name. Any score goes with any shape.

(But for one thing: a score of scope `token` keeps the same in all heads of a layer, so no shape
that lets heads differ goes with it.)

To add a score: a function in `scores.py`, its line in `SCORES`, its definition as slow loops in
`tests/support/definitions.py` and a row in `tests/support/methods.py`. To add a shape: a function
in `budgets.py`, its line in `SHAPES`, and its definition and row there, too. A setting that only it
reads becomes a field of `Retention` and is named in its line. A name that users should find goes
into `configs/retention/<name>.yaml`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from saqqara.configs.shown import shown

from . import budgets, observed

if TYPE_CHECKING:
    from torch import Tensor

    from .observation import Observation
    from .retention import Retention

Scope = Literal["head", "token"]
AtDecode = Literal["nothing", "window queries", "last query", "mass"]


def _score(name: str) -> "Callable[[Observation, Retention], Tensor]":
    """The function of `scores.py`, which is imported, and torch with it, when it is called."""

    def score(observation: "Observation", retention: "Retention") -> "Tensor":
        from . import scores

        function: Callable[[Observation, Retention], Tensor] = getattr(scores, name)
        return function(observation, retention)

    return score


@dataclass(frozen=True, slots=True)
class ScoreMethod:
    """How to score the context tokens of one layer.

    Attributes:
        function: (observation, retention) -> [H, n - w] fp32; see `scores.py`.
        keeps: which tokens those are, for the list of methods.
        num_window_queries: (retention, prompt tokens) -> trailing queries that it looks at.
        scope: "head": each head has its own scores; "token": all heads of a layer have the same,
            which come from all of them.
        settings: fields of `Retention` that it reads, besides those of every budgeted method.
        min_window: smallest `window` that it can work with.
        fixed_window: the only `window` that fits its definition; None: any from `min_window` up.
        recent_tokens: (retention, tokens that a row keeps) -> how many of these are the prompt's
            last, whatever their score; at least `window`.
        at_decode: what it must be shown of the tokens that a sequence decodes, besides their keys,
            to compact rows (`decode_stage.py`): nothing, the queries of the last `window` tokens,
            that of the last one, or the attention mass that each stored token got so far. None: it
            cannot compact, so it takes no `decode` setting.
    """

    function: "Callable[[Observation, Retention], Tensor]"
    keeps: str
    num_window_queries: "Callable[[Retention, int], int]" = observed.observe_none
    scope: Scope = "head"
    settings: tuple[str, ...] = ()
    min_window: int = 0
    fixed_window: int | None = None
    recent_tokens: "Callable[[Retention, int], int]" = observed.keep_window
    at_decode: AtDecode | None = None


@dataclass(frozen=True, slots=True)
class BudgetShape:
    """How to spread a budget.

    Attributes:
        spreads: how, for the list of methods; "" where every row gets the same.
        function: (retention, mean tokens, prompt tokens, layers) -> exact target of each layer;
            see `budgets.py`. None where a shape has targets for rows only.
        row_function: (retention, mean tokens, prompt tokens, layers that share the budget, weights
            of all layers' heads) -> exact target of each row of these layers; see `budgets.py`.
        settings: fields of `Retention` that it reads, besides those of every budgeted method.
        ragged: the heads of a layer divide its tokens by their scores, so how many each keeps is
            known only once they are selected.
    """

    spreads: str
    function: "Callable[[Retention, Fraction, int, int], list[Fraction]] | None"
    row_function: (
        "Callable[[Retention, Fraction, int, Sequence[int], Sequence[Sequence[Fraction]]], "
        "list[Fraction]] | None"
    ) = None
    settings: tuple[str, ...] = ()
    ragged: bool = False

    @property
    def heads_differ(self) -> bool:
        """Whether the heads of one layer may keep different numbers of tokens."""
        return self.ragged or self.row_function is not None


SCORES = {
    "streaming": ScoreMethod(_score("streaming"), "the most recent tokens", at_decode="nothing"),
    "snapkv": ScoreMethod(
        _score("snapkv"),
        "what the last queries attend to",
        observed.observe_window,
        settings=("kernel_size", "pooling"),
        min_window=1,
        at_decode="window queries",
    ),
    "knorm": ScoreMethod(_score("knorm"), "keys of a small norm", at_decode="nothing"),
    "random": ScoreMethod(
        _score("random"), "a seeded random choice", settings=("seed",), at_decode="nothing"
    ),
    "h2o": ScoreMethod(
        _score("h2o"),
        "what all queries attend to the most, and the most recent tokens",
        observed.observe_all,
        settings=("recent_ratio",),
        fixed_window=0,
        recent_tokens=observed.keep_recent,
        at_decode="mass",
    ),
    "tova": ScoreMethod(
        _score("tova"),
        "what the last query attends to, over all heads of a layer",
        observed.observe_window,
        scope="token",
        fixed_window=1,
        at_decode="last query",
    ),
}

SHAPES = {
    "uniform": BudgetShape("", budgets.uniform),
    "pyramid": BudgetShape(
        "fewer in higher layers, in equal steps", budgets.pyramid, settings=("beta",)
    ),
    "cosine": BudgetShape(
        "fewer in higher layers, along a cosine", budgets.cosine, settings=("beta",)
    ),
    "adaptive": BudgetShape(
        "the heads of a layer compete for its tokens",
        budgets.adaptive,
        settings=("mean", "floor_ratio"),
        ragged=True,
    ),
    "profile": BudgetShape(
        "more in heads that were measured to matter",
        None,
        budgets.profile,
        settings=("profile", "head_beta"),
    ),
}

COMMON_SETTINGS = ("budget", "window", "sinks", "skip_layers", "decode")
"""What every budgeted method reads."""


def score_method(name: object) -> ScoreMethod:
    """The score of that name; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in SCORES:
        raise ValueError(f"score: unknown {shown(name)}; known: {', '.join(sorted(SCORES))}")
    return SCORES[name]


def budget_shape(name: object) -> BudgetShape:
    """The budget shape of that name; ValueError lists the known ones."""
    if not isinstance(name, str) or name not in SHAPES:
        raise ValueError(f"shape: unknown {shown(name)}; known: {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def settings_of(score: object, shape: object, mean: object = "uniform") -> tuple[str, ...]:
    """The settings that a score with a shape takes, in the order of reports.

    `mean` is the shape that `adaptive` takes its layers' budgets from; its settings count too.
    """
    settings = COMMON_SETTINGS + score_method(score).settings + budget_shape(shape).settings
    if "mean" not in settings:
        return settings
    if not isinstance(mean, str) or mean not in budgets.MEANS:
        raise ValueError(f"mean: unknown {shown(mean)}; known: {', '.join(sorted(budgets.MEANS))}")
    return settings + SHAPES[mean].settings
