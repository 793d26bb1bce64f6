"""Rotary settings of a model, read from its Hugging Face config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .fields import check_whole, is_number

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3", "none"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ALIASES = {"su": "longrope"}
_MOST_TOKENS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding; kinds and fields as in `transformers.modeling_rope_utils`.

    Attributes:
        theta: base of the frequencies.
        kind: how they are scaled; `none`: nothing is rotated.
        factor: of `linear`, `dynamic`, `yarn` and `llama3`: how much longer texts may be.
        low_freq_factor: of `llama3`.
        high_freq_factor: of `llama3`.
        original_max_position: tokens of the longest text of the first training, for kinds that
            scale from there on.
        attention_factor: of cosines and sines, in `yarn` and `longrope`.
        beta_fast: of `yarn`: rotations over the original length beyond which waves are kept.
        beta_slow: and below which they are stretched.
        truncates: of `yarn`: whether both bounds are whole channels.
        short_factors: of `longrope`: divisors of the frequencies, one for each pair of channels, in
            an engine whose texts end within the original length.
        long_factors: in one with longer texts.
        rotary_share: share of a head's channels that are rotated; the first ones.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotary_share: float = 1.0

    def rotary_size(self, head_dim: int) -> int:
        """Channels of a head that are rotated."""
        return int(head_dim * self.rotary_share)


UNROTATED = RopeSpec(kind="none")


def read_ropes(config: Any, *, two: bool, partial: bool) -> tuple[RopeSpec, RopeSpec | None]:
    """Rotary settings of layers that see all tokens, and of those with a window where `two`.

    From `rope_parameters` of transformers 5, or the older attributes.

    Args:
        config: whose settings.
        two: whether layers with a window have settings of their own.
        partial: whether models of this family may rotate a share of their channels.

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
        rope = _Reader(config, f"config.{field}", parameters).read(theta, partial=partial)
        local = getattr(config, "rope_local_base_freq", None) or 10000.0
        return rope, RopeSpec(float(local)) if two else None
    if not two:
        raise ValueError(
            f"config.{field} differs by layer type; models of type {config.model_type!r} have one "
            "rotary setting"
        )
    of_all, of_window = (
        _Reader(config, f"config.{field}[{kind!r}]", parameters.get(kind) or {}).read(
            theta, partial=partial
        )
        for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
    )
    return of_all, of_window


def unrotated_layers(config: Any) -> tuple[int, ...]:
    """Numbers of the layers without rotary embedding, which `no_rope_layers` marks by 0.

    Without that field it is the last one of every `no_rope_layer_interval`.
    """
    count, marks = config.num_hidden_layers, getattr(config, "no_rope_layers", None)
    if marks is None:
        every = getattr(config, "no_rope_layer_interval", None) or 4
        check_whole("no_rope_layer_interval", every, _MOST_TOKENS)
        marks = [(layer + 1) % every for layer in range(count)]
    if len(marks) != count:
        raise ValueError(f"config.no_rope_layers has {len(marks)} entries for {count} layers")
    return tuple(layer for layer, is_rotated in enumerate(marks) if not is_rotated)


