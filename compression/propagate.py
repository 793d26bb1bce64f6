"""Propagation: from some layers on, only the selected tokens' hidden states travel upwards.

Settings and token counts, without tensors: how many tokens enter each layer follows from the
prompt's length alone, so the scheduler plans with the same numbers that the workers compute.
`selecting.py` picks the tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from saqqara.configs.shown import shown

from .bounds import BOUNDS, POOLINGS, check, check_choice
from .profiles.head_profile import AUTO

KINDS = {
    "pyramidinfer": (
        "rho",
        "interval",
        "recent_ratio",
        "min_context",
        "distance_weight",
        "sinks",
    ),
    "once": ("layer", "keep", "window", "kernel_size", "pooling", "sinks"),
}
"""The settings that each kind reads, in the order of reports."""


@dataclass(frozen=True, slots=True)
class Propagate:
    """Which tokens' hidden states go on to the next layer.

    A value: frozen, hashable, picklable, valid once made. Make one with `Propagate.parse`. A field
    that the kind does not read has its default, so equal behaviour compares equal.

    Layer l stores keys and values of the tokens that entered it; its attention output and MLP, and
    all layers above it, are computed for the tokens that it selects only. Tokens keep their
    positions.

    `pyramidinfer` (Yang et al., arXiv 2405.12532, ACL 2024) selects a little in every layer; `once`
    (FastKV, Jo et al., arXiv 2502.01068) selects in one layer at about the middle.

    Attributes:
        kind: "pyramidinfer" or "once".
        rho: part of the context that the highest layers pass on; layer l of L passes
            `rho + (1 - rho) * (cos(pi * l / L) + 1) / 2` (pyramidinfer).
        interval: only layers that it divides select (pyramidinfer).
        recent_ratio: part of the *original* prompt that is recent: with the last token always
            kept, and whose queries score the others (pyramidinfer).
        min_context: context tokens; a selection that would leave no more is not made
            (pyramidinfer).
        distance_weight: weight of the last query, the first of the recent ones having 1
            (pyramidinfer).
        layer: the layer that selects, from 0; or the part of the layers that see the whole prompt,
            in (0, 1), the last of which selects; or "auto": the one that the model's profile
            names, which an engine looks up (once).
        keep: part of the prompt that goes on, window and sinks included, in (0, 1) (once).
        window: last tokens, always kept, whose queries score the others (once).
        kernel_size: tokens that the score is pooled over, odd (once).
        pooling: "max" or "avg" (once).
        sinks: first tokens of the prompt, always kept.

    Raises:
        ValueError: a field is out of range or not read by the kind; named `propagate.<field>`.
    """

    kind: str = "pyramidinfer"
    rho: float = 0.9
    interval: int = 1
    recent_ratio: float = 0.2
    min_context: int = 64
    distance_weight: float = 1.2
    layer: int | float | str = 0.5
    keep: float = 0.2
    window: int = 32
    kernel_size: int = 7
    pooling: str = "max"
    sinks: int = 4

    def __post_init__(self) -> None:
        read = _settings_of(self.kind)
        for field in fields(self):
            if field.name not in ("kind", *read) and getattr(self, field.name) != field.default:
                raise ValueError(f"propagate.{field.name}: {self.kind!r} takes no such setting")
        for name in ("rho", "interval", "recent_ratio", "distance_weight", "keep", "window"):
            check(f"propagate.{name}", getattr(self, name))
        check("propagate.kernel_size", self.kernel_size)
        check("propagate.sinks", self.sinks)
        least = self.sinks if "min_context" in read else 0
        check("propagate.min_context", self.min_context, least=least)
        if type(self.layer) is int:
            check("propagate.layer", self.layer)
        elif self.layer != AUTO and not BOUNDS["propagate.keep"].accepts(self.layer):
            raise ValueError(
                "propagate.layer: must be a layer from 0, or a part of the layers above 0 and "
                f"below 1, not {shown(self.layer)}; 'auto' is that of the model's profile"
            )
        check_choice("propagate.pooling", self.pooling, POOLINGS)

    @classmethod
    def parse(
        cls, spec: "str | Mapping[str, Any] | Propagate", base: "Propagate | None" = None
    ) -> "Propagate":
        """Read a setting as users write it: a kind, or a mapping of settings with `kind`.

        Settings that the mapping leaves out, `kind` included, are those of `base` where it is of
        the same kind, else the defaults.

        Raises:
            ValueError: an unknown kind or setting, or a value out of range; names the field.
        """
        if isinstance(spec, Propagate):
            return spec
        if isinstance(spec, str):
            spec = {"kind": spec}
        if not isinstance(spec, Mapping):
            raise ValueError(
                f"propagate: must be a kind ({', '.join(KINDS)}) or a mapping of settings, not "
                f"{type(spec).__name__} {shown(spec)}"
            )
        kind = spec.get("kind", base.kind if base is not None else None)
        allowed = ("kind", *_settings_of(kind))
        for name in spec:
            if name not in allowed:
                raise ValueError(
                    f"propagate.{name!s:.80}: not a setting of {kind!r}; allowed: "
                    f"{', '.join(allowed)}"
                )
        inherited = base.to_dict() if base is not None and base.kind == kind else {}
        return cls(**{**inherited, **spec})

    def to_dict(self) -> dict[str, Any]:
        """Every setting that has an effect, as JSON values; `parse` reads it back."""
        return {name: getattr(self, name) for name in ("kind", *KINDS[self.kind])}

    def departures(self, usual: "Propagate | None") -> str:
        """What departs from `usual` (None: the defaults), such as "(rho=0.7)"; "" for nothing."""
        changed = [
            f"{field.name}={in_label(getattr(self, field.name))}"
            for field in fields(self)
            if field.name != "kind"
            and getattr(self, field.name)
            != (field.default if usual is None else getattr(usual, field.name))
        ]
        return f"({','.join(changed)})" if changed else ""

    def recent_tokens(self, prompt_tokens: int) -> int:
        """Last tokens that every selection keeps and whose queries score the others."""
        if self.kind == "once":
            return min(self.window, prompt_tokens)
        return 1 + part_of(self.recent_ratio, prompt_tokens)

    def survivors(self, prompt_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Count the tokens that enter each layer; all enter layer 0, and they never grow.

        Raises:
            ValueError: `layer` is no layer of the model.
        """
        return _survivors(self, prompt_tokens, num_layers)

    def first_cut(self, prompt_tokens: int, num_layers: int) -> int | None:
        """Find the lowest layer that does not pass on all tokens of such a prompt; None: no layer.

        Raises:
            ValueError: as `survivors`.
        """
        entering = self.survivors(prompt_tokens, num_layers)
        return next((n - 1 for n, tokens in enumerate(entering) if tokens < prompt_tokens), None)

    def passed_on(self, entered: int, prompt_tokens: int, layer: int, num_layers: int) -> int:
        """Count the tokens, of `entered` that enter `layer`, whose hidden states leave it."""
        if self.kind == "once":
            if layer != self._selecting_layer(num_layers):
                return entered
            wanted = max(part_of(self.keep, prompt_tokens), self.window + self.sinks)
            return min(wanted, entered)
        recent = self.recent_tokens(prompt_tokens)
        context = entered - recent
        if context <= 0 or layer % self.interval:
            return entered
        kept = part_of(self._ratio(layer, num_layers), context)
        return recent + kept if kept > self.min_context else entered

    def _ratio(self, layer: int, num_layers: int) -> float:
        return self.rho + (1 - self.rho) * (math.cos(math.pi * layer / num_layers) + 1) / 2

    def _selecting_layer(self, num_layers: int) -> int:
        if isinstance(self.layer, int):
            if self.layer >= num_layers:
                raise ValueError(
                    f"propagate.layer: {self.layer} is no layer of this model, which has layers 0 "
                    f"to {num_layers - 1}"
                )
            return self.layer
        if isinstance(self.layer, str):
            raise ValueError(
                "propagate.layer: 'auto' stands for what the profile of a model says, which an "
                "engine looks up; none is known here"
            )
        return max(1, part_of(self.layer, num_layers)) - 1


