"""Reads files of JSON lines: who arrives, what dies."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saqqara.configs.json_text import StrictJsonError, parse_json
from saqqara.configs.shown import shown

MAX_SECONDS = 1e12  # some 30,000 years


def objects_in(
    path: Path, what: str, needed: Iterable[str], allowed: Iterable[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, blank lines left out, each with the words that name its line.

    Args:
        path: a file in UTF-8, with or without a byte order mark.
        what: the setting that names the file, for errors.
        needed: keys that every object has.
        allowed: all keys that an object may have.

    Raises:
        ValueError: no such file, or a line is wrong; names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{what}: line {number} of {path}"
            yield where, _object(where, line, tuple(needed), sorted(allowed))


def check_seconds(where: str, name: str, value: object) -> float:
    """A time in seconds, from 0 on; raises a ValueError that names the line where it is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_SECONDS:  # type: ignore[operator]
        raise ValueError(
            f"{where}: {name} must be a number from 0 to {MAX_SECONDS:g}, not {shown(value)}"
        )
    return float(value)  # type: ignore[arg-type]


def _object(where: str, line: str, needed: tuple[str, ...], allowed: list[str]) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except StrictJsonError as error:
        raise ValueError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict) or any(key not in row for key in needed):
        raise ValueError(f"{where} needs {', '.join(needed)}")
    if unknown := sorted(row.keys() - set(allowed)):
        raise ValueError(f"{where} has {unknown[0]!r:.80}, which is none of {', '.join(allowed)}")
    return row
