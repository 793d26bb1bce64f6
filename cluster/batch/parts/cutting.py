"""Cuts input files into parts: what is answered, and committed, as one."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal

from saqqara.cluster.batch.text import MAX_LINE_BYTES, check_text, content, naming, split_lines

from .parquet import cut_parquet
from .storage import InputFile, open_input

PART_BYTES = 64 * 2**20  # of text, at most, so that no part is large because its rows are
PARQUET = b"PAR1"


@dataclass(frozen=True, slots=True)
class Part:
    """Some consecutive rows of one file.

    Attributes:
        index: its place among all parts.
        url, num_bytes, version: the file, and its state when it was cut.
        label: the file's name in records.
        kind: what the file is; `packed` is JSON lines in gzip.
        start, stop: bytes of JSON lines (all of a packed file), or rows from 0 of Parquet.
        first_line: number of the first line, or row, from 1.
        num_rows: how many records it comes to.
    """

    index: int
    url: str
    num_bytes: int
    version: str
    label: str
    kind: Literal["text", "packed", "parquet"]
    start: int
    stop: int
    first_line: int
    num_rows: int


def cut(
    files: Sequence[InputFile], part_rows: int, prompt_column: str | None = None
) -> tuple[list[Part], dict[str, str]]:
    """All parts of the input, and a digest of each file by its label.

    The digest of JSON lines is of all of them, that of Parquet is of the size and the footer, which
    has statistics of every column; nothing else of a Parquet file is read.

    Args:
        files: the input.
        part_rows: rows of a part; a file ends one, too.
        prompt_column: of Parquet files, see `cut_parquet`.

    Raises:
        ValueError: a file cannot be read, is broken, or has no prompts.
    """
    parts: list[Part] = []
    digests: dict[str, str] = {}
    for file in files:
        digest = hashlib.sha256()
        for kind, start, stop, first_line, num_rows in _spans(
            file, part_rows, prompt_column, digest
        ):
            parts.append(
                Part(
                    index=len(parts),
                    url=file.url,
                    num_bytes=file.num_bytes,
                    version=file.version,
                    label=file.label,
                    kind=kind,
                    start=start,
                    stop=stop,
                    first_line=first_line,
                    num_rows=num_rows,
                )
            )
        digests[file.label] = digest.hexdigest()
    return parts, digests


Span = tuple[Literal["text", "packed", "parquet"], int, int, int, int]


def _spans(
    file: InputFile, part_rows: int, prompt_column: str | None, digest: "hashlib._Hash"
) -> Iterator[Span]:
    """Kind, start, stop, first line and number of rows of each part of a file."""
    with open_input(file.url) as opened, naming(file.url):
        if opened.read(len(PARQUET)) == PARQUET:
            for start, stop in cut_parquet(opened, file, part_rows, prompt_column, digest):
                yield "parquet", start, stop, start + 1, stop - start
            return
        if check_text(opened, file.url):
            # A packed file can only be read from its start, so all of it is one part.
            yield from _text_spans(content(opened, True), "packed", None, digest)
        else:
            yield from _text_spans(content(opened, False), "text", part_rows, digest)


def _text_spans(
    text: IO[bytes],
    kind: Literal["text", "packed"],
    part_rows: int | None,
    digest: "hashlib._Hash",
) -> Iterator[Span]:
    start = stop = num_rows = 0
    first_line = 1
    for number, (raw, num_bytes) in enumerate(split_lines(text, MAX_LINE_BYTES, digest), 1):
        stop += num_bytes
        num_rows += raw is None or bool(raw.strip())
        is_full = part_rows is not None and (num_rows >= part_rows or stop - start >= PART_BYTES)
        if is_full and num_rows:
            yield kind, start, stop, first_line, num_rows
            start, first_line, num_rows = stop, number + 1, 0
    if num_rows:
        yield kind, start, stop, first_line, num_rows
