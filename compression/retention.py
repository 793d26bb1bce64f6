"""Retention: which score, spread over the layers in which shape, at which budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from saqqara.configs.shown import shown

from .bounds import BOUNDS, check
from .budgets import MEANS
from .decode_stage import DecodeStage, Stage
from .head_profile import HeadProfile
from .propagate import Propagate
from .registry import SCORES, budget_shape, score_method, settings_of
from .retention_settings import presets, read_settings
from .rows import layer_tokens, row_tokens
from .trim import TrimStage


@dataclass(frozen=True, slots=True)
class Retention:
    """What a sequence keeps of its prompt: a score, a budget shape, and their settings.

    A value: frozen, hashable, picklable, valid once made. Make one with `Retention.parse`. A field
    that the score and shape do not read has its default, so equal behaviour compares equal.

    The budget B is the mean number of prompt tokens kept per layer and kv head, window and sinks
    included: `budget` tokens, or the `share` of the prompt rounded to nearest (halves up), which is
    fixed by the original prompt and raised to `window + sinks + 1`. Over all L layers exactly
    L * B tokens per kv head are kept. A prompt of at most B tokens is kept whole.

    With `propagate` only some tokens enter the upper layers (`Propagate.survivors`). Without a
    score a layer keeps what entered it. With a score it keeps the smaller of what entered it and
    what the budget, spread over the layers as if all entered, gives it: less than L * B in all
    where fewer enter a layer than its budget.

    Attributes:
        method: name for reports and metrics: the preset's, or `<score>-<shape>`, or
            `<score>-adaptive-<mean>`.
        score: name in `registry.SCORES`; None keeps everything (method `full`, or with
            `propagate` all that enters a layer).
        shape: name in `registry.SHAPES`.
        budget: B in tokens, at least `window + sinks + 1`; exactly one of `budget` and `share`.
        share: B as a part of the prompt, in (0, 1]; written "25%".
        window: last tokens of the prompt, kept in every layer by every score; where the score
            looks at queries, they are these tokens' queries.
        sinks: first tokens of the prompt, kept in every layer by every score.
        skip_layers: layers that keep the whole prompt; the others' budgets shrink to make up.
        kernel_size: tokens that the score is pooled over, odd (snapkv).
        pooling: "max" or "avg" (snapkv).
        beta: steepness, at least 1: the top layer keeps the beta-th part of the mean (pyramid,
            cosine).
        seed: of the noise, a 64-bit integer from 0 (random).
        recent_ratio: part of a row's tokens that are the prompt's last, from 0 to 1 (h2o).
        mean: shape that gives each layer its mean: uniform, pyramid or cosine (adaptive).
        floor_ratio: part of the budget besides the window that no head shares, from 0 to 1
            (adaptive).
        profile: measured scores of the model's heads; written as the path of a JSON file, or its
            content, see `HeadProfile.read` (profile).
        head_beta: at least 1: all but the head_beta-th part of the budget besides the window is
            divided equally (profile).
        propagate: which hidden states go on to the next layer; None: all.
        decode: compact rows while decoding (`decode_stage.py`), or, for pyramidinfer without a
            score, trim them (`trim.py`); None: they grow by every token.

    Raises:
        ValueError: a field is out of range, missing, or not read by the score and shape.
    """

    method: str = "full"
    score: str | None = None
    shape: str = "uniform"
    budget: int | None = None
    share: float | None = None
    window: int = 32
    sinks: int = 4
    skip_layers: tuple[int, ...] = ()
    kernel_size: int = 7
    pooling: str = "max"
    beta: float = 20.0
    seed: int = 0
    recent_ratio: float = 0.5
    mean: str = "uniform"
    floor_ratio: float = 0.2
    profile: HeadProfile | None = None
    head_beta: float = 1.01
    propagate: Propagate | None = None
    decode: Stage | None = None

    def __post_init__(self) -> None:
        if (self.score is None and self.propagate is None) != (self.method == "full"):
            raise ValueError(
                f"score: method {self.method!r} cannot have score {self.score!r}; 'full', and only "
                "'full', has neither a score nor propagate"
            )
        self._check_unread()
        if self.score is not None:
            self._check_values(self.score)

    def _check_unread(self) -> None:
        if self.score is None and self.decode is not None:
            self._check_trims()
        read = {"method", "score", "propagate", "decode"}
        if self.score is not None:
            read |= {"shape", "share", *self._settings}
        for field in fields(self):
            if field.name not in read and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}: {self.method!r} takes no such setting")

    def _check_values(self, score: str) -> None:
        self._check_pair(score)
        check("window", self.window, least=score_method(score).min_window)
        for name in ("sinks", "seed", "kernel_size", "beta", "head_beta", "recent_ratio"):
            check(name, getattr(self, name))
        check("floor_ratio", self.floor_ratio)
        if self.pooling not in ("max", "avg"):
            raise ValueError(f"pooling: must be 'max' or 'avg', not {shown(self.pooling)}")
        if type(self.skip_layers) is not tuple:
            raise ValueError(
                f"skip_layers: must be a list of layers, not {shown(self.skip_layers)}"
            )
        for layer in self.skip_layers:
            check("skip_layers", layer)
        if tuple(sorted(set(self.skip_layers))) != self.skip_layers:
            raise ValueError(f"skip_layers: must rise, each layer once: {shown(self.skip_layers)}")
        self._check_decode(score)
        self._check_budget()

    def _check_pair(self, score: str) -> None:
        """What a score asks of the shape and the window, and `profile` of the user."""
        method, shape = score_method(score), budget_shape(self.shape)
        if method.scope == "token" and shape.heads_differ:
            raise ValueError(
                f"shape: {self.shape!r} lets heads keep different tokens, but score {score!r} has "
                f"the same for all heads of a layer; take {', '.join(sorted(MEANS))}"
            )
        fixed = method.fixed_window
        if fixed is not None and (type(self.window) is not int or self.window != fixed):
            raise ValueError(
                f"window: must be {fixed} for score {score!r}, not {shown(self.window)}"
            )
        if self.shape == "profile" and not isinstance(self.profile, HeadProfile):
            raise ValueError(
                f"profile: {self.method!r} needs the path of a JSON file with measured scores of "
                "the model's query heads, {'layer-head': [scores]}"
            )

    def _check_decode(self, score: str) -> None:
        if self.decode is None:
            return
        if not isinstance(self.decode, DecodeStage):
            raise ValueError(f"decode: must be a DecodeStage, not {shown(self.decode)}")
        if score_method(score).at_decode is None:
            able = sorted(name for name, method in SCORES.items() if method.at_decode is not None)
            raise ValueError(
                f"decode: score {score!r} cannot compact rows; those that can: {', '.join(able)}"
            )

    def _check_trims(self) -> None:
        """What `decode` asks of a retention without a score."""
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
        if spec is None or isinstance(spec, str):
            given: dict[str, Any] = {"method": "full" if spec is None else spec}
        elif isinstance(spec, Mapping):
            given = dict(spec)
        else:
            raise ValueError(
                "retention: must be a name or a mapping of settings, not "
                f"{type(spec).__name__} {shown(spec)}"
            )
        if given.get("budget") is None:
            given.pop("budget", None)
        if budget is not None and given.setdefault("budget", budget) != budget:
            raise ValueError(
                f"budget: given twice, as {shown(given['budget'])} and as {shown(budget)}"
            )
        return cls(**read_settings(given))

    def to_dict(self) -> dict[str, Any]:
        """Every setting that has an effect, as JSON values; `parse` reads it back."""
        propagate = {} if self.propagate is None else {"propagate": self.propagate.to_dict()}
        decode = {} if self.decode is None else {"decode": self.decode.to_dict()}
        if self.score is None:
            return {"method": self.method, **propagate, **decode}
        settings = {name: getattr(self, name) for name in self._settings}
        settings["budget"] = self._budget_text if self.budget is None else self.budget
        settings["skip_layers"] = list(self.skip_layers)
        if self.profile is not None:
            settings["profile"] = self.profile.to_dict()
        del settings["decode"]
        names = {"method": self.method, "score": self.score, "shape": self.shape}
        return {**names, **settings, **decode, **propagate}

    @property
    def label(self) -> str:
        """Short name for reports: method@budget, and what departs from the preset or defaults."""
        if self.score is None:
            stage = "" if self.decode is None else f",decode={self.decode.label}"
            return f"{self.method}{self._propagate_text}{stage}"
        settings = self.to_dict()
        preset = presets().get(self.method, {})
        usual = {k: tuple(v) if isinstance(v, list) else v for k, v in preset.items()}
        if "profile" in usual:
            usual["profile"] = HeadProfile.read(usual["profile"])
        named = {"budget", "mean"}
        if score_method(self.score).fixed_window is not None:
            named.add("window")
        if self.profile is not None:
            settings["profile"] = self.profile.digest
        if self.decode is not None:
            settings["decode"] = self.decode.label
        changed = [
            f",{field.name}={settings[field.name]}"
            for field in fields(self)
            if field.name in self._settings
            and field.name not in named
            and getattr(self, field.name) != usual.get(field.name, field.default)
        ]
        label = f"{self.method}@{self._budget_text}{''.join(changed)}".replace(" ", "")
        return f"{label}{self._propagate_text}"

    @property
    def _propagate_text(self) -> str:
        """How `propagate` departs from the preset's or, where the preset has none, what it is."""
        if self.propagate is None:
            return ""
        own = presets().get(self.method or "", {}).get("propagate")
        usual = None if own is None else Propagate.parse(own)
        departures = self.propagate.departures(usual)
        named = self.score is None or (usual is not None and not departures)
        return departures if named else f"+{self.propagate.kind}{departures}"

    @property
    def _settings(self) -> tuple[str, ...]:
        return settings_of(self.score, self.shape, self.mean)

    @property
    def _budget_text(self) -> str:
        if self.share is None:
            return str(self.budget)
        return f"{(Decimal(str(self.share)) * 100).normalize():f}%"

    @property
    def ragged(self) -> bool:
        """Whether how many tokens each head keeps is known only once they are selected."""
        return budget_shape(self.shape).ragged

    def num_window_queries(self, prompt_tokens: int) -> int:
        """Count the trailing queries that the score looks at; 0 where nothing is dropped."""
        if self.score is None or not self.drops(prompt_tokens):
            return 0
        return score_method(self.score).num_window_queries(self, prompt_tokens)

    def recent_tokens(self, kept_tokens: int) -> int:
        """Count the last tokens of the prompt that a row of so many keeps whatever their score."""
        if self.score is None:
            return kept_tokens
        return score_method(self.score).recent_tokens(self, kept_tokens)

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
        exact = Fraction(str(self.share)) * prompt_tokens
        rounded = math.floor(exact + Fraction(1, 2))
        return max(rounded, self._least_budget)

    def layer_tokens(self, prompt_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Count the prompt tokens that each layer keeps per kv head (the mean, where ragged).

        Not for shape `profile`, which has a budget for each head: see `row_tokens`.

        They sum to exactly `num_layers * budget_tokens(prompt_tokens)`, and each is at least
        `window + sinks` and at most the prompt, or the whole prompt. With `propagate` each is at
        most what enters the layer: the smaller of the two, so the sum may be smaller.

        Raises:
            ValueError: `skip_layers` or `propagate.layer` names no layer of the model, or
                `skip_layers` takes more than the budget.
        """
        return layer_tokens(self, prompt_tokens, num_layers)

    def entering_tokens(self, prompt_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Count the tokens of such a prompt that prefill takes through each layer.

        Raises:
            ValueError: `propagate.layer` names no layer of the model.
        """
        if self.propagate is None:
            return (prompt_tokens,) * num_layers
        return self.propagate.survivors(prompt_tokens, num_layers)

    def row_tokens(self, prompt_tokens: int, num_layers: int, num_heads: int) -> np.ndarray:
        """Count the prompt tokens that each row keeps; the layer's mean where ragged.

        They sum to exactly `num_layers * num_heads * budget_tokens(prompt_tokens)`.

        Returns:
            int32 [num_layers, num_heads], read-only.

        Raises:
            ValueError: as `layer_tokens`; `profile` is of another model.
        """
        return row_tokens(self, prompt_tokens, num_layers, num_heads)
