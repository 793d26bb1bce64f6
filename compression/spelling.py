"""Retention settings as people write them: presets, composed names, YAML, mappings and labels.

A setting is written flat: a mapping with the names of a score and a shape under `score` and `shape`
and, beside them, the settings of both. Here it is read, written and named.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from saqqara.configs.names import closest
from saqqara.configs.shown import budget_mistake, shown
from saqqara.configs.yaml_files import CONFIG_DIR, load_yaml

from .decode import DecodeStage, TrimStage, parse_decode_stage
from .profiles.head_profile import AUTO, HeadProfile
from .propagate import KINDS, Propagate, in_label
from .scores import SCORES, Score, score_kind
from .shapes import MEANS, SHAPES, Adaptive, Shape, mean_kind, shape_kind

Flat = dict[str, Any]

MAX_BUDGET_CHARS = 100
PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?)\s*%")

COMMON: Flat = {"budget": None, "window": 32, "sinks": 4, "skip_layers": (), "decode": None}
"""The settings that every budgeted method takes, with their defaults, in the order of reports."""

IN_LABELS = (
    *("window", "sinks", "skip_layers", "kernel_size", "pooling", "beta", "seed"),
    *("recent_ratio", "floor_ratio", "profile", "head_beta", "decode"),
)
"""The settings that a label tells where they depart, in its order; results are kept by labels."""

_PARTS: list[type[Score] | type[Shape]] = [*SCORES.values(), *SHAPES.values()]
_DEFAULTS: dict[type[Score] | type[Shape], Flat] = {
    part: {field.name: field.default for field in fields(part)} for part in _PARTS
}


@lru_cache(maxsize=1)
def presets() -> dict[str, Flat]:
    """The settings in `configs/retention/`, by file name without its ending."""
    files = sorted((CONFIG_DIR / "retention").glob("*.yaml"))
    return {file.stem: load_yaml(file) for file in files}


class Kinds(NamedTuple):
    """Names of a score, a shape, and the shape that gives layers their means within `adaptive`."""

    score: str
    shape: str = "uniform"
    mean: str = "uniform"

    @property
    def method(self) -> str:
        """The composed name, which `_named_settings` reads."""
        return "-".join(self[:2] if self.mean == "uniform" else self)

    @property
    def fixed(self) -> Flat:
        """The window, where the score allows only one."""
        window = score_kind(self.score).fixed_window
        return {} if window is None else {"window": window}

    @property
    def defaults(self) -> Flat:
        """The settings that these take, in the order of reports, with their defaults.

        Raises:
            ValueError: an unknown name.
        """
        score, shape = score_kind(self.score), shape_kind(self.shape)
        settings = COMMON | self.fixed | _DEFAULTS[score] | _DEFAULTS[shape]
        if shape is Adaptive:
            settings |= {"mean": "uniform", **_DEFAULTS[mean_kind(self.mean)]}
        return settings

    def build(self, settings: Flat) -> tuple[Score, Shape]:
        """The score and the shape, with those of the settings that are theirs."""
        score, shape = score_kind(self.score), shape_kind(self.shape)
        if shape is Adaptive:
            mean = mean_kind(self.mean)
            settings = settings | {"mean": mean(**_picked(settings, _DEFAULTS[mean]))}
        own = _picked(settings, _DEFAULTS[score]), _picked(settings, _DEFAULTS[shape])
        return score(**own[0]), shape(**own[1])


def settings_of(part: Score | Shape) -> Flat:
    """The settings of a score or a shape, in the order of reports."""
    settings = {field.name: getattr(part, field.name) for field in fields(part)}
    if isinstance(part, Adaptive):
        settings |= {"mean": part.mean.name, **settings_of(part.mean)}
    return settings


def read(spec: object, budget: int | str | None = None) -> Flat:
    """The fields of the `Retention` that a setting means, as `Retention.parse` takes it.

    Raises:
        ValueError: an unknown name or setting, or a value out of range; names the field.
    """
    given = _mapping(spec, budget)
    method = given.pop("method", None)
    if method is None and given.get("score") is None and given.get("propagate") is None:
        raise ValueError(f"method: missing; known: {_known_names()}")
    preset = {"score": None} if method is None else _named_settings(method)
    if method == "full":
        return _without_anything(given)
    propagate, is_own = _read_propagate(preset, given)
    method = method if is_own else None
    if preset["score"] is None and given.get("score") is None:
        return _without_score(method, propagate, given)
    return {"propagate": propagate} | _with_score(method, preset, given)


def _mapping(spec: object, budget: int | str | None) -> Flat:
    """A setting as a mapping, with the budget that stands beside it."""
    if spec is None or isinstance(spec, str):
        given: Flat = {"method": "full" if spec is None else spec}
    elif isinstance(spec, Mapping):
        given = dict(spec)
    else:
        raise ValueError(
            "retention: must be a name or a mapping of settings, not "
            f"{type(spec).__name__} {shown(spec)}"
        )
    if given.get("budget") is None:
        given.pop("budget", None)
    written = given.setdefault("budget", budget) if budget is not None else None
    if written is not budget and written != budget:
        raise ValueError(f"budget: given twice, as {shown(given['budget'])} and as {shown(budget)}")
    return given


def _without_anything(given: Flat) -> Flat:
    """Fields of `full`, which takes no settings."""
    decode = given.pop("decode", None)
    if decode is not None and decode is not False:
        return {"decode": DecodeStage()}  # `Retention` says what is wrong with it
    if given:
        name = f"{next(iter(given))!s:.80}"
        raise ValueError(
            f"{name}: 'full' keeps everything and takes no settings; choose a "
            "method beside it, such as recommended-adaptive (`saqqara methods` lists them)"
        )
    return {}


def _without_score(method: str | None, propagate: Propagate | None, given: Flat) -> Flat:
    """Fields of what only propagates; its settings may stand beside `method`."""
    if propagate is None:
        raise ValueError("propagate: without it and a score all is kept: use method 'full'")
    decode = given.pop("decode", None)
    given = {name: value for name, value in given.items() if name != "score"}
    method = propagate.kind if method is None else method
    if "budget" in given:
        raise ValueError(
            f"budget: {method!r} keeps what enters each layer and takes none; a score (such as "
            "'snapkv') beside it does"
        )
    propagate = Propagate.parse(given, propagate)
    stage = parse_decode_stage(decode, has_score=False)
    return {"method": method, "propagate": propagate, "decode": stage}


def _with_score(method: str | None, preset: Flat, given: Flat) -> Flat:
    """Fields but `propagate` of what has a score: the preset's, and those given instead of them."""
    kinds, is_own = _chosen_kinds(preset, given)
    defaults = kinds.defaults
    inherited = {k: v for k, v in preset.items() if k not in ("score", "shape", "propagate")}
    if method is None or not is_own:
        # The name no longer says what is done, and some of its settings may not be read.
        method, inherited = kinds.method, _picked(inherited, defaults)
    settings = inherited | kinds.fixed | given
    for name in settings:
        if name not in defaults:
            raise ValueError(
                f"{name!s:.80}: not a setting of score {kinds.score!r} with shape {kinds.shape!r}; "
                f"allowed: {', '.join(('method', 'score', 'shape', *defaults, 'propagate'))}"
            )
    values = _read_values(settings)
    score, shape = kinds.build(values)
    common = _picked(values, (*COMMON, "share"))
    return {"method": method, "score": score, "shape": shape} | common