class _Reader:
    """Reads one rotary setting; `field` is how errors call it."""

    def __init__(self, config: Any, field: str, parameters: Mapping[str, Any]) -> None:
        self._config, self._field, self._parameters = config, field, parameters

    def read(self, default_theta: float, *, partial: bool) -> RopeSpec:
        parameters = self._parameters
        named = parameters.get("rope_type") or parameters.get("type") or "default"
        kind = _ALIASES.get(str(named), named)
        if kind not in ROPE_KINDS:
            raise ValueError(
                f"{self._field}['rope_type']={named!r} is not supported; "
                f"supported: {', '.join(ROPE_KINDS)}"
            )
        of_kind = getattr(self, f"_{kind}")() if kind != "default" else {}
        theta = self._number("rope_theta", default_theta)
        if theta <= 1:  # frequencies would not fall, and yarn divides by its logarithm
            raise ValueError(f"{self._field}['rope_theta'] must be above 1, not {theta!r}")
        return RopeSpec(
            theta=theta,
            kind=kind,
            rotary_share=self._share(partial=partial),
            **of_kind,
        )

    def _linear(self) -> dict[str, Any]:
        return {"factor": self._number("factor")}

    def _dynamic(self) -> dict[str, Any]:
        original = self._config.max_position_embeddings
        return {"factor": self._number("factor"), "original_max_position": original}

    def _llama3(self) -> dict[str, Any]:
        return {
            "factor": self._number("factor"),
            "low_freq_factor": self._number("low_freq_factor"),
            "high_freq_factor": self._number("high_freq_factor"),
            "original_max_position": self._original(),
        }

    def _yarn(self) -> dict[str, Any]:
        factor, original = self._stretch()
        scale, scale_all = (self._number(name, 0.0) for name in ("mscale", "mscale_all_dim"))
        attention = _yarn_scale(factor, 1.0)
        if scale and scale_all:
            attention = _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all)
        return {
            "factor": factor,
            "original_max_position": original,
            "attention_factor": self._number("attention_factor", attention),
            "beta_fast": self._number("beta_fast", 32.0),
            "beta_slow": self._number("beta_slow", 1.0),
            "truncates": bool(self._parameters.get("truncate", True)),
        }

    def _longrope(self) -> dict[str, Any]:
        factor, original = self._stretch()
        if original == 1:
            raise ValueError("config.original_max_position_embeddings must be above 1, not 1")
        attention = 1.0
        if factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
        return {
            "original_max_position": original,
            "attention_factor": self._number("attention_factor", attention),
            "short_factors": self._factors("short_factor"),
            "long_factors": self._factors("long_factor"),
        }

    def _stretch(self) -> tuple[float, int]:
        """How much longer texts are than those of the first training, and these."""
        original = self._original()
        return self._number("factor", self._config.max_position_embeddings / original), original

    def _original(self) -> int:
        """`original_max_position_embeddings`, whose place in the config itself comes first."""
        name = "original_max_position_embeddings"
        value = getattr(self._config, name, None) or self._parameters.get(name)
        value = self._config.max_position_embeddings if value is None else value
        check_whole(name, value, _MOST_TOKENS)
        return int(value)

    def _number(self, key: str, absent: float | None = None) -> float:
        value = self._parameters.get(key)
        value = absent if value is None else value
        if value is None:
            raise ValueError(f"{self._field}[{key!r}] is missing; its rope type needs it")
        if not is_number(value) or value < 0 or (value == 0 and absent != 0):
            raise ValueError(f"{self._field}[{key!r}] must be above 0, not {value!r:.80}")
        return float(value)

    def _factors(self, key: str) -> tuple[float, ...]:
        values = self._parameters.get(key)
        config, share = self._config, self._share(partial=True)
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        needed = int(width * share) // 2
        if (
            not isinstance(values, list | tuple)
            or len(values) != needed
            or not all(is_number(value) and value > 0 for value in values)
        ):
            raise ValueError(f"{self._field}[{key!r}] must be {needed} numbers above 0")
        return tuple(map(float, values))

    def _share(self, *, partial: bool) -> float:
        name = "partial_rotary_factor"
        value = self._parameters.get(name)
        value = getattr(self._config, name, None) if value is None else value
        if value is None or value == 1:
            return 1.0
        if not partial:
            raise ValueError(
                f"config.{name}={value!r:.80} is not supported for models of type "
                f"{self._config.model_type!r}; only full rotary (1.0)"
            )
        if not is_number(value) or not 0 < value < 1:
            raise ValueError(f"config.{name} must be above 0 and at most 1, not {value!r:.80}")
        return float(value)


def _yarn_scale(factor: float, scale: float) -> float:
    """Equation 22 of YaRN (2309.00071), for cosines and sines alike."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
