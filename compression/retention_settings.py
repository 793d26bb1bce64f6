"""Reads retention settings as users write them: presets, composed names, budgets, departures."""

import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from saqqara.configs.budget import budget_mistake
from saqqara.configs.names import closest
from saqqara.configs.shown import shown
from saqqara.configs.yaml_files import CONFIG_DIR, load_yaml

from .budgets import MEANS
from .decode_stage import DecodeStage, parse_stage
from .head_profile import HeadProfile
from .propagate import KINDS, Propagate
from .registry import SCORES, SHAPES, score_method, settings_of

MAX_BUDGET_CHARS = 100
PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@lru_cache(maxsize=1)
def presets() -> dict[str, dict[str, Any]]:
    """The settings in `configs/retention/`, by file name without its ending."""
    files = sorted((CONFIG_DIR / "retention").glob("*.yaml"))
    return {file.stem: load_yaml(file) for file in files}


def read_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of the `Retention` that a user's settings mean.

    Args:
        given: the settings, a name under `method`, `budget` as users write it; used up.

    Raises:
        ValueError: an unknown name or setting; names the field.
    """
    decode = given.pop("decode", None)
    method = given.pop("method", None)
    if method is None and given.get("score") is None and given.get("propagate") is None:
        raise ValueError(f"method: missing; known: {_known_names()}")
    preset = {"score": None} if method is None else _named_settings(method)
    if method == "full":
        if decode not in (None, False):
            return {"decode": DecodeStage()}  # `Retention` says what is wrong with it
        if given:
            name = f"{next(iter(given))!s:.80}"
            raise ValueError(
                f"{name}: 'full' keeps everything and takes no settings; choose a "
                "method beside it, such as recommended-adaptive (`saqqara methods` lists them)"
            )
        return {}
    propagate, is_own = _read_propagate(preset, given)
    method = method if is_own else None
    if preset["score"] is None and given.get("score") is None:
        return _without_score(method, propagate, decode, given)
    return {"propagate": propagate} | _with_score(method, preset, decode, given)


def _with_score(
    method: str | None, preset: dict[str, Any], decode: object, given: dict[str, Any]
) -> dict[str, Any]:
    """Fields but `propagate` of what has a score: the preset's, and those given instead of them."""
    stage = parse_stage(decode, has_score=True)
    if stage is not None:
        given["decode"] = stage
    own = preset.get("score"), preset.get("shape", "uniform")
    score, shape = given.pop("score", own[0]), given.pop("shape", own[1])
    own_mean: Any = preset.get("mean", "uniform")
    mean = given.get("mean", own_mean) if "mean" in settings_of(score, shape) else "uniform"
    allowed = settings_of(score, shape, mean)
    named = {"score", "shape", "propagate"}
    inherited = {name: value for name, value in preset.items() if name not in named}
    if (score, shape, mean) != (*own, own_mean) or method is None:
        # The name no longer says what is done, and some of its settings may not be read.
        method = _composed_name(score, shape, mean)
        inherited = {name: value for name, value in inherited.items() if name in allowed}
    fixed_window = score_method(score).fixed_window
    if fixed_window is not None:
        inherited["window"] = fixed_window
    settings: dict[str, Any] = inherited | given
    for name in settings:
        if name not in allowed:
            raise ValueError(
                f"{name!s:.80}: not a setting of score {score!r} with shape {shape!r}; allowed: "
                f"{', '.join(('method', 'score', 'shape', *allowed, 'propagate'))}"
            )
    if "budget" in settings:
        settings |= _read_budget(settings["budget"])
    if settings.get("profile") is not None:
        settings["profile"] = HeadProfile.read(settings["profile"])
    if "decode" in inherited and "decode" not in given:
        settings["decode"] = parse_stage(inherited["decode"], has_score=True)
    if isinstance(settings.get("skip_layers"), list):
        settings["skip_layers"] = tuple(settings["skip_layers"])
    return {"method": method, "score": score, "shape": shape} | settings


def _without_score(
    method: str | None, propagate: Propagate | None, decode: object, given: dict[str, Any]
) -> dict[str, Any]:
    """Fields of what only propagates; its settings may stand beside `method`."""
    if propagate is None:
        raise ValueError("propagate: without it and a score all is kept: use method 'full'")
    given = {name: value for name, value in given.items() if name != "score"}
    method = propagate.kind if method is None else method
    if "budget" in given:
        raise ValueError(
            f"budget: {method!r} keeps what enters each layer and takes none; a score (such as "
            "'snapkv') beside it does"
        )
    propagate = Propagate.parse(given, propagate)
    stage = parse_stage(decode, has_score=False)
    return {"method": method, "propagate": propagate, "decode": stage}


def _named_settings(name: object) -> dict[str, Any]:
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
    pairs = {(score, shape, "uniform") for score in SCORES for shape in SHAPES}
    pairs |= {(score, "adaptive", mean) for score in SCORES for mean in MEANS}
    return {*presets(), *KINDS, *(_composed_name(*pair) for pair in pairs)}


def _composed_name(score: str, shape: str, mean: str) -> str:
    """The name of a score with a shape, which `_named_settings` reads."""
    return "-".join((score, shape) if mean == "uniform" else (score, shape, mean))


def _read_propagate(preset: dict[str, Any], given: dict[str, Any]) -> tuple[Propagate | None, bool]:
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


def _known_names() -> str:
    return (
        f"{', '.join(sorted({*presets(), *KINDS}))}, or <score>-<shape> of scores "
        f"{', '.join(sorted(SCORES))} and shapes {', '.join(sorted(SHAPES))} "
        f"(adaptive also -<mean>: {', '.join(sorted(MEANS))})"
    )


def _read_budget(value: object) -> dict[str, int | float | None]:
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