@lru_cache(maxsize=8192)
def _survivors(propagate: Propagate, prompt_tokens: int, num_layers: int) -> tuple[int, ...]:
    counts = [prompt_tokens]
    for layer in range(num_layers - 1):
        counts.append(propagate.passed_on(counts[-1], prompt_tokens, layer, num_layers))
    return tuple(counts)


def computed_tokens(entering: Sequence[int], num_reused: int) -> tuple[int, ...]:
    """Count the tokens that each layer computes of a prompt whose first ones are known.

    Where all tokens enter, the known ones are left out; above the first cut the survivors are
    computed, whichever they are.

    Args:
        entering: `Propagate.survivors`, or the whole prompt for each layer.
        num_reused: first tokens of the prompt whose keys and values are known below the cut.
    """
    return tuple(tokens - num_reused * (tokens == entering[0]) for tokens in entering)


def in_label(number: Any) -> Any:
    """A setting as labels write it: equal ones alike, so 5 for 5.0."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def part_of(ratio: float, count: int) -> int:
    """`int(ratio * count)`, but 29 for 0.29 * 100, which in floating point is just below.

    Rounding first also makes hosts agree whose C libraries differ in the last bit of a cosine.
    """
    return int(round(ratio * count, 9))


def _settings_of(kind: object) -> tuple[str, ...]:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"propagate.kind: unknown {shown(kind)}; known: {', '.join(KINDS)}")
    return KINDS[kind]
