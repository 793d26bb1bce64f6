"""Retention: which score, spread over the layers in which shape, at which budget.

`compression/` says what to keep of a prompt and of what is decoded, and imports nothing of ours but
`configs`. From the bottom: `bounds`, `head_profile`, `scores`, `shapes`, `propagate`, `decode` (the
parts of a setting), `layers` (a budget spread over those of a model), `spelling` (how people write
it), this file (the value, and how many tokens it keeps), `growth` (how many while decoding),
`methods` (the list for people). None of these imports
torch. With tensors: `observation` (what may be looked at), `scoring` (tensors in, scores out) and
`selecting` (scores in, positions out).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from saqqara.configs.shown import shown

from . import spelling
from .bounds import BOUNDS, check, check_kind
from .decode import AnyDecodeStage, DecodeStage, TrimStage
from .layers import Budget, Layers, over_layers, over_rows
from .profiles.head_profile import AUTO, HeadProfile
from .propagate import Propagate
from .scores import SCORES, Score
from .shapes import MEANS, SHAPES, UNIFORM, LayerShape, Profile, RowShape, Shape


@dataclass(frozen=True)
class Retention:
    """What a sequence keeps of its prompt: a score, a budget shape, and what both work with.

    A value: frozen, hashable, picklable, valid once made. Make one with `Retention.parse`.

    The budget B is the mean number of prompt tokens kept per layer and kv head, window and sinks
    included: `budget` tokens, or the `share` of the prompt rounded to nearest (halves up), which is
    fixed by the original prompt and raised to `window + sinks + 1`. Over all L layers exactly
    L * B tokens per kv head are kept. A prompt of at most B tokens is kept whole.

    Where some layers see a window of tokens only (`Layers`), all of this is about the others, the
    global layers: L counts them, and shapes number them as if they were the whole model. Layer
    numbers in settings are those of the model. A local layer keeps its window, whatever the budget.

    With `propagate` only some tokens enter the upper layers (`Propagate.survivors`). Without a
    score a layer keeps what entered it. With a score it keeps the smaller of what entered it and
    what the budget, spread over the layers as if all entered, gives it: less than L * B in all
    where fewer enter a layer than its budget.

    Attributes:
        method: name for reports and metrics: the preset's, or `<score>-<shape>`, or
            `<score>-adaptive-<mean>`.
        score: how tokens are chosen, with its settings (`scores.py`); None keeps everything (method
            `full`, or with `propagate` all that enters a layer).
        shape: how the budget spreads, with its settings (`shapes.py`).
        budget: B in tokens, at least `window + sinks + 1`; exactly one of `budget` and `share`.
        share: B as a part of the prompt, in (0, 1]; written "25%".
        window: last tokens of the prompt, kept in every layer by every score; where the score
            looks at queries, they are these tokens' queries.
        sinks: first tokens of the prompt, kept in every layer by every score.
        skip_layers: layers that keep the whole prompt; the others' budgets shrink to make up.
        propagate: which hidden states go on to the next layer; None: all.
        decode: compact rows while decoding (`DecodeStage`), or, for pyramidinfer without a score,
            trim them (`TrimStage`); None: they grow by every token.

    Raises:
        ValueError: a field is out of range, missing, or does not go with the score and shape.
    """

    method: str = "full"
    score: Score | None = None
    shape: Shape = UNIFORM
    budget: int | None = None
    share: float | None = None
    window: int = 32
    sinks: int = 4
    skip_layers: tuple[int, ...] = ()
    propagate: Propagate | None = None
    decode: AnyDecodeStage | None = None

    def __post_init__(self) -> None:
        check_kind("method", self.method, (str,), "a name")
        check_kind("score", self.score, (*SCORES.values(), type(None)), "a value of scores.py")
        check_kind("shape", self.shape, tuple(SHAPES.values()), "a value of shapes.py")
        check_kind("propagate", self.propagate, (Propagate, type(None)), "a Propagate")
        if (self.score is None and self.propagate is None) != (self.method == "full"):
            score = None if self.score is None else self.score.name
            raise ValueError(
                f"score: method {self.method!r} cannot have score {score!r}; 'full', and only "
                "'full', has neither a score nor propagate"
            )
        if self.score is None:
            self._check_decode_alone()
            self._check_nothing_else()
            return
        self._check_pair(self.score)
        check("window", self.window, least=self.score.min_window)
        check("sinks", self.sinks)
        self._check_skip_layers()
        self._check_decode(self.score)
        self._check_budget()

    def __hash__(self) -> int:
        """Of all fields, computed once: tables by retention are looked up in every step."""
        if "_hash" not in self.__dict__:
            self.__dict__["_hash"] = hash(tuple(getattr(self, f.name) for f in fields(self)))
        return int(self.__dict__["_hash"])

    def __getstate__(self) -> dict[str, Any]:
        """All but the hash: those of strings differ between processes."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def _check_nothing_else(self) -> None:
        """Without a score nothing of what a budget needs may be set."""
        for field in fields(self):
            if field.name in ("method", "score", "propagate", "decode"):
                continue
            value, usual = getattr(self, field.name), field.default
            if type(value) is not type(usual) or value != usual:
                raise ValueError(f"{field.name}: {self.method!r} takes no such setting")

    def _check_skip_layers(self) -> None:
        layers = self.skip_layers
        if type(layers) is not tuple:
            raise ValueError(f"skip_layers: must be a list of layers, not {shown(layers)}")
        for layer in layers:
            check("skip_layers", layer)
        if tuple(sorted(set(layers))) != layers:
            raise ValueError(f"skip_layers: must rise, each layer once: {shown(layers)}")

    def _check_pair(self, score: Score) -> None:
        """What a score asks of the shape and the window, and a profile's shape of the user."""
        if score.scope == "token" and self.shape.heads_differ:
            raise ValueError(
                f"shape: {self.shape.name!r} lets heads keep different tokens, but score "
                f"{score.name!r} has the same for all heads of a layer; take "
                f"{', '.join(sorted(MEANS))}"
            )
        fixed = score.fixed_window
        if fixed is not None and (type(self.window) is not int or self.window != fixed):
            raise ValueError(
                f"window: must be {fixed} for score {score.name!r}, not {shown(self.window)}"
            )
        if isinstance(self.shape, Profile) and self.shape.profile is None:
            raise ValueError(
                f"profile: {self.method!r} needs the path of a JSON file with measured scores of "
                "all query heads, {'layer-head': [scores]}, or 'auto': what calibration stored"
            )

    def _check_decode(self, score: Score) -> None:
        if self.decode is None:
            return
        if not isinstance(self.decode, DecodeStage):
            raise ValueError(f"decode: must be a DecodeStage, not {shown(self.decode)}")
        if score.at_decode is None:
            able = sorted(name for name, kind in SCORES.items() if kind.at_decode is not None)
            raise ValueError(
                f"decode: score {score.name!r} cannot compact rows; those that can: "
                f"{', '.join(able)}"
            )

    def _check_decode_alone(self) -> None:
        """What `decode` asks of a retention without a score."""
        if self.decode is None:
            return
        if self.propagate is None:
            raise ValueError(
                f"decode: {self.method!r} has no score, so nothing tells which tokens to drop"
            )
        if self.propagate.kind != "pyramidinfer":
            raise ValueError(
                f"decode: {self.method!r} has no score, so nothing tells which tokens to drop; of "
                "what only propagates, pyramidinfer alone says how rows go on while decoding"
            )
        if not isinstance(self.decode, TrimStage):
            raise ValueError(f"decode: must be a TrimStage, not {self.decode!r}")

    def _check_budget(self) -> None:
        if (self.budget is None) == (self.share is None):
            raise ValueError(
                f"budget: {self.method!r} needs one (and one only): tokens per layer and kv head, "
                "or a share of the prompt such as '25%'"
            )
        if self.share is not None and not BOUNDS["share"].accepts(self.share):
            raise ValueError(
                f"budget: a share must lie above 0% and up to 100%, not {shown(self.share)}"
            )
        if self.budget is not None:
            check("budget", self.budget)
            if self.budget < self._least_budget:
                raise ValueError(
                    f"budget: {self.budget} tokens are too few for the window ({self.window}), the "
                    f"sinks ({self.sinks}) and one more token; give at least {self._least_budget}, "
                    "or a smaller window"
                )

    @property
    def _least_budget(self) -> int:
        return self.window + self.sinks + 1

    @classmethod
    def parse(
        cls,
        spec: "str | Mapping[str, Any] | Retention | None" = None,
        budget: int | str | None = None,
    ) -> "Retention":
        """Read a retention setting as users write it.

        Args:
            spec: a name; or a mapping of settings with the name under `method`, such as
                {"method": "pyramidkv", "budget": "25%", "window": 16}; or a `Retention`; None
                means `full`. A name is a preset in `configs/retention/`, or `<score>-<shape>`;
                without a name the mapping gives `score` and, if not uniform, `shape`.
            budget: tokens, or a share such as "25%". Replaces that of a `Retention` or a preset; a
                mapping that has another is an error.

        Raises:
            ValueError: an unknown name or setting, or a value out of range; names the field.
        """
        if isinstance(spec, Retention):
            return spec if budget is None else cls.parse({**spec.to_dict(), "budget": budget})
        return cls(**spelling.read(spec, budget))

    def to_dict(self) -> dict[str, Any]:
        """Every setting that has an effect, as JSON values; `parse` reads it back."""
        return spelling.written(self._flat)

    @property
    def label(self) -> str:
        """Short name for reports: method@budget, and what departs from the preset or defaults."""
        return spelling.label(self._flat)

    @property
    def _flat(self) -> dict[str, Any]:
        """The settings that have an effect, as they are written, with the values of the fields."""
        if self.score is None:
            return {"method": self.method, "propagate": self.propagate, "decode": self.decode}
        return {
            "method": self.method,
            "score": self.score.name,
            "shape": self.shape.name,
            "budget": self.budget if self.share is None else spelling.share_text(self.share),
            "window": self.window,
            "sinks": self.sinks,
            "skip_layers": self.skip_layers,
            **spelling.settings_of(self.score),
            **spelling.settings_of(self.shape),
            "decode": self.decode,
            "propagate": self.propagate,
        }

    @property
    def profile(self) -> HeadProfile | None:
        """The measured heads that the shape goes by; None where it goes by none, or by `auto`."""
        return self.shape.measured if isinstance(self.shape, Profile) else None

    @property
    def needs_profile(self) -> bool:
        """Whether something of it stands for what was measured of a model (`auto`)."""
        of_shape = isinstance(self.shape, Profile) and self.shape.profile == AUTO
        return of_shape or (self.propagate is not None and self.propagate.layer == AUTO)

    @property
    def ragged(self) -> bool:
        """Whether how many tokens each head keeps is known only once they are selected."""
        return self.shape.ragged

    def num_window_queries(self, prompt_tokens: int) -> int:
        """Count the trailing queries that the score looks at; 0 where nothing is dropped."""
        if self.score is None or not self.drops(prompt_tokens):
            return 0
        window = min(self.window, prompt_tokens)
        return {"nothing": 0, "window": window, "all": prompt_tokens}[self.score.observes]

    def recent_tokens(self, kept_tokens: int) -> int:
        """Count the last tokens of the prompt that a row of so many keeps whatever their score."""
        if self.score is None:
            return kept_tokens
        return self.score.recent_tokens(self.window, self.sinks, kept_tokens)

    def drops(self, prompt_tokens: int) -> bool:
        """Whether the budget drops any token of such a prompt (propagation may drop more)."""
        return self.budget_tokens(prompt_tokens) < prompt_tokens

    def budget_tokens(self, prompt_tokens: int) -> int:
        """B for such a prompt: mean tokens kept per layer and kv head, at most the prompt's.

        With `propagate` it is an upper bound of the mean.
        """
        return min(self.budget_of(prompt_tokens), prompt_tokens)

    def budget_of(self, prompt_tokens: int) -> int:
        """B for such a prompt, also where the prompt is shorter than that."""
        if self.score is None:
            return prompt_tokens
        if self.budget is not None:
            return self.budget
        assert self.share is not None, "a valid setting has one of the two"
        rounded = math.floor(spelling.exact_share(self.share) * prompt_tokens + Fraction(1, 2))
        return max(rounded, self._least_budget)

    def layer_tokens(self, prompt_tokens: int, layers: Layers | int) -> tuple[int, ...]:
        """Count the prompt tokens that each layer keeps per kv head (the mean, where ragged).

        Not for shapes that have a budget for each head (`RowShape`): see `row_tokens`.

        Those of the L global layers sum to exactly `L * budget_tokens(prompt_tokens)`, and each is
        at least `window + sinks` and at most the prompt, or the whole prompt. With `propagate` each
        is at most what enters the layer: the smaller of the two, so the sum may be smaller. A local
        layer keeps the last tokens of the prompt, as many as its window has.

        Args:
            prompt_tokens: length of the prompt.
            layers: of the model; a number of them: all are global.

        Raises:
            ValueError: `skip_layers` or `propagate.layer` names no layer of the model, or a local
                one; `skip_layers` takes more than the budget; there is a budget, but no global
                layer, or `propagate`, and a local layer.
        """
        return _layer_tokens(self, prompt_tokens, Layers.of(layers))

    def entering_tokens(self, prompt_tokens: int, layers: Layers | int) -> tuple[int, ...]:
        """Count the tokens of such a prompt that prefill takes through each layer.

        Raises:
            ValueError: `propagate.layer` names no layer of the model, or the model has layers with
                a window: which tokens survive within it cannot be told from numbers of tokens.
        """
        layers = Layers.of(layers)
        if self.propagate is None:
            return (prompt_tokens,) * len(layers)
        if layers.local_layers:
            raise ValueError(
                f"propagate: {self.method!r} drops hidden states, which a model with "
                f"sliding-window attention does not allow ({len(layers.local_layers)} of its "
                f"{len(layers)} layers see a window of {layers.window} tokens); choose a retention "
                "that does not propagate, such as recommended-adaptive, snapkv or pyramidkv"
            )
        return self.propagate.survivors(prompt_tokens, len(layers))

    def row_tokens(self, prompt_tokens: int, layers: Layers | int, num_heads: int) -> np.ndarray:
        """Count the prompt tokens that each row keeps; the layer's mean where ragged.

        Those of the L global layers sum to exactly `L * num_heads * budget_tokens(prompt_tokens)`.

        Returns:
            int32 [layers, num_heads], read-only.

        Raises:
            ValueError: as `layer_tokens`; `profile` is of another model.
        """
        return _row_tokens(self, prompt_tokens, Layers.of(layers), num_heads)


