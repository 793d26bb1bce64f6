"""Rows that are run again because their record is an error.

Their new records are collected in `results.jsonl.retried`, and take the place of the old ones all
at once, when a whole new file replaces `results.jsonl`: at every moment there is one record a row.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any


def retried_path(path: Path) -> Path:
    """Where the new records lie until they replace the old ones."""
    return path.with_name(path.name + ".retried")


def replace_records(path: Path) -> FileIO | None:
    """Put the records of retried rows in the place of the old ones; doing it again changes nothing.

    Args:
        path: the results, locked by the caller.

    Returns:
        The new file, opened for appending and locked; None if no row was retried.

    Raises:
        OSError: a file cannot be read or written; what was there is still there.
    """
    retried = retried_path(path)
    if not retried.exists():
        return None
    places = {int(record["line"]): span for record, span in whole_records(retried)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    new = FileIO(temporary, "a")
    try:
        fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.truncate(0)
        with path.open("rb") as old, retried.open("rb") as fresh:
            for record, (start, stop) in whole_records(path):
                source, span = old, (start, stop)
                if (place := places.get(int(record["line"]))) is not None:
                    source, span = fresh, place
                source.seek(span[0])
                _write_all(new, source.read(span[1] - span[0]))
        os.fsync(new.fileno())
        os.replace(temporary, path)
    except BaseException:
        new.close()
        temporary.unlink(missing_ok=True)
        raise
    retried.unlink()
    return new


def whole_records(path: Path) -> Iterator[tuple[dict[str, Any], tuple[int, int]]]:
    """Records of a file and the bytes that each lies at; a torn last line is left out.

    Raises:
        ValueError: a line is no record, with its number and the file.
    """
    end = 0
    with path.open("rb") as written:
        for number, raw in enumerate(written, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                record = json.loads(raw)
                if type(record["line"]) is not int:
                    raise TypeError
                record["error"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"output: line {number} of {path} is no batch result; the file is damaged, "
                    "start anew with --overwrite"
                ) from None
            yield record, (end, end + len(raw))
            end += len(raw)


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]
