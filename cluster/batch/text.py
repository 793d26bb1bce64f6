"""Text of a batch job's input: what kind of file it is, its lines, and what each is as a row."""

import errno
import gzip
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from .lines import BadLine, Row, RowParser

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
}


def check_text(file: IO[bytes], name: str) -> bool:
    """Whether a file is packed with gzip; what is no text is an error here, once.

    Raises:
        ValueError: it is of another format, or not UTF-8.
    """
    file.seek(0)
    start = file.read(8)
    packed = start.startswith(_GZIP)
    within = ""
    if packed:
        with naming(name):
            start = content(file, packed).read(8)
        within = " within gzip"
    for magic, kind in (_OTHER_FORMATS | ({_GZIP: "gzip"} if packed else {})).items():
        if start.startswith(magic):
            raise ValueError(
                f"input: {name} is {kind}{within}; it must be JSON lines, plain or with gzip"
            )
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:2]:
        raise ValueError(
            f"input: {name} is UTF-16 or UTF-32, not UTF-8; convert it first: "
            f"iconv -f UTF-16 -t UTF-8 {name} > utf8.jsonl"
        )
    return packed


def content(file: IO[bytes], packed: bool) -> IO[bytes]:
    """A file's bytes, unpacked, from the start."""
    file.seek(0)
    return cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file


def split_lines(
    file: IO[bytes], max_line_bytes: int, digest: Any = None
) -> Iterator[tuple[bytes | None, int]]:
    """Lines from where the file is: bytes, None for one that is too long, and how many they are.

    Args:
        file: read to its end.
        max_line_bytes: of a longer line no more is in memory at once.
        digest: updated with all that is read.
    """
    while raw := file.readline(max_line_bytes + 1):
        num_bytes = len(raw)
        if digest is not None:
            digest.update(raw)
        too_long = len(raw) > max_line_bytes
        while too_long and raw and not raw.endswith(b"\n"):
            raw = file.readline(CHUNK_BYTES)
            num_bytes += len(raw)
            if digest is not None:
                digest.update(raw)
        yield None if too_long else raw, num_bytes


def parse_line(
    parser: RowParser, number: int, raw: bytes | None, max_line_bytes: int
) -> Row | BadLine:
    """One line as a row; whatever is wrong with it comes back as a `BadLine`."""
    if raw is None:
        message = f"the line is longer than {max_line_bytes} bytes, the most that is read"
        return BadLine(number, None, None, message)
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


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the file in what goes wrong while it is read."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"input: {name} is broken gzip: {error}") from None
    except OSError as error:
        raise ValueError(f"input: cannot read {name}: {reason(error)}") from None


def reason(error: OSError) -> str:
    """What the operating system says is wrong, in a few words."""
    if error.errno == errno.ELOOP:
        return "it is a loop of links, or lies behind one"
    return error.strerror or str(error)
