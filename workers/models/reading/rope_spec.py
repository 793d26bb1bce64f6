"""Rotary settings of a model, read from its Hugging Face config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3")
# By kind: field of `RopeSpec` -> (its name in a config, what it is read as).
_ROPE_NUMBERS: dict[RopeKind, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "default": {},
    "linear": {"factor": ("factor", float)},
    "llama3": {
        "factor": ("factor", float),
        "low_freq_factor": ("low_freq_factor", float),
        "high_freq_factor": ("high_freq_factor", float),
        "original_max_position": ("original_max_position_embeddings", int),
    },
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    `factor` belongs to `linear` and `llama3`; the other three fields to `llama3` only (see
    `transformers.modeling_rope_utils`).
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def read_ropes(config: Any, *, two: bool) -> tuple[RopeSpec, RopeSpec | None]:
    """Rotary settings of layers that see all tokens, and of those with a window where `two`.

    From `rope_parameters` of transformers 5, or the older attributes.

    Raises:
        ValueError: what is not supported, or missing; names the field.
    """
    field = "rope_parameters"
    parameters = getattr(config, field, None)
    if parameters is None:
        field = "rope_scaling"
        parameters = getattr(config, field, None) or {}
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        theta = getattr(config, "rope_theta", None) or 10000.0
        rope = _read_rope(config, f"config.{field}", parameters, theta)
        local = getattr(config, "rope_local_base_freq", None) or 10000.0
        return rope, RopeSpec(float(local)) if two else None
    if not two:
        raise ValueError(
            f"config.{field} differs by layer type; models of type {config.model_type!r} have one "
            "rotary setting"
        )
    of_all, of_window = (
        _read_rope(config, f"config.{field}[{kind!r}]", parameters.get(kind) or {}, theta)
        for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
    )
    return of_all, of_window


def _read_rope(
    config: Any, field: str, parameters: Mapping[str, Any], default_theta: float
) -> RopeSpec:
    _check_rotary(config, field, parameters)
    theta = parameters.get("rope_theta") or default_theta
    kind = _rope_kind(parameters)
    of_kind = {}
    for name, (key, as_number) in _ROPE_NUMBERS[kind].items():
        if parameters.get(key) is None:
            raise ValueError(f"{field}[{key!r}] is missing; rope type {kind!r} needs it")
        of_kind[name] = as_number(parameters[key])
    return RopeSpec(theta=float(theta), kind=kind, **of_kind)


def _rope_kind(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _check_rotary(config: Any, field: str, parameters: Mapping[str, Any]) -> None:
    """Raise for rotary settings that would otherwise be computed wrongly without a word."""
    kind = _rope_kind(parameters)
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"{field}['rope_type']={kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    rotary = parameters.get("partial_rotary_factor") or getattr(
        config, "partial_rotary_factor", None
    )
    if rotary is not None and rotary != 1.0:
        raise ValueError(
            f"config.partial_rotary_factor={rotary} is not supported; only full rotary (1.0)"
        )