def _chosen_kinds(preset: Flat, given: Flat) -> tuple[Kinds, bool]:
    """The score and shapes that are meant, taken out of `given`; whether they are the preset's."""
    own = preset["score"], preset.get("shape", "uniform"), preset.get("mean", "uniform")
    score, shape = given.pop("score", own[0]), given.pop("shape", own[1])
    mean: Any = given.get("mean", own[2]) if shape == Adaptive.name else "uniform"
    kinds = Kinds(score, shape, mean)
    return kinds, kinds == own


def _read_values(settings: Flat) -> Flat:
    """Values as `Retention`, its score and its shape hold them."""
    values = dict(settings)
    if "budget" in values:
        values |= _read_budget(values["budget"])
    profile = values.get("profile")
    if not (profile is None or profile == AUTO or isinstance(profile, HeadProfile)):
        values["profile"] = HeadProfile.read(profile)
    if "decode" in values:
        values["decode"] = parse_decode_stage(values["decode"], has_score=True)
    if isinstance(values.get("skip_layers"), list):
        values["skip_layers"] = tuple(values["skip_layers"])
    return values


def _picked(settings: Flat, names: Iterable[str]) -> Flat:
    """The settings of these names, those that there are."""
    return {name: settings[name] for name in names if name in settings}


def _named_settings(name: object) -> Flat:
    """The settings of a preset or of a `<score>-<shape>` name."""
    if isinstance(name, str) and name in presets():
        settings = presets()[name]
        if "score" not in settings:
            raise ValueError(f"score: missing in configs/retention/{name}.yaml")
        return settings
    if isinstance(name, str) and name in KINDS:
        return {"score": None, "propagate": {"kind": name}}
    if isinstance(name, str):
        score, _, shape = name.partition("-")
        shape, _, mean = shape.partition("-")
        if score in SCORES and shape in SHAPES and not mean:
            return {"score": score, "shape": shape}
        if score in SCORES and shape == "adaptive" and mean in MEANS:
            return {"score": score, "shape": shape, "mean": mean}
    close = closest(name, _all_names()) if isinstance(name, str) else None
    hint = f"did you mean {close!r}?" if close else f"known: {_known_names()}"
    raise ValueError(f"method: unknown {shown(name)}; {hint}")


