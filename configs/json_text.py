"""JSON as its standard has it: written without NaN and infinity, read without a key's loss."""

import json
import math
from collections.abc import Mapping
from typing import Any


class DoubledKeyError(ValueError):
    """An object has a key twice, of which a reader would drop one. `key` is which."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key!r:.80} is there twice")
        self.key = key


def parse_json(text: str | bytes) -> Any:
    """The value that a text of JSON is.

    Raises:
        DoubledKeyError: an object in it has a key twice.
        ValueError: it is no JSON, or is nested some 200 levels deep.
    """
    from pydantic_core import from_json  # reading weights and settings goes without it

    value = from_json(text)
    _KEYS.decode(text if isinstance(text, str) else text.decode())
    return value


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) == len(pairs):
        return
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise DoubledKeyError(key)
        seen.add(key)


# Looks at keys alone: numbers are not made, nor checked again.
_KEYS = json.JSONDecoder(
    object_pairs_hook=_check_keys, parse_int=len, parse_float=len, strict=False
)


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON; null where a number is NaN or infinite, which stands for "no figure"."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
