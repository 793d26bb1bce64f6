"""JSON as its standard has it: written without NaN and infinity, read without a key's loss."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


class StrictJsonError(ValueError):
    """A text that lenient readers take, though JSON has no such thing. `field` is where it is."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class DoubledKeyError(StrictJsonError):
    """An object has a key twice, of which a reader would drop one; `field` is the key."""

    def __init__(self, key: str) -> None:
        super().__init__(key, f"{key!r:.80} is there twice")


class NotFiniteError(StrictJsonError):
    """A number is NaN or infinite, or larger than a double; `field` is its path, `a.b[2]`."""

    def __init__(self, path: str, value: float) -> None:
        said = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
        where = f"{path[:80]}: " if path else ""
        super().__init__(path, f"{where}JSON has finite numbers alone, not {said}")


def parse_json(text: str | bytes) -> Any:
    """The value that a text of JSON is.

    Raises:
        DoubledKeyError: an object in it has a key twice.
        NotFiniteError: a number in it is NaN or infinite, or larger than a double.
        ValueError: it is no JSON, or is nested some 200 levels deep.
    """
    from pydantic_core import from_json  # reading weights and settings goes without it

    value = from_json(text)
    try:
        _STRICT.decode(text if isinstance(text, str) else text.decode())
    except OverflowError:
        raise NotFiniteError(*_first_not_finite(value, "")) from None
    return value


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) == len(pairs):
        return
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise DoubledKeyError(key)
        seen.add(key)


def _check_finite(text: str) -> None:
    if not math.isfinite(float(text)):
        raise OverflowError


# Looks at keys, and whether numbers are finite: values are not made again.
_STRICT = json.JSONDecoder(
    object_pairs_hook=_check_keys,
    parse_int=len,
    parse_float=_check_finite,
    parse_constant=_check_finite,
    strict=False,
)


def _first_not_finite(value: Any, path: str) -> tuple[str, float]:
    """The path and the value of the first number that is not finite; the path is empty if none."""
    if isinstance(value, float) and not math.isfinite(value):
        return path, value
    members: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        members = ((f"{path}.{key}" if path else key, item) for key, item in value.items())
    elif isinstance(value, list):
        members = ((f"{path}[{place}]", item) for place, item in enumerate(value))
    for where, item in members:
        found = _first_not_finite(item, where)
        if not math.isfinite(found[1]):
            return found
    return "", 0.0


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
