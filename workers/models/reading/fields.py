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
