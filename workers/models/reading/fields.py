"""Single fields of a config: their bounds, and values that are refused by name."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Whole numbers from 1 to these; far above any model, so that a slip costs no hours.
_MOST = {
    "vocab_size": 100_000_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 10_000_000,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "max_position_embeddings": 1_000_000_000,
}

# Beside them, layers after which a pattern repeats.
_STEPS = dict.fromkeys(
    ("sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"), 10_000
)
_ROPE_NUMBERS = frozenset(
    {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
)
_ORIGINAL = "original_max_position_embeddings"


def check_whole(name: str, value: object, most: int) -> None:
    """Raise a ValueError unless a config's value is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(
            f"config.{name} must be a whole number from 1 to {most:,}, not {value!r:.80}"
        )


def check_sizes(config: Any) -> None:
    """Raise a ValueError unless the sizes that every family has are numbers within bounds."""
    for name, most in _MOST.items():
        value = getattr(config, name, None)
        if value is not None or name not in ("num_key_value_heads", "head_dim"):
            check_whole(name, value, most)
    eps = getattr(config, "rms_norm_eps", None)
    if not is_number(eps) or eps < 0:
        raise ValueError(f"config.rms_norm_eps must be a number from 0 on, not {eps!r:.80}")


def check_stated(config: Mapping[str, Any]) -> None:
    """Check what a `config.json` says before anything divides by it; null and missing pass.

    Raises:
        ValueError: a size is none, or rotary settings are no object; names the field.
    """
    for name, most in (_MOST | _STEPS).items():
        if config.get(name) is not None:
            check_whole(name, config[name], most)
    for field in ("rope_parameters", "rope_scaling"):
        ropes = config.get(field)
        if ropes is None:
            continue
        if not isinstance(ropes, Mapping):
            raise ValueError(f"config.{field} must be an object, not {ropes!r:.80}")
        for name in ("full_attention", "sliding_attention"):
            if ropes.get(name) is not None and not isinstance(ropes[name], Mapping):
                raise ValueError(f"config.{field}[{name!r}] must be an object")
        _check_rope(f"config.{field}", ropes)
        for name, rope in ropes.items():
            if isinstance(rope, Mapping):
                _check_rope(f"config.{field}[{name!r}]", rope)
    kinds = config.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    ):
        raise ValueError(
            f"config.layer_types must be a list of one kind a layer, not {kinds!r:.80}"
        )


def _check_rope(field: str, rope: Mapping[str, Any]) -> None:
    if rope.get(_ORIGINAL) is not None:
        check_whole(_ORIGINAL, rope[_ORIGINAL], _MOST["max_position_embeddings"])
    for name in _ROPE_NUMBERS & rope.keys():
        if rope[name] is not None and not is_number(rope[name]):
            raise ValueError(f"{field}[{name!r}] must be a number above 0, not {rope[name]!r:.80}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def positive(config: Any, name: str, absent: float) -> float:
    """A field that is a number above 0; `absent` where it is null or missing.

    Raises:
        ValueError: it is anything else.
    """
    value = getattr(config, name, None)
    if value is None:
        return absent
    if not is_number(value) or value <= 0:
        raise ValueError(f"config.{name} must be a number above 0, not {value!r:.80}")
    return float(value)


def read_activation(config: Any, name: str) -> Activation:
    """The activation that a field names.

    Raises:
        ValueError: it is not supported.
    """
    activation = _ACTIVATIONS.get(str(getattr(config, name, None)))
    if activation is None:
        raise ValueError(
            f"config.{name}={getattr(config, name, None)!r} is not supported; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    return activation


def check_fixed(config: Any, fixed: Mapping[str, object]) -> None:
    """Raise for fields whose only supported value is another; null and missing ones pass."""
    for name, right in fixed.items():
        value = getattr(config, name, None)
        if value is not None and value != right:
            raise ValueError(f"config.{name}={value!r:.80} is not supported; only {right!r}")


def check_unquantized(config: Any) -> None:
    """Raise a ValueError for a quantized checkpoint."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "config.quantization_config: quantized checkpoints are not supported; "
            "use one in float32, bfloat16 or float16"
        )
