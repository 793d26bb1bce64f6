"""The retention settings that are compared: `full` first, then a list or a grid of others."""

from collections.abc import Iterable, Sequence
from typing import Any

from saqqara.compression.retention import Retention
from saqqara.configs.shown import shown
from saqqara.configs.yaml_files import parse_yaml
from saqqara.workers.models.spec import ModelSpec

DEFAULT_METHODS = "pyramidkv,snapkv,streaming,knorm,random"

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def parse_setting(text: str) -> Retention:
    """One setting as the command line writes it.

    Args:
        text: `full`, `NAME@BUDGET` (as in reports: `pyramidkv@25%`), or a mapping in YAML or JSON
            such as `{method: pyramidkv, budget: 25%, beta: 5}`.

    Raises:
        ValueError: no such setting; names the field.
    """
    if text.lstrip().startswith("{"):
        return Retention.parse(_mapping(text))
    name, at, budget = text.strip().partition("@")
    return Retention.parse(name, budget if at else None)


def parse_grid(methods: str, budgets: str) -> list[Retention]:
    """Every method at every budget, method by method; `full` counts once.

    Args:
        methods: names or mappings in braces, with commas between them.
        budgets: tokens or shares with commas between them, such as `128,25%`.

    Raises:
        ValueError: a list is empty, or an entry is wrong; names the field.
    """
    entries = _flow_list(methods, "methods")
    sizes = _flow_list(budgets, "budgets")
    settings: list[Retention] = []
    for entry in entries:
        if not isinstance(entry, (str, dict)):
            raise ValueError(f"methods: {entry!r} is neither a name nor a mapping of settings")
        if entry == "full":
            settings.append(Retention())
            continue
        settings += [Retention.parse(entry, size) for size in sizes]
    return settings


def with_full(settings: Iterable[Retention]) -> tuple[Retention, ...]:
    """The settings, each once, after `full`, which everything is compared with.

    Raises:
        ValueError: two different settings have the same label, so reports could not name them.
    """
    found = tuple(dict.fromkeys([Retention(), *settings]))
    labels = [setting.label for setting in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"retention: two different settings are called {label!r}")
    return found


def kept_share(setting: Retention, prompt_tokens: Sequence[int], spec: ModelSpec) -> float:
    """Share of the prompts' keys and values that a setting keeps (expected, where ragged).

    It is of the layers that see all tokens; 1 where none does.

    Args:
        setting: the retention.
        prompt_tokens: length of each prompt.
        spec: of the model.
    """
    layers = list(spec.layers.global_layers)
    kept = sum(
        int(setting.row_tokens(n, spec.layers, spec.num_kv_heads)[layers].sum(dtype="int64"))
        for n in prompt_tokens
    )
    full = sum(prompt_tokens) * len(layers) * spec.num_kv_heads
    return kept / full if full else 1.0


def full_bytes(prompt_tokens: int, spec: ModelSpec, dtype: str) -> int:
    """Bytes of a prompt's keys and values in global layers with full retention.

    `dtype` `auto` is the checkpoint's.
    """
    return _row_bytes(prompt_tokens * len(spec.layers.global_layers), spec, dtype)


def local_bytes(prompt_tokens: int, spec: ModelSpec, dtype: str) -> int:
    """Bytes of a prompt's keys and values in layers with a window, which all settings keep."""
    tokens = spec.layers.local_tokens(prompt_tokens) * len(spec.layers.local_layers)
    return _row_bytes(tokens, spec, dtype)


def _row_bytes(num_tokens: int, spec: ModelSpec, dtype: str) -> int:
    """Bytes of so many tokens in one layer each, all kv heads."""
    return (
        2  # key + value
        * num_tokens
        * spec.num_kv_heads
        * spec.head_dim
        * _DTYPE_BYTES[spec.dtype if dtype == "auto" else dtype]
    )


def _mapping(text: str) -> dict[str, Any]:
    value = _parsed(text, text, "retention")
    if not isinstance(value, dict):
        raise ValueError(f"retention: {shown(text)} is no mapping in YAML or JSON")
    return value


def _parsed(text: str, written: str, field: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{field}: {shown(written)} is {error}") from None


def _flow_list(text: str, field: str) -> list[Any]:
    """Entries with commas between them, outside of braces."""
    entries = _parsed(f"[{text}]", text, field)
    if not entries:
        raise ValueError(f"{field}: {shown(text)} is no list such as 'a,b'")
    return list(entries)
