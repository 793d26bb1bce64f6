"""The input of a batch job: a file, gzip or a pipe, read twice and proved the same both times.

The first pass hashes the lines and counts the rows; the second yields them. Both read one open
file, so a file that is replaced meanwhile does not matter, and one that is written to is an error.
"""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from .lines import BadLine, Row, RowParser
from .text import (
    CHUNK_BYTES,
    MAX_LINE_BYTES,
    check_text,
    content,
    naming,
    parse_line,
    reason,
    split_lines,
)

_STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What one pass over the input tells: its hash (unpacked), lines, and those not blank."""

    sha256: str
    num_rows: int
    num_lines: int


class BatchSource:
    """The lines of a job's input.

    Args:
        path: a file of JSON lines, packed with gzip or not; `-` is standard input. A pipe is copied
            first, because the input is read twice.
        max_line_bytes: a longer line is a bad line, and never in memory as a whole.

    Raises:
        ValueError: the input cannot be read, or is no text in UTF-8.
    """

    def __init__(self, path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.path = path
        self.name = "standard input" if str(path) in _STDIN else str(path)
        self._max_line_bytes = max_line_bytes
        self._packed = False
        self._state = (0, 0)
        self._sha256 = ""
        if path.is_dir():
            raise ValueError(f"input: {path} is a folder; it must be a file of JSON lines")
        try:
            self._file = _open_stdin() if str(path) in _STDIN else path.open("rb")
        except OSError as error:
            raise ValueError(f"input: cannot read {self.name}: {reason(error)}") from None

    def scan(self, spool_folder: Path) -> InputSummary:
        """Hash the input and count its rows; comes before `rows`.

        Args:
            spool_folder: where the copy of a pipe lies, without a name, until `close`.

        Raises:
            ValueError: the input cannot be read, or is not what it should be.
        """
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            with self._file as pipe:
                self._file = self._spool(pipe, spool_folder)
        self._packed = check_text(self._file, self.name)
        self._state = self._stat()
        digest, num_rows, num_lines = hashlib.sha256(), 0, 0
        for num_lines, raw in self._lines(digest):  # noqa: B007 - the last one counts
            num_rows += raw is None or bool(raw.strip())
        self._sha256 = digest.hexdigest()
        return InputSummary(self._sha256, num_rows, num_lines)

    def rows(self, parser: RowParser) -> Iterator[Row | BadLine]:
        """Rows in order, one at a time; blank lines are left out.

        Of lines with the same `custom_id` the first one counts.

        Raises:
            ValueError: the file is no longer what was hashed.
        """
        first_line: dict[str, int] = {}
        digest = hashlib.sha256()
        for number, raw in self._lines(digest):
            if self._stat() != self._state:
                raise self._changed()
            if raw is not None and not raw.strip():
                continue
            row = parse_line(parser, number, raw, self._max_line_bytes)
            if row.custom_id is not None and row.custom_id in first_line:
                first = first_line[row.custom_id]
                message = f"custom_id {row.custom_id!r:.80} is already that of line {first}"
                row = BadLine(number, row.custom_id, row.url, message, "custom_id")
            elif row.custom_id is not None:
                first_line[row.custom_id] = number
            yield row
        if digest.hexdigest() != self._sha256:
            raise self._changed()

    def close(self) -> None:
        """Let go of the file; a copy of a pipe is gone with it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_same_file(self, other: Path) -> bool:
        """Whether another path is this very file, by whatever name."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), other.stat())
        except OSError:
            return False

    def _spool(self, pipe: IO[bytes], folder: Path) -> IO[bytes]:
        copy = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        try:
            shutil.copyfileobj(pipe, copy, CHUNK_BYTES)
            copy.flush()
        except OSError as error:
            copy.close()
            raise ValueError(
                f"input: cannot copy {self.name} into {folder}: {error.strerror}"
            ) from None
        except BaseException:
            copy.close()
            raise
        return copy

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _changed(self) -> ValueError:
        return ValueError(
            f"input: {self.path} was changed while the job ran; results so far are those of the "
            "file as it was. Start anew with --overwrite once nothing writes to it"
        )

    def _lines(self, digest: Any) -> Iterator[tuple[int, bytes | None]]:
        """Numbers and bytes of all lines, from the start; None for one that is too long."""
        with naming(self.name):
            file = content(self._file, self._packed)
            lines = split_lines(file, self._max_line_bytes, digest)
            for number, (raw, _) in enumerate(lines, start=1):
                yield number, raw


def _open_stdin() -> IO[bytes]:
    """Standard input; where it is a file, from its start and with a place of its own in it."""
    try:
        return Path("/dev/stdin").open("rb")
    except OSError:  # a socket cannot be opened by name
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
