"""The retention methods that have a name, and what each keeps, needs and costs.

All of it follows from the presets, scores and shapes, so a new method describes itself here.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .profiles.head_profile import AUTO
from .propagate import Propagate
from .scores import SCORES, Score
from .shapes import SHAPES, Shape
from .spelling import presets

EXAMPLE_TOKENS, EXAMPLE_LAYERS = 4096, 32
"""The prompt and model that the share of prefill is said for."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method for people.

    Attributes:
        name: what `retention` takes.
        keeps: which tokens of a prompt.
        needs: what it must be given.
        costs: what it computes besides the model, or saves of it.
        compacts: whether it takes `decode`, which bounds rows while they grow.
    """

    name: str
    keeps: str
    needs: str
    costs: str
    compacts: bool

    def to_dict(self) -> dict[str, Any]:
        """All but the name, as JSON values."""
        fields = asdict(self)
        del fields["name"]
        return fields


def method_table() -> list[MethodRow]:
    """A row for every preset in `configs/retention/`, `full` first."""
    names = sorted(presets(), key=lambda name: (name != "full", name))
    return [_row(name, presets()[name]) for name in names]


def _row(name: str, preset: dict[str, Any]) -> MethodRow:
    propagate = Propagate.parse(preset["propagate"]) if "propagate" in preset else None
    if preset["score"] is None:
        return MethodRow(
            name=name,
            keeps="everything" if propagate is None else _passes(propagate),
            needs="nothing",
            costs="nothing" if propagate is None else _saves(propagate),
            compacts=propagate is not None and propagate.kind == "pyramidinfer",
        )
    score, shape = SCORES[preset["score"]], SHAPES[preset["shape"]]
    keeps = [score.keeps + _pooled(score, preset), *_spreads(shape, preset)]
    costs = [_observes(score, preset)]
    if propagate is not None:
        keeps.append(_passes(propagate))
        costs.append(_saves(propagate))
    return MethodRow(
        name=name,
        keeps="; ".join(keeps),
        needs="; ".join(["a budget", *_profile(preset)]),
        costs="; ".join(costs),
        compacts=score.at_decode is not None,
    )


def _pooled(score: type[Score], preset: dict[str, Any]) -> str:
    """Over how many neighbouring tokens a score is taken."""
    if "kernel_size" not in {field.name for field in fields(score)}:
        return ""
    kind = {"max": "largest", "avg": "mean"}[preset["pooling"]]
    return f" ({kind} of {preset['kernel_size']} neighbours)"


def _spreads(shape: type[Shape], preset: dict[str, Any]) -> list[str]:
    mean = SHAPES[preset.get("mean", "uniform")]
    return [text for text in (shape.spreads, mean.spreads) if text]


def _profile(preset: dict[str, Any]) -> list[str]:
    """What a shape that needs measured heads must be given."""
    if preset["shape"] != "profile":
        return []
    measured = "a profile of the model (saqqara eval calibrate)"
    if preset.get("profile") == AUTO:
        return [f"{measured}, which it finds; else it is recommended-adaptive"]
    return [measured]


def _observes(score: type[Score], preset: dict[str, Any]) -> str:
    """What a score has to look at, in each layer of prefill."""
    window = score.fixed_window or preset.get("window", 0)
    queries = "query" if window == 1 else f"{window} queries"
    if score.observes == "nothing":
        return "next to nothing"
    if score.observes == "all":
        return "attention of all queries once more"
    return f"attention of the last {queries} once more"


def _passes(propagate: Propagate) -> str:
    if propagate.kind == "once":
        return f"upper layers see {propagate.keep:.0%} of the prompt"
    return "each layer passes on what its last queries attend to"


def _saves(propagate: Propagate) -> str:
    if propagate.layer == AUTO:
        propagate = replace(propagate, layer=0.5)  # about where models look facts up
    entering = propagate.survivors(EXAMPLE_TOKENS, EXAMPLE_LAYERS)
    share = sum(entering) / (EXAMPLE_TOKENS * EXAMPLE_LAYERS)
    example = f"{EXAMPLE_TOKENS} tokens, {EXAMPLE_LAYERS} layers"
    return f"saves prefill: {share:.0%} of the tokens x layers are computed ({example})"
