"""Requests with random values of every field, valid ones and others, the same for the same seed.

Numbers come from the bounds that the code itself checks by, so that a new field is drawn, too: the
table of retention settings, and the schema of `SamplingParams`. What is no number is in `OTHERS`.
Some requests are aimed: at one edge after another, so that each is surely tried.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

from saqqara.cluster.engine.intake import MAX_PRIORITY
from saqqara.cluster.sampling import MAX_STRING_CHARS, MAX_STRINGS, MAX_TOKEN_IDS, SamplingParams
from saqqara.compression.bounds import BOUNDS, Bound
from saqqara.compression.propagate import KINDS
from saqqara.compression.scores import SCORES
from saqqara.compression.shapes import MEANS, SHAPES
from saqqara.compression.spelling import Kinds, presets

VOCAB, NUM_LAYERS, NUM_HEADS, CONTEXT = 257, 2, 4, 96

HUGE = [2**63, -(2**63) - 1, 2**70, 10**30, 1e300, float("inf"), float("nan"), "x", [1], {"a": 1}]
PROFILE = {f"{i}-{j}": [1.0 + i * j] for i in range(NUM_LAYERS) for j in range(NUM_HEADS)}


@dataclass(frozen=True)
class Other:
    """Values of a field that is no number: a random one, those at its edges, and wrong ones."""

    usual: Callable[[Random], Any]
    edges: tuple[Any, ...]
    wrong: tuple[Any, ...]


def _tokens(random: Random) -> list[int]:
    return [random.randrange(VOCAB) for _ in range(random.randint(1, 4))]


def _words(random: Random) -> list[str]:
    lengths = [random.randint(1, 3) for _ in range(random.randint(0, 3))]
    return ["".join(random.choices("abc ", k=length)) for length in lengths]


def _biases(random: Random) -> dict[int, float]:
    return {token: random.uniform(-100, 100) for token in _tokens(random)}


def _form(random: Random) -> dict[str, Any]:
    return random.choice(
        [{"choice": ["ab", "abc", "b"]}, {"regex": "[a-z ]{1,9}"}, {"json": {"type": "integer"}}]
    )


def _flag(random: Random) -> bool:
    return random.random() < 0.5


WORDS = Other(
    _words,
    ([], ["ab"] * MAX_STRINGS, ["b" * MAX_STRING_CHARS]),
    ([""], ["a"] * (MAX_STRINGS + 1), ["b" * (MAX_STRING_CHARS + 1)], 7),
)
STRANGE_TOKENS = ([VOCAB], [-1], [2**31], [1.5], "x", [None])
FLAG = Other(_flag, (False, True), ("maybe", 7, [True]))
OTHERS = {  # fields of SamplingParams
    "stop": WORDS,
    "bad_words": WORDS,
    "stop_token_ids": Other(
        _tokens,
        ([], [0], [VOCAB - 1], [5] * MAX_TOKEN_IDS),
        (*STRANGE_TOKENS, [5] * (MAX_TOKEN_IDS + 1)),
    ),
    "allowed_token_ids": Other(_tokens, ([0], [VOCAB - 1]), (*STRANGE_TOKENS, [])),
    "logit_bias": Other(
        _biases,
        ({}, {0: -100}, {VOCAB - 1: 100}),
        ({VOCAB: 1.0}, {-1: 1.0}, {1: 101.0}, {1: -101.0}, {1: float("nan")}, [1]),
    ),
    "truncation_side": Other(
        lambda random: random.choice(["left", "right"]), ("left", "right"), ("middle", 7, ["left"])
    ),
    "structured_outputs": Other(
        _form,
        ({"json_object": True}, {"regex": ".*"}, {"grammar": 'start: "a" | "b" start'}),
        (
            {"choice": []},
            {"regex": "("},
            {"regex": "a", "choice": ["a"]},
            {"json": {"uniqueItems": True}},
            7,
        ),
    ),
    "ignore_eos": FLAG,
    "detokenize": Other(lambda _: True, FLAG.edges, FLAG.wrong),  # HTTP takes no other
    "skip_special_tokens": FLAG,
    "include_stop_str_in_output": FLAG,
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
NUMBERS = {
    **SAMPLING,
    **{f"retention.{name}": bound for name, bound in BOUNDS.items()},
    "priority": Bound(-MAX_PRIORITY - 1, MAX_PRIORITY, is_integer=True),
}
# Where the upper edge costs much time for nothing, valid values mostly lie below this.
USUAL_MOST = {
    "n": 2,
    "max_tokens": 6,
    "min_tokens": 3,
    "min_context": 64,
    "window": 24,
    "sinks": 8,
    "layer": NUM_LAYERS - 1,
    "skip_layers": NUM_LAYERS - 1,
    "temperature": 2,
}
ONE_AT_EDGE_IN = 24
MAX_DRAWS = 20_000


@dataclass(frozen=True)
class Edge:
    """A value to be tried: at or beyond an end of a number's bounds, or one of `OTHERS`."""

    name: str
    side: str

    @property
    def is_wrong(self) -> bool:
        """Whether a request with it must be refused."""
        return self.side.startswith(("below", "above", "wrong"))

    def __str__(self) -> str:
        return f"{self.name} {self.side}"