def _all_names() -> set[str]:
    """Every name that there is, composed ones included."""
    found = {Kinds(score, shape) for score in SCORES for shape in SHAPES}
    found |= {Kinds(score, "adaptive", mean) for score in SCORES for mean in MEANS}
    return {*presets(), *KINDS, *(kinds.method for kinds in found)}


def _known_names() -> str:
    return (
        f"{', '.join(sorted({*presets(), *KINDS}))}, or <score>-<shape> of scores "
        f"{', '.join(sorted(SCORES))} and shapes {', '.join(sorted(SHAPES))} "
        f"(adaptive also -<mean>: {', '.join(sorted(MEANS))})"
    )


def _read_propagate(preset: Flat, given: Flat) -> tuple[Propagate | None, bool]:
    """The stage that a preset and the settings beside it mean, taken out of `given`.

    The second value says whether the preset's name may stay: not if another kind replaces its own.
    """
    own = preset.get("propagate")
    base = None if own is None else Propagate.parse(own)
    if "propagate" not in given:
        return base, True
    spec = given.pop("propagate")
    propagate = None if spec is None else Propagate.parse(spec, base)
    return propagate, base is None or (propagate is not None and propagate.kind == base.kind)


def _read_budget(value: object) -> Flat:
    """The `budget` or `share` that a user's budget means."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"budget": value}
    if isinstance(value, str) and len(value) <= MAX_BUDGET_CHARS:
        text = value.strip()
        if text.isdecimal():
            return {"budget": int(text)}
        if match := PERCENTAGE.fullmatch(text):
            return {"budget": None, "share": float(Decimal(match[1]) / 100)}
    raise ValueError(budget_mistake(value))


def share_text(share: float) -> str:
    """A share of the prompt as users write it: "25%"."""
    return f"{(Decimal(str(share)) * 100).normalize():f}%"


@lru_cache(maxsize=1024)
def exact_share(share: float) -> Fraction:
    """The decimal number that a share was written as; cached, as every layer asks for it."""
    return Fraction(str(share))


def written(flat: Flat) -> Flat:
    """Settings as JSON values, without those that are None; `read` reads them back."""
    return {name: _json(value) for name, value in flat.items() if value is not None}


def _json(value: Any) -> Any:
    if isinstance(value, DecodeStage | TrimStage | Propagate | HeadProfile):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def label(flat: Flat) -> str:
    """Short name of settings for reports: method@budget, and what departs from the usual."""
    method, decode = flat["method"], flat["decode"]
    if "score" not in flat:
        stage = "" if decode is None else f",decode={decode.label}"
        return f"{method}{_propagate_label(flat)}{stage}"
    changed = "".join(f",{name}={_in_label(value)}" for name, value in _departures(flat))
    return f"{method}@{flat['budget']}{changed}".replace(" ", "") + _propagate_label(flat)


def _departures(flat: Flat) -> Iterator[tuple[str, Any]]:
    """The settings that are not the preset's or, where it has none, the defaults."""
    kinds = Kinds(flat["score"], flat["shape"], flat.get("mean", "uniform"))
    usual: Flat = kinds.defaults | _read_values(presets().get(flat["method"], {}))
    if usual.get("profile") == AUTO and _of_model(flat) is not None:
        usual["profile"] = flat["profile"]
    return ((name, flat[name]) for name in IN_LABELS if name in flat and flat[name] != usual[name])


def _of_model(flat: Flat) -> HeadProfile | None:
    """The profile that an engine found for its model."""
    profile = flat.get("profile")
    return profile if isinstance(profile, HeadProfile) and profile.of_model else None


def _in_label(value: Any) -> Any:
    if isinstance(value, HeadProfile):
        return value.digest
    if isinstance(value, DecodeStage):
        return value.label
    return list(value) if isinstance(value, tuple) else in_label(value)


def _propagate_label(flat: Flat) -> str:
    """How `propagate` departs from the preset's or, where the preset has none, what it is."""
    propagate: Propagate | None = flat["propagate"]
    if propagate is None:
        return ""
    own = presets().get(flat["method"], {}).get("propagate")
    usual = None if own is None else Propagate.parse(own)
    profile = _of_model(flat)
    if usual is not None and usual.layer == AUTO and profile is not None:
        usual = replace(usual, layer=profile.propagate_layer or 0)
    departures = propagate.departures(usual)
    named = "score" not in flat or (usual is not None and not departures)
    return departures if named else f"+{propagate.kind}{departures}"
