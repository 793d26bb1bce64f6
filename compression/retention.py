"""Retention: which score, spread over the layers in which shape, at which budget."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from saqqara.configs.schema import CONFIG_DIR, load_yaml

from .budgets import settle
from .decode_stage import DecodeStage
from .registry import SCORES, SHAPES, budget_shape, score_method, settings_of

PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True, slots=True)
class Retention:
    """What a sequence keeps of its prompt: a score, a budget shape, and their settings.

    A value: frozen, hashable, picklable, valid once made. Make one with `Retention.parse`. A field
    that the score and shape do not read has its default, so equal behaviour compares equal.

    The budget B is the mean number of prompt tokens kept per layer and kv head, window and sinks
    included: `budget` tokens, or the `share` of the prompt rounded to nearest (halves up), which is
    fixed by the original prompt and raised to `window + sinks + 1`. Over all L layers exactly
    L * B tokens per kv head are kept. A prompt of at most B tokens is kept whole.

    Attributes:
        method: name for reports and metrics: the preset's, or `<score>-<shape>`.
        score: name in `registry.SCORES`; None (method `full`) keeps everything.
        shape: name in `registry.SHAPES`.
        budget: B in tokens, at least `window + sinks + 1`; exactly one of `budget` and `share`.
        share: B as a part of the prompt, in (0, 1]; written "25%".
        window: last tokens of the prompt, kept in every layer by every score; where the score
            looks at queries, they are these tokens' queries.
        sinks: first tokens of the prompt, kept in every layer by every score.
        skip_layers: layers that keep the whole prompt; the others' budgets shrink to make up.
        kernel_size: tokens that the score is pooled over, odd (snapkv).
        pooling: "max" or "avg" (snapkv).
        beta: steepness, at least 1: the top layer keeps the beta-th part of the mean (pyramid).
        seed: of the noise, a 64-bit integer from 0 (random).
        decode: compact rows while decoding (`decode_stage.py`); None: they grow without bound.

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
    decode: DecodeStage | None = None

    def __post_init__(self) -> None:
        if (self.score is None) != (self.method == "full"):
            raise ValueError(
                f"score: method {self.method!r} cannot have score {self.score!r}; 'full', and only "
                "'full', has none"
            )
        self._check_unread()
        if self.score is not None:
            self._check_values(self.score)

    def _check_unread(self) -> None:
        if self.score is None and self.decode is not None:
            raise ValueError("decode: 'full' keeps every token, so there is nothing to compact")
        read = {"method", "score"}
        if self.score is not None:
            read |= {"shape", "share", *settings_of(self.score, self.shape)}
        for field in fields(self):
            if field.name not in read and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}: {self.method!r} takes no such setting")

    def _check_values(self, score: str) -> None:
        _check_integer("window", self.window, least=score_method(score).min_window)
        _check_integer("sinks", self.sinks, least=0)
        _check_integer("seed", self.seed, least=0)
        _check_integer("kernel_size", self.kernel_size, least=1)
        if self.seed >= 2**64:
            raise ValueError(f"seed: must be below 2**64, not {self.seed}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: must be odd, not {self.kernel_size}")
        if self.pooling not in ("max", "avg"):
            raise ValueError(f"pooling: must be 'max' or 'avg', not {self.pooling!r}")
        if type(self.beta) not in (int, float) or not 1 <= self.beta < math.inf:
            raise ValueError(f"beta: must be a number from 1 up, not {self.beta!r}")
        if type(self.skip_layers) is not tuple:
            raise ValueError(f"skip_layers: must be a list of layers, not {self.skip_layers!r}")
        for layer in self.skip_layers:
            _check_integer("skip_layers", layer, least=0)
        if tuple(sorted(set(self.skip_layers))) != self.skip_layers:
            raise ValueError(f"skip_layers: must rise, each layer once: {self.skip_layers}")
        self._check_decode(score)
        self._check_budget()

    def _check_decode(self, score: str) -> None:
        if self.decode is None:
            return
        if not isinstance(self.decode, DecodeStage):
            raise ValueError(f"decode: must be a DecodeStage, not {self.decode!r}")
        if score_method(score).at_decode is None:
            able = sorted(name for name, method in SCORES.items() if method.at_decode is not None)
            raise ValueError(
                f"decode: score {score!r} cannot compact rows; those that can: {', '.join(able)}"
            )

    def _check_budget(self) -> None:
        if (self.budget is None) == (self.share is None):
            raise ValueError(
                f"budget: {self.method!r} needs one (and one only): tokens per layer and kv head, "
                "or a share of the prompt such as '25%'"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"budget: a share must lie above 0% and up to 100%, not {self.share}")
        if self.budget is not None:
            _check_integer("budget", self.budget, least=1)
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
                f"{type(spec).__name__} {spec!r}"
            )
        if given.get("budget") is None:
            given.pop("budget", None)
        if budget is not None and given.setdefault("budget", budget) != budget:
            raise ValueError(f"budget: given twice, as {given['budget']!r} and as {budget!r}")
        return cls._from_settings(given)

    @classmethod
    def _from_settings(cls, given: dict[str, Any]) -> "Retention":
        given |= {"decode": DecodeStage.parse(given.pop("decode", None))}
        if given["decode"] is None:
            del given["decode"]
        method = given.pop("method", None)
        if method is None and given.get("score") is None:
            raise ValueError(f"method: missing; known: {_known_names()}")
        preset = {} if method is None else _named_settings(method)
        if method is not None and preset["score"] is None:
            if "decode" in given:
                return cls(decode=given["decode"])  # which says what is wrong with it
            if given:
                raise ValueError(f"{next(iter(given))}: {method!r} keeps all and takes no settings")
            return cls()

        own = preset.get("score"), preset.get("shape", "uniform")
        score, shape = given.pop("score", own[0]), given.pop("shape", own[1])
        allowed = settings_of(score, shape)
        inherited = {name: preset[name] for name in preset if name not in ("score", "shape")}
        if (score, shape) != own:
            # The name no longer says what is done, and some of its settings may not be read.
            method = f"{score}-{shape}"
            inherited = {name: inherited[name] for name in inherited if name in allowed}
        settings = inherited | given
        for name in settings:
            if name not in allowed:
                raise ValueError(
                    f"{name}: not a setting of score {score!r} with shape {shape!r}; allowed: "
                    f"{', '.join(('method', 'score', 'shape', *allowed))}"
                )
        if "budget" in settings:
            settings |= _read_budget(settings["budget"])
        if "decode" in inherited and "decode" not in given:
            settings["decode"] = DecodeStage.parse(inherited["decode"])
        if isinstance(settings.get("skip_layers"), list):
            settings["skip_layers"] = tuple(settings["skip_layers"])
        return cls(method=method, score=score, shape=shape, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Every setting that has an effect, as JSON values; `parse` reads it back."""
        if self.score is None:
            return {"method": self.method}
        settings = {name: getattr(self, name) for name in settings_of(self.score, self.shape)}
        settings["budget"] = self._budget_text if self.budget is None else self.budget
        settings["skip_layers"] = list(self.skip_layers)
        if self.decode is None:
            del settings["decode"]
        else:
            settings["decode"] = self.decode.to_dict()
        return {"method": self.method, "score": self.score, "shape": self.shape, **settings}

    @property
    def label(self) -> str:
        """Short name for reports: method@budget, and what departs from the fields' defaults."""
        if self.score is None:
            return self.method
        settings = self.to_dict()
        if self.decode is not None:
            settings["decode"] = self.decode.slack_pages
        changed = [
            f",{field.name}={settings[field.name]}"
            for field in fields(self)
            if field.name in settings_of(self.score, self.shape)
            and field.name != "budget"
            and getattr(self, field.name) != field.default
        ]
        return f"{self.method}@{self._budget_text}{''.join(changed)}".replace(" ", "")

    @property
    def _budget_text(self) -> str:
        if self.share is None:
            return str(self.budget)
        return f"{(Decimal(str(self.share)) * 100).normalize():f}%"

    @property
    def ragged(self) -> bool:
        """Whether the heads of one layer may keep different numbers of tokens."""
        return budget_shape(self.shape).ragged

    def num_window_queries(self, prompt_tokens: int) -> int:
        """Count the trailing queries that the score looks at; 0 where nothing is dropped."""
        if self.score is None or not self.drops(prompt_tokens):
            return 0
        return score_method(self.score).num_window_queries(self, prompt_tokens)

    def drops(self, prompt_tokens: int) -> bool:
        """Whether any token of such a prompt is dropped."""
        return self.budget_tokens(prompt_tokens) < prompt_tokens

    def budget_tokens(self, prompt_tokens: int) -> int:
        """B for such a prompt: mean tokens kept per layer and kv head, at most the prompt's."""
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

        They sum to exactly `num_layers * budget_tokens(prompt_tokens)`, and each is at least
        `window + sinks` and at most the prompt, or the whole prompt.

        Raises:
            ValueError: `skip_layers` names no layer of the model, or takes more than the budget.
        """
        return _layer_tokens(self, prompt_tokens, num_layers)

    def row_tokens(self, prompt_tokens: int, num_layers: int, num_heads: int) -> np.ndarray:
        """Count the prompt tokens that each row keeps; expected values where ragged.

        Returns:
            int32 [num_layers, num_heads], read-only.

        Raises:
            ValueError: as `layer_tokens`.
        """
        return _row_tokens(self, prompt_tokens, num_layers, num_heads)


@lru_cache(maxsize=8192)
def _layer_tokens(retention: Retention, prompt_tokens: int, num_layers: int) -> tuple[int, ...]:
    skipped = retention.skip_layers
    if skipped and skipped[-1] >= num_layers:
        raise ValueError(
            f"skip_layers: {skipped[-1]} is no layer of this model, which has layers 0 to "
            f"{num_layers - 1}"
        )
    budget = retention.budget_tokens(prompt_tokens)
    if budget == prompt_tokens:
        return (prompt_tokens,) * num_layers

    layers = [layer for layer in range(num_layers) if layer not in skipped]
    total = num_layers * budget - len(skipped) * prompt_tokens
    floor = retention.window + retention.sinks
    if not layers or total < len(layers) * floor:
        least = math.ceil((len(skipped) * prompt_tokens + len(layers) * floor) / num_layers)
        raise ValueError(
            f"skip_layers: {len(skipped)} of {num_layers} layers keep all {prompt_tokens} tokens, "
            f"which with the window and sinks of the others is more than budget {budget} allows; "
            f"it takes a budget of at least {least}"
        )
    shape = budget_shape(retention.shape).function
    targets = shape(retention, Fraction(total, len(layers)), prompt_tokens, len(layers))
    counts = [prompt_tokens] * num_layers
    for layer, count in zip(layers, settle(targets, total, floor, prompt_tokens), strict=True):
        counts[layer] = count
    return tuple(counts)


@lru_cache(maxsize=8192)
def _row_tokens(
    retention: Retention, prompt_tokens: int, num_layers: int, num_heads: int
) -> np.ndarray:
    layers = np.array(_layer_tokens(retention, prompt_tokens, num_layers), dtype=np.int32)
    return np.broadcast_to(layers[:, None], (num_layers, num_heads))


@lru_cache(maxsize=1)
def _presets() -> dict[str, dict[str, Any]]:
    """The settings in `configs/retention/`, by file name without its ending."""
    files = sorted((CONFIG_DIR / "retention").glob("*.yaml"))
    return {file.stem: load_yaml(file) for file in files}


def _named_settings(name: object) -> dict[str, Any]:
    """The settings of a preset or of a `<score>-<shape>` name."""
    if isinstance(name, str) and name in _presets():
        settings = _presets()[name]
        if "score" not in settings:
            raise ValueError(f"score: missing in configs/retention/{name}.yaml")
        return settings
    if isinstance(name, str):
        score, _, shape = name.partition("-")
        if score in SCORES and shape in SHAPES:
            return {"score": score, "shape": shape}
    raise ValueError(f"method: unknown {name!r}; known: {_known_names()}")


def _known_names() -> str:
    return (
        f"{', '.join(_presets())}, or <score>-<shape> of scores {', '.join(sorted(SCORES))} and "
        f"shapes {', '.join(sorted(SHAPES))}"
    )


def _read_budget(value: object) -> dict[str, int | float | None]:
    """The `budget` or `share` that a user's budget means."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"budget": value}
    if isinstance(value, str):
        text = value.strip()
        if text.isdecimal():
            return {"budget": int(text)}
        if match := PERCENTAGE.fullmatch(text):
            return {"budget": None, "share": float(Decimal(match[1]) / 100)}
    raise ValueError(f"budget: must be tokens or a share such as '25%', not {value!r}")


def _check_integer(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: must be an integer of at least {least}, not {value!r}")