EDGES = [
    *(Edge(name, side) for name in NUMBERS for side in ("least", "most", "below", "above")),
    *(Edge(name, f"edge {i}") for name, other in OTHERS.items() for i in range(len(other.edges))),
    *(Edge(name, f"wrong {i}") for name, other in OTHERS.items() for i in range(len(other.wrong))),
]
Random(0).shuffle(EDGES)  # any part of them has all kinds


@dataclass(frozen=True)
class Drawn:
    """A request, the edges that it tries, and whether it has a value beyond its bounds."""

    prompt: list[int] | str
    sampling: Mapping[str, Any]
    retention: Mapping[str, Any] | str | None
    budget: int | str | None
    priority: Any
    tried: tuple[Edge, ...]
    is_wrong: bool


class _Draw:
    """Draws the parts of one request and remembers the edges.

    Args:
        num_wrong: values that may be wrong.
        aim: the edge that the request should try, once it reads that field.
    """

    def __init__(self, random: Random, num_wrong: int, aim: Edge | None = None) -> None:
        self.random = random
        self.num_wrong = num_wrong
        self.aim = aim
        self.tried: list[Edge] = []
        self.is_wrong = False

    def chance(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == 0

    def goes_wrong(self, one_in: int = 4) -> bool:
        """Whether the value to be drawn is a wrong one, which is then counted."""
        if not (self.num_wrong and self.chance(one_in)):
            return False
        self.num_wrong -= 1
        self.is_wrong = True
        return True

    def try_edge(self, edge: Edge) -> str:
        self.tried.append(edge)
        self.is_wrong = self.is_wrong or edge.is_wrong
        return edge.side

    def number(self, name: str, bound: Bound | None = None) -> Any:
        """A value in the bounds, or, while there is one to go wrong, maybe beyond them."""
        bound = bound or NUMBERS[name]
        if self.aim is not None and self.aim.name == name and self.aim not in self.tried:
            return at_edge(bound, self.try_edge(self.aim))
        if self.goes_wrong():
            if self.chance(3):
                return self.random.choice([v for v in HUGE if not bound.accepts(v)])
            return at_edge(bound, self.try_edge(Edge(name, self.random.choice(["below", "above"]))))
        if self.chance(ONE_AT_EDGE_IN):
            return at_edge(bound, self.try_edge(Edge(name, self.random.choice(["least", "most"]))))
        usual = USUAL_MOST.get(name.rpartition(".")[2], 40)
        least, most = at_edge(bound, "least"), min(at_edge(bound, "most"), usual)
        if bound.is_integer:
            value = self.random.randint(least, max(least, most))
            return value | 1 if bound.is_odd else value
        return self.random.uniform(least, most)

    def other(self, name: str) -> Any:
        """A value of what is no number; see `OTHERS`."""
        values = OTHERS[name]
        if self.aim is not None and self.aim.name == name:
            side, _, place = self.try_edge(self.aim).partition(" ")
            return (values.edges if side == "edge" else values.wrong)[int(place)]
        if self.goes_wrong():
            return self.random.choice(values.wrong)
        return values.usual(self.random)

    def choice(self, inside: Sequence[Any], outside: Sequence[Any]) -> Any:
        """One of a few values, or, while there is one to go wrong, maybe one of the others."""
        return self.random.choice(outside if self.goes_wrong() else inside)


def at_edge(bound: Bound, side: str) -> Any:
    """The outermost value in the bounds, "least" or "most", or the next "below" or "above"."""
    is_low = side in ("least", "below")
    edge = bound.least if is_low else bound.most
    is_open = bound.is_open if is_low else bound.is_open_above
    if side in ("least", "most"):
        step = -1e-6 if is_open else 0
    elif bound.is_integer:
        step = 2 if bound.is_odd else 1
    else:
        step = 0 if is_open else 1e-6 * max(1.0, abs(edge))
    return (edge - step if is_low else edge + step) if step else edge


def random_request(random: Random, aim: Edge | None = None) -> Drawn:
    """A request that tries the edge, or any; three in four of these are meant to be valid.

    Raises:
        AssertionError: requests as they are drawn here do not have the edge's field.
    """
    if aim is None:
        return _request(_Draw(random, num_wrong=int(random.random() < 0.25)))
    for _ in range(MAX_DRAWS):
        drawn = _request(_Draw(random, num_wrong=0, aim=aim))
        if aim in drawn.tried:
            return drawn
    raise AssertionError(f"no request had {aim.name}: draw it")


def batches(
    seed: int, size: int, num_aimed: int, edges: Sequence[Edge] = EDGES
) -> Iterator[list[Drawn]]:
    """Batches without end; so many requests of each are aimed, at one edge after another."""
    random = Random(seed)
    aims = cycle(edges)
    while True:
        batch = [random_request(random, aim) for aim in islice(aims, num_aimed)]
        batch += [random_request(random) for _ in range(size - num_aimed)]
        random.shuffle(batch)
        yield batch


def _request(draw: _Draw) -> Drawn:
    random = draw.random
    retention, budget = _retention(draw)
    sampling: dict[str, Any] = {"max_tokens": draw.number("max_tokens")}
    names = [name for name in (*SAMPLING, *OTHERS) if name not in sampling]
    if _propagates(retention):  # then there are none of the prompt
        names.remove("prompt_logprobs")
    for name in random.sample(names, random.choice([0, 1, 1, 2, 2, 3, 4, 6])):
        sampling[name] = draw.number(name) if name in SAMPLING else draw.other(name)
    length = random.randint(1, CONTEXT - 8)
    prompt: list[Any] | str = [(7 * i + length) % VOCAB for i in range(length)]
    if draw.chance(4):
        prompt = "lorem ipsum " * (length // 12) + "x"
    elif draw.goes_wrong(3):
        prompt = [*prompt, random.choice([VOCAB, -1, 2**40, 1.5, None])]
    elif draw.chance(30):
        prompt = [1] * CONTEXT
    priority = draw.number("priority")
    return Drawn(prompt, sampling, retention, budget, priority, tuple(draw.tried), draw.is_wrong)


def _propagates(retention: Mapping[str, Any] | str | None) -> bool:
    given = presets()[retention] if isinstance(retention, str) else retention or {}
    return given.get("propagate") is not None


def _retention(draw: _Draw) -> tuple[Mapping[str, Any] | str | None, Any]:
    kind = draw.random.choice(["none", "preset", "score", "score", "propagate"])
    if kind == "none":
        return None, None
    if kind == "preset":
        name = draw.random.choice(sorted({*presets()} - {"headkv"}))
        takes_budget = presets()[name].get("score") is not None
        return name, draw.random.choice(["50%", 48]) if takes_budget else None
    settings: dict[str, Any] = {}
    if kind == "propagate" or draw.chance(4):
        settings["propagate"] = _propagate(draw)
    if kind == "propagate":
        if settings["propagate"]["kind"] == "pyramidinfer" and draw.chance(2):
            trigger = draw.choice(["stored", "published"], ["never"])
            exceed = draw.number("retention.decode.exceed")
            settings["decode"] = {"trigger": trigger, "exceed": exceed}
        return settings, None
    settings |= _score(draw)
    return settings, settings.pop("budget")


def _score(draw: _Draw) -> dict[str, Any]:
    random = draw.random
    score = random.choice(sorted(SCORES))
    method = SCORES[score]
    shapes = [s for s in SHAPES if method.scope == "head" or not SHAPES[s].heads_differ]
    shape = random.choice(sorted(shapes))
    settings: dict[str, Any] = {"score": score, "shape": shape}
    mean = "uniform"
    if shape == "adaptive":
        mean = settings["mean"] = random.choice(sorted(MEANS))
    # Without a window and sinks any number of tokens will do as the budget.
    is_bare = method.fixed_window is None and method.min_window == 0 and draw.chance(6)
    elsewhere = ("budget", "window", "skip_layers", *(["sinks"] if is_bare else []))
    for name in Kinds(score, shape, mean).defaults:
        if name in BOUNDS and name not in elsewhere and draw.chance(2):
            settings[name] = draw.number(f"retention.{name}")
    if is_bare:
        settings |= {"window": 0, "sinks": 0}
    elif method.fixed_window is None:
        bound = Bound(method.min_window, BOUNDS["window"].most, is_integer=True)
        settings["window"] = draw.number("retention.window", bound)
    if draw.chance(8):
        settings["skip_layers"] = [draw.number("retention.skip_layers")]
    if shape == "profile":
        wrong: list[Any] = [[], {}, 7, {"0-0": [1.0]}, {"0-0": [1e308, 1e308]}, {"x": [1]}, "/dev"]
        settings["profile"] = draw.choice([PROFILE], wrong)
    if method.at_decode is not None and draw.chance(3):
        settings["decode"] = {"slack_pages": draw.number("retention.decode.slack_pages")}
    settings["budget"] = _budget(draw, is_bare)
    return settings


def _budget(draw: _Draw, is_bare: bool) -> Any:
    if is_bare:
        return draw.number("retention.budget")
    if draw.chance(2):
        return draw.random.randint(40, 90)
    share = draw.number("retention.share")
    return f"{100 * share:.6f}%" if isinstance(share, int | float) else share


def _propagate(draw: _Draw) -> dict[str, Any]:
    kind = draw.random.choice(sorted(KINDS))
    settings: dict[str, Any] = {"kind": kind}
    for name in KINDS[kind]:
        if name == "layer" or (f"propagate.{name}" in BOUNDS and draw.chance(2)):
            settings[name] = draw.number(f"retention.propagate.{name}")
    return settings
