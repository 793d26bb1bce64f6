"""The bounds of every number in a retention setting: what prefill, scheduler and workers can bear.

One table, so that no number goes unchecked: a test fails for a field of `Retention`, of a score or
shape, of `Propagate`, `DecodeStage` or `TrimStage` that holds a number and is not in it.

What this folder does, and its other files from the bottom up: see `retention.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from saqqara.configs.shown import shown

MAX_TOKENS = 2**24
"""More than the context of any model."""
MAX_LAYERS = 2**16
MAX_SCORE = 1e9
POOLINGS = ("max", "avg")
"""How scores of neighbouring tokens are pooled."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number may be.

    Attributes:
        least: the smallest value; with `is_open` numbers must be larger.
        most: the largest value; with `is_open_above` numbers must be smaller.
        is_integer: whether it must be an integer.
        is_odd: whether it must be an odd integer.
    """

    least: float
    most: float
    is_integer: bool = False
    is_odd: bool = False
    is_open: bool = False
    is_open_above: bool = False

    def check(self, name: str, value: object) -> None:
        """Raise a ValueError with the name unless the value is such a number."""
        if not self.accepts(value):
            raise ValueError(f"{name}: must be {self}, not {shown(value)}")
        if self.is_odd and isinstance(value, int) and value % 2 == 0:
            raise ValueError(f"{name}: must be odd, not {value}")

    def accepts(self, value: object) -> bool:
        """Whether it is a number of that kind and size (odd or not)."""
        kinds = (int,) if self.is_integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        is_low = value <= self.least if self.is_open else value < self.least
        is_high = value >= self.most if self.is_open_above else value > self.most
        return not (is_low or is_high) and value == value  # NaN is none of these

    def __str__(self) -> str:
        if self.is_integer:
            return f"an integer of at least {self.least} and at most {self.most}"
        low = f"above {self.least:g} and" if self.is_open else f"from {self.least:g}"
        up = "up to" if self.is_open else "to"
        return f"a number {low} {'below' if self.is_open_above else up} {self.most:g}"


def integer(least: int, most: int, *, is_odd: bool = False) -> Bound:
    """Bounds of an integer."""
    return Bound(least, most, is_integer=True, is_odd=is_odd)


BOUNDS = {
    "budget": integer(1, MAX_TOKENS),
    "share": Bound(0, 1, is_open=True),
    "window": integer(0, MAX_TOKENS),
    "sinks": integer(0, MAX_TOKENS),
    "skip_layers": integer(0, MAX_LAYERS - 1),
    "kernel_size": integer(1, MAX_TOKENS - 1, is_odd=True),
    "beta": Bound(1, 1e6),
    "seed": integer(0, 2**64 - 1),
    "recent_ratio": Bound(0, 1),
    "floor_ratio": Bound(0, 1),
    "head_beta": Bound(1, 1e6),
    "propagate.rho": Bound(0, 1, is_open=True),
    "propagate.interval": integer(1, MAX_LAYERS),
    "propagate.recent_ratio": Bound(0, 1, is_open_above=True),
    "propagate.min_context": integer(0, MAX_TOKENS),
    "propagate.distance_weight": Bound(0, 1e6, is_open=True),
    "propagate.layer": integer(0, MAX_LAYERS - 1),
    "propagate.keep": Bound(0, 1, is_open=True, is_open_above=True),
    "propagate.window": integer(1, MAX_TOKENS),
    "propagate.kernel_size": integer(1, MAX_TOKENS - 1, is_odd=True),
    "propagate.sinks": integer(0, MAX_TOKENS),
    "decode.slack_pages": integer(1, MAX_TOKENS),
    "decode.exceed": integer(2, MAX_TOKENS),
}
"""By the field's name as errors say it. A float that `propagate.layer` may be, too, is a share."""


def check(name: str, value: object, least: int | None = None) -> None:
    """Raise a ValueError unless the value is what `BOUNDS` says; `least` raises the lower bound."""
    bound = BOUNDS[name]
    if least is not None:
        bound = Bound(least, bound.most, bound.is_integer, bound.is_odd)
    bound.check(name, value)


def check_kind(name: str, value: object, kinds: tuple[type, ...], what: str) -> None:
    """Raise a ValueError unless the value is of one of these classes; an empty name is none."""
    if not isinstance(value, kinds) or value == "":
        raise ValueError(
            f"{name}: must be {what}, not {shown(value)}; `Retention.parse` reads names"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: must be {' or '.join(map(repr, choices))}, not {shown(value)}")
