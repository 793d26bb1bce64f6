"""Values of Arrow as the JSON that a line has; what JSON lacks is an error and never a text."""

import datetime
import json
import uuid
from collections.abc import Iterator, Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from saqqara.cluster.batch.lines import BadLine, url_of
from saqqara.configs.json_text import StrictJsonError, parse_json

_KINDS: tuple[tuple[type, str], ...] = (  # a datetime is a date, too
    (datetime.datetime, "timestamp"),
    (datetime.date, "date"),
    (datetime.time, "time"),
    (datetime.timedelta, "duration"),
    (Decimal, "decimal"),
    (uuid.UUID, "UUID"),
    (tuple, "pair of a map"),
)


class _WrongValueError(Exception):
    """A field has a value that no line has; the message says which and what."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def line_of(row: Mapping[str, Any], number: int) -> str | BadLine:
    """A row as the line of JSON that it stands for, or what is wrong with it.

    Bytes are text in UTF-8. Null fields of structs are left out: Arrow gives every struct of a
    column all fields of any.
    """
    try:
        given = {field: _value(value, field) for field, value in row.items()}
        if isinstance(given.get("body"), str):
            given["body"] = _body(given["body"])
    except _WrongValueError as error:
        custom_id = row.get("custom_id")
        known = custom_id if isinstance(custom_id, str) else None
        url = url_of({key: value for key, value in row.items() if value is not None})
        return BadLine(number, known, url, str(error), error.field)
    # NaN is refused where the line is read, in the words that a line of text gets for it.
    return json.dumps(given, ensure_ascii=False, allow_nan=True)


def doubled_name(names: Iterator[str]) -> str | None:
    """The first of some names that is there twice; None if each is there once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _value(value: Any, field: str) -> Any:
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, dict):
        return {
            key: _value(item, f"{field}.{key}") for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [_value(item, f"{field}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise _WrongValueError(field, f"{field}: not UTF-8") from None
    if isinstance(value, Real):  # a half-precision float
        return float(value)
    kind = next((name for kind, name in _KINDS if isinstance(value, kind)), type(value).__name__)
    wanted = "; it must be a string"
    if field != "custom_id":
        wanted = ", which is no value of JSON; cast the column to text or numbers"
    raise _WrongValueError(field, f"{field} is a {kind}{wanted}")


def _body(text: str) -> Any:
    try:
        return parse_json(text)
    except StrictJsonError as error:
        raise _WrongValueError("body", f"body: {error}") from None
    except ValueError as error:
        raise _WrongValueError("body", f"body is not JSON: {error}") from None