@lru_cache(maxsize=8192)
def _layer_tokens(retention: Retention, prompt_tokens: int, layers: Layers) -> tuple[int, ...]:
    """`Retention.layer_tokens`, cached: scheduler and workers ask for the same prompts again."""
    most = _most_tokens(retention, prompt_tokens, layers)
    if retention.score is None:
        return most
    assert isinstance(retention.shape, LayerShape), f"shape {retention.shape.name!r} has rows"
    counts = over_layers(retention.shape, _budget(retention, prompt_tokens), layers)
    return tuple(map(min, counts, most))


@lru_cache(maxsize=8192)
def _row_tokens(
    retention: Retention, prompt_tokens: int, layers: Layers, num_heads: int
) -> np.ndarray:
    """`Retention.row_tokens`, cached as `_layer_tokens`."""
    if not isinstance(retention.shape, RowShape):
        kept = np.array(retention.layer_tokens(prompt_tokens, layers), dtype=np.int32)
        return np.broadcast_to(kept[:, None], (len(layers), num_heads))

    most = np.array(_most_tokens(retention, prompt_tokens, layers), dtype=np.int32)
    counts = over_rows(retention.shape, _budget(retention, prompt_tokens), layers, num_heads)
    rows = np.minimum(np.array(counts, dtype=np.int32), most[:, None])
    rows.setflags(write=False)
    return rows


def _most_tokens(retention: Retention, prompt_tokens: int, layers: Layers) -> tuple[int, ...]:
    """What enters each layer, and no more than a local layer's window."""
    entering = retention.entering_tokens(prompt_tokens, layers)
    pairs = zip(entering, layers.windows, strict=True)
    return tuple(min(tokens, window) if window else tokens for tokens, window in pairs)


def _budget(retention: Retention, prompt_tokens: int) -> Budget:
    return Budget(
        retention.budget_tokens(prompt_tokens),
        retention.window,
        retention.sinks,
        retention.skip_layers,
        prompt_tokens,
    )
