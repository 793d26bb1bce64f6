"""Which layers of a model see a window only, as its config says it."""

from collections.abc import Callable
from typing import Any

from .fields import check_whole
from .rope_spec import unrotated_layers

Local = Callable[[Any, int], bool]  # of a config and a layer's number: whether it has the window
_FULL, _SLIDING = "full_attention", "sliding_attention"
_MOST_TOKENS = 1_000_000_000


def every_layer(config: Any, layer: int) -> bool:
    """All layers have the window, if there is one."""
    return True


def even_layers(config: Any, layer: int) -> bool:
    """Every second layer, from the first on."""
    return layer % 2 == 0


def between_global_layers(config: Any, layer: int) -> bool:
    """All but the last of every `sliding_window_pattern` layers."""
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        if (pattern := getattr(config, name, None)) is not None:
            check_whole(name, pattern, _MOST_TOKENS)
            return (layer + 1) % int(pattern) != 0
    return (layer + 1) % 6 != 0


def past_max_window_layers(config: Any, layer: int) -> bool:
    """Layers from number `max_window_layers` on, where `use_sliding_window` is set."""
    if not uses_window(config, layer):
        return False
    return layer >= int(getattr(config, "max_window_layers", None) or 0)


def even_below_max_window_layers(config: Any, layer: int) -> bool:
    """Every second layer below number `max_window_layers`, where `use_sliding_window` is set."""
    below = layer < int(getattr(config, "max_window_layers", None) or 0)
    return uses_window(config, layer) and below and even_layers(config, layer)


def unrotated_with_window(config: Any, layer: int) -> bool:
    """Layers without rotary embedding, where `use_sliding_window` is set."""
    return uses_window(config, layer) and layer in unrotated_layers(config)


def uses_window(config: Any, layer: int) -> bool:
    """All layers, where `use_sliding_window` is set."""
    return bool(getattr(config, "use_sliding_window", False))


def read_windows(
    config: Any, local: Local | None, *, has_layer_types: bool, keeps_long: bool
) -> tuple[int, ...]:
    """By layer, how many of the last tokens a token sees, itself included, and 0: all; () if all.

    A window that no sequence can outgrow is none.

    Args:
        config: its `sliding_window`, and what says which layers have it.
        local: which layers have it where `layer_types` does not say so; None: none can.
        has_layer_types: whether models of this family go by `layer_types`.
        keeps_long: keep a window that no sequence can outgrow, because its layers differ otherwise.

    Raises:
        ValueError: a layer of another kind, or a window that is no number; names the field.
    """
    count, longest = config.num_hidden_layers, config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and not _is_off(config):
        check_whole("sliding_window", window, _MOST_TOKENS)
    by_rule = [local is not None and window is not None and local(config, n) for n in range(count)]
    is_local = _by_layer_types(config, by_rule, window, is_free=has_layer_types)
    if local is None and window is not None and not _is_off(config) and window < longest:
        raise ValueError(
            f"config.sliding_window={window}: models of type {config.model_type!r} have none"
        )
    if window is None or not any(is_local):
        return ()
    if window >= longest and not keeps_long:
        return ()
    return tuple(int(window) if each else 0 for each in is_local)


def _is_off(config: Any) -> bool:
    return not getattr(config, "use_sliding_window", True)


def _by_layer_types(
    config: Any, by_rule: list[bool], window: object, *, is_free: bool
) -> list[bool]:
    """Which layers are local; `layer_types` decides where it `is_free`, else it must agree."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return by_rule
    if len(kinds) != len(by_rule):
        raise ValueError(f"config.layer_types has {len(kinds)} entries for {len(by_rule)} layers")
    if unknown := {*kinds} - {_FULL, _SLIDING}:
        raise ValueError(
            f"config.layer_types has {sorted(map(str, unknown))}; supported: {_FULL}, {_SLIDING}"
        )
    named = [kind == _SLIDING for kind in kinds]
    if any(named) and window is None:
        raise ValueError(f"config.layer_types has {_SLIDING!r}, but config.sliding_window is null")
    if not is_free and named != by_rule:
        raise ValueError(
            f"config.layer_types differs from what models of type {config.model_type!r} do"
        )
    return named
