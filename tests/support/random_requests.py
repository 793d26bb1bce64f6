"""Requests with random values of every field, valid ones and others, for Hypothesis.

Numbers come from the bounds that the code itself checks by, so that a new field is drawn, too: the
table of retention settings, and the schema of `SamplingParams`. What is no number is in `OTHERS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from saqqara.cluster.request import SamplingParams
from saqqara.compression.bounds import BOUNDS, Bound
from saqqara.compression.budgets import MEANS
from saqqara.compression.propagate import KINDS
from saqqara.compression.registry import SCORES, SHAPES, settings_of
from saqqara.compression.retention_settings import presets

VOCAB, NUM_LAYERS, NUM_HEADS, CONTEXT = 257, 4, 4, 96

HUGE = [2**63, -(2**63) - 1, 2**70, 10**30, 1e300, float("inf"), float("nan"), "x", [1], {"a": 1}]
PROFILE = {f"{i}-{j}": [1.0 + i * j] for i in range(NUM_LAYERS) for j in range(NUM_HEADS)}
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)
WORDS = st.lists(st.text("abc ", min_size=1, max_size=3), max_size=3)
STRANGE_TOKENS = st.sampled_from([[VOCAB], [-1], [2**31], [1.5], "x", [None]])
OTHERS: dict[str, tuple[Any, Any]] = {  # fields of SamplingParams: values in bounds, and others
    "stop": (WORDS, st.sampled_from([[""], ["a"] * 300, ["b" * 2000], 7])),
    "bad_words": (WORDS, st.sampled_from([[""], ["a"] * 300, ["b" * 2000], 7])),
    "stop_token_ids": (TOKENS, STRANGE_TOKENS),
    "allowed_token_ids": (TOKENS, STRANGE_TOKENS),
    "logit_bias": (
        st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
        st.sampled_from([{VOCAB: 1.0}, {-1: 1.0}, {1: 101.0}, {1: float("nan")}, [1]]),
    ),
    **{
        name: (st.booleans(), st.sampled_from(["maybe", 7, [True]]))
        for name in ("ignore_eos", "detokenize", "skip_special_tokens")
    },
    "include_stop_str_in_output": (st.booleans(), st.sampled_from(["maybe", 7])),
}


def _bound_of(name: str) -> Bound | None:
    field = SamplingParams.model_fields[name]
    limits = {
        key: getattr(m, key)
        for m in field.metadata
        for key in ("ge", "gt", "le", "lt")
        if hasattr(m, key)
    }
    if not limits:
        return None
    is_integer = "int" in str(field.annotation)
    least: Any = limits.get("ge", limits.get("gt"))
    most: Any = limits.get("le", limits.get("lt"))
    if is_integer:  # the edges themselves are to be tried
        return Bound(least + ("gt" in limits), most - ("lt" in limits), is_integer=True)
    return Bound(least, most, is_open="gt" in limits, is_open_above="lt" in limits)


SAMPLING = {
    name: bound for name in SamplingParams.model_fields if (bound := _bound_of(name)) is not None
}
# `stop` and the like have a `max_length`, and no bounds of a number.
assert {*SAMPLING, *OTHERS} == {*SamplingParams.model_fields}, "a new field needs its values here"
# Where the upper edge costs much time for nothing, valid values mostly lie below this.
USUAL_MOST = {"n": 2, "max_tokens": 6, "min_tokens": 3, "min_context": 64, "window": 24, "sinks": 8}
EDGE = 24  # one value in so many lies at an edge


@dataclass(frozen=True)
class Tried:
    """A number as it was drawn: at or beyond which edge of its bounds, if at one."""

    name: str
    side: str


@dataclass(frozen=True)
class Drawn:
    """A request, the edges that it tries, and whether it has a value beyond its bounds."""

    prompt: list[int] | str
    sampling: Mapping[str, Any]
    retention: Mapping[str, Any] | str | None
    budget: int | str | None
    priority: Any
    tried: tuple[Tried, ...]
    is_wrong: bool


class _Draw:
    """Draws the parts of one request and remembers the edges."""

    def __init__(self, draw: Any, num_wrong: int) -> None:
        self.draw = draw
        self.num_wrong = num_wrong
        self.tried: list[Tried] = []
        self.is_wrong = False

    def chance(self, one_in: int) -> bool:
        return bool(self.draw(st.integers(1, one_in)) == one_in)

    def number(self, name: str, bound: Bound) -> Any:
        """A value in the bounds, or, while there is one to go wrong, maybe beyond them."""
        if self.num_wrong and self.chance(4):
            self.num_wrong -= 1
            self.is_wrong = True
            return self.beyond(name, bound)
        if self.chance(EDGE):
            is_low = self.draw(st.booleans())
            self.tried.append(Tried(name, "least" if is_low else "most"))
            return _edge(bound, is_low)
        usual = USUAL_MOST.get(name.rpartition(".")[2], 40)
        if bound.is_integer:
            value = self.draw(st.integers(int(bound.least), int(min(bound.most, usual))))
            return value | 1 if bound.is_odd else value
        return self.draw(
            st.floats(
                bound.least,
                min(bound.most, usual),
                exclude_min=bound.is_open,
                exclude_max=bound.is_open_above and bound.most <= usual,
            )
        )

    def beyond(self, name: str, bound: Bound) -> Any:
        if self.chance(3):
            return self.draw(st.sampled_from(HUGE))
        is_low = self.draw(st.booleans())
        self.tried.append(Tried(name, "below" if is_low else "above"))
        step = _step(bound, is_low)
        edge = bound.least if is_low else bound.most
        return edge - step if is_low else edge + step

    def other(self, inside: Any, outside: Any) -> Any:
        if self.num_wrong and self.chance(4):
            self.num_wrong -= 1
            self.is_wrong = True
            return self.draw(outside)
        return self.draw(inside)


def _edge(bound: Bound, is_low: bool) -> Any:
    if is_low:
        return bound.least + 1e-6 if bound.is_open else bound.least
    return bound.most - 1e-6 if bound.is_open_above else bound.most


def _step(bound: Bound, is_low: bool) -> float:
    """How far beyond an edge the nearest value outside is tried."""
    if bound.is_integer:
        return 2 if bound.is_odd else 1
    if bound.is_open if is_low else bound.is_open_above:
        return 0
    return 1e-6 * max(1.0, abs(bound.least if is_low else bound.most))


@st.composite
def requests(draw: Any) -> Drawn:
    """One request; three in four are meant to be valid."""
    drawn = _Draw(draw, num_wrong=int(draw(st.integers(1, 4)) == 4))
    sampling: dict[str, Any] = {"max_tokens": drawn.number("max_tokens", SAMPLING["max_tokens"])}
    names = [name for name in (*SAMPLING, *OTHERS) if name not in sampling]
    for name in draw(st.lists(st.sampled_from(names), max_size=6, unique=True)):
        if name in SAMPLING:
            sampling[name] = drawn.number(name, SAMPLING[name])
        else:
            sampling[name] = drawn.other(*OTHERS[name])
    retention, budget = _retention(drawn)
    length = draw(st.integers(1, CONTEXT - 8))
    prompt: list[int] | str = [(7 * i + length) % VOCAB for i in range(length)]
    if drawn.chance(4):
        prompt = "lorem ipsum " * (length // 12) + "x"
    elif drawn.num_wrong and drawn.chance(3):
        drawn.num_wrong, drawn.is_wrong = 0, True
        prompt = [*prompt, draw(st.sampled_from([VOCAB, -1, 2**40, 1.5, None]))]
    elif draw(st.integers(0, 30)) == 17:
        prompt = [1] * CONTEXT
    priority = drawn.number("priority", Bound(-(2**31), 2**31 - 1, is_integer=True))
    return Drawn(prompt, sampling, retention, budget, priority, tuple(drawn.tried), drawn.is_wrong)


def _retention(drawn: _Draw) -> tuple[Mapping[str, Any] | str | None, int | str | None]:
    kind = drawn.draw(st.sampled_from(["none", "preset", "score", "score", "propagate"]))
    if kind == "none":
        return None, None
    if kind == "preset":
        name = drawn.draw(st.sampled_from(sorted({*presets()} - {"headkv"})))
        takes_budget = presets()[name].get("score") is not None
        return name, drawn.draw(st.sampled_from(["50%", 48])) if takes_budget else None
    settings: dict[str, Any] = {}
    if kind == "propagate" or drawn.chance(4):
        settings["propagate"] = _propagate(drawn)
    if kind == "propagate":
        if settings["propagate"]["kind"] == "pyramidinfer" and drawn.chance(2):
            trigger = drawn.other(st.sampled_from(["stored", "published"]), st.just("never"))
            exceed = drawn.number("decode.exceed", BOUNDS["decode.exceed"])
            settings["decode"] = {"trigger": trigger, "exceed": exceed}
        return settings, None
    settings |= _score(drawn)
    return settings, settings.pop("budget")


def _score(drawn: _Draw) -> dict[str, Any]:
    score = drawn.draw(st.sampled_from(sorted(SCORES)))
    method = SCORES[score]
    shapes = [s for s in SHAPES if method.scope == "head" or not SHAPES[s].heads_differ]
    shape = drawn.draw(st.sampled_from(sorted(shapes)))
    settings: dict[str, Any] = {"score": score, "shape": shape}
    mean = "uniform"
    if shape == "adaptive":
        mean = settings["mean"] = drawn.draw(st.sampled_from(sorted(MEANS)))
    for name in settings_of(score, shape, mean):
        if name in BOUNDS and name not in ("budget", "window", "skip_layers") and drawn.chance(2):
            settings[name] = drawn.number(name, BOUNDS[name])
    if method.fixed_window is None:
        bound = Bound(method.min_window, BOUNDS["window"].most, is_integer=True)
        settings["window"] = drawn.number("window", bound)
    if drawn.chance(8):
        settings["skip_layers"] = [drawn.number("skip_layers", BOUNDS["skip_layers"])]
    if shape == "profile":
        wrong: list[Any] = [[], {}, 7, {"0-0": [1.0]}, {"0-0": [1e308, 1e308]}, {"x": [1]}, "/dev"]
        settings["profile"] = drawn.other(st.just(PROFILE), st.sampled_from(wrong))
    if method.at_decode is not None and drawn.chance(3):
        bound = BOUNDS["decode.slack_pages"]
        settings["decode"] = {"slack_pages": drawn.number("decode.slack_pages", bound)}
    budgets = st.integers(40, 90) | st.integers(1, 100).map(lambda share: f"{share}%")
    settings["budget"] = drawn.draw(budgets)
    may_be_zero = method.fixed_window is None and method.min_window == 0
    if may_be_zero and not drawn.is_wrong and drawn.chance(6):
        settings |= {"window": 0, "sinks": 0}  # so that any number of tokens will do
        settings["budget"] = drawn.number("budget", BOUNDS["budget"])
    return settings


def _propagate(drawn: _Draw) -> dict[str, Any]:
    kind = drawn.draw(st.sampled_from(sorted(KINDS)))
    settings: dict[str, Any] = {"kind": kind}
    for name in KINDS[kind]:
        bound = BOUNDS.get(f"propagate.{name}")
        if name == "layer":
            settings[name] = drawn.other(st.integers(0, 3), st.sampled_from([-1, 4, 2**16, "x"]))
        elif bound is not None and drawn.chance(2):
            settings[name] = drawn.number(f"propagate.{name}", bound)
    return settings
