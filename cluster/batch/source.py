"""The input of a batch job: a file, gzip or a pipe, read twice and proved the same both times.

The first pass hashes the lines and counts the rows; the second yields them. Both read one open
file, so a file that is replaced meanwhile does not matter, and one that is written to is an error.
"""

import gzip
import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

from .lines import BadLine, Row, RowParser

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
}
_STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What one pass over the input tells: its hash (unpacked) and how many lines are not blank."""

    sha256: str
    num_rows: int


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
            raise ValueError(f"input: cannot read {self.name}: {error.strerror}") from None

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
        self._packed = self._check_format()
        self._state = self._stat()
        digest, num_rows = hashlib.sha256(), 0
        for _, raw in self._lines(digest):
            num_rows += raw is None or bool(raw.strip())
        self._sha256 = digest.hexdigest()
        return InputSummary(self._sha256, num_rows)

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
            row = self._parse(parser, number, raw)
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
            shutil.copyfileobj(pipe, copy, _CHUNK_BYTES)
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

    def _check_format(self) -> bool:
        """Whether the file is packed with gzip; what is no text is an error here, once."""
        self._file.seek(0)
        start = self._file.read(8)
        for magic, kind in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise ValueError(
                    f"input: {self.name} is {kind}; it must be JSON lines, plain or with gzip"
                )
        packed = start.startswith(_GZIP)
        if packed:
            with self._errors():
                start = self._content(packed).read(8)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:2]:
            raise ValueError(
                f"input: {self.name} is UTF-16 or UTF-32, not UTF-8; convert it first: "
                f"iconv -f UTF-16 -t UTF-8 {self.path} > utf8.jsonl"
            )
        return packed

    def _lines(self, digest: Any) -> Iterator[tuple[int, bytes | None]]:
        """Numbers and bytes of all lines, from the start; None for one that is too long."""
        number = 0
        with self._errors():
            file = self._content(self._packed)
            while raw := file.readline(self._max_line_bytes + 1):
                number += 1
                digest.update(raw)
                too_long = len(raw) > self._max_line_bytes
                while too_long and raw and not raw.endswith(b"\n"):
                    raw = file.readline(_CHUNK_BYTES)
                    digest.update(raw)
                yield number, None if too_long else raw

    def _content(self, packed: bool) -> IO[bytes]:
        """The input's bytes, unpacked, from the start."""
        self._file.seek(0)
        return cast(IO[bytes], gzip.GzipFile(fileobj=self._file)) if packed else self._file

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Name the file in what goes wrong while it is read."""
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"input: {self.name} is broken gzip: {error}") from None
        except OSError as error:
            raise ValueError(f"input: cannot read {self.name}: {error.strerror}") from None

    def _parse(self, parser: RowParser, number: int, raw: bytes | None) -> Row | BadLine:
        if raw is None:
            return BadLine(
                number,
                None,
                None,
                f"the line is longer than {self._max_line_bytes} bytes, the most that is read",
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            return BadLine(number, None, None, f"not UTF-8: byte {error.start + 1} of the line")
        try:
            return parser.parse(number, text)
        except Exception as error:  # a fault of ours, and still no reason to lose the others
            logger.exception("line %d could not be read", number)
            message = f"the line could not be read: {type(error).__name__}: {error}"
            return BadLine(number, None, None, message)


def _open_stdin() -> IO[bytes]:
    """Standard input; where it is a file, from its start and with a place of its own in it."""
    try:
        return Path("/dev/stdin").open("rb")
    except OSError:  # a socket cannot be opened by name
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
