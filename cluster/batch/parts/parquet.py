"""Prompts in Parquet files: only the columns that a request has are read."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import IO, TYPE_CHECKING, Any

from saqqara.cluster.batch.lines import PROMPT_KEYS, BadLine
from saqqara.cluster.openai.batches import WRAPPER_KEYS
from saqqara.cluster.openai.requests import ChatRequest, CompletionRequest

from .arrow_values import doubled_name, line_of
from .storage import InputFile

if TYPE_CHECKING:
    import hashlib

logger = logging.getLogger(__name__)

SIMPLE_KEYS = frozenset(
    {"custom_id", *PROMPT_KEYS, *CompletionRequest.model_fields, *ChatRequest.model_fields}
)
_MOST_CUTS = 64  # parts of one row group: each is reached by reading what is before it
_BATCH_ROWS = 256
_FOOTER_TAIL_BYTES = 8  # its length, and PAR1


def used_columns(names: Sequence[str], prompt_column: str | None, file: str) -> dict[str, str]:
    """The columns that requests are made of, with the field that each is.

    Args:
        names: all columns.
        prompt_column: the column with the prompts, if it has another name than the field.
        file: for the error.

    Raises:
        ValueError: no column holds prompts, or two that are read have one name.
    """
    used = _used(names, prompt_column, file)
    if (name := doubled_name(name for name in names if name in used)) is not None:
        raise ValueError(f"input: {file}: column {name!r} is there twice")
    return used


def _used(names: Sequence[str], prompt_column: str | None, file: str) -> dict[str, str]:
    if prompt_column is not None:
        if prompt_column not in names:
            raise ValueError(f"prompt-column: {file} has no column {prompt_column!r}{_has(names)}")
        kept = SIMPLE_KEYS - set(PROMPT_KEYS) - {prompt_column}
        return {prompt_column: "prompt", **{name: name for name in names if name in kept}}
    if "body" in names:
        return {name: name for name in names if name in WRAPPER_KEYS}
    if not any(name in PROMPT_KEYS for name in names):
        wanted = ", ".join(map(repr, PROMPT_KEYS))
        raise ValueError(
            f"input: {file} has no column for prompts ({wanted} or 'body'){_has(names)}; say which "
            "it is with --prompt-column"
        )
    return {name: name for name in names if name in SIMPLE_KEYS}


def cut_parquet(
    opened: IO[bytes],
    file: InputFile,
    part_rows: int,
    prompt_column: str | None,
    digest: "hashlib._Hash",
) -> Iterator[tuple[int, int]]:
    """First row and the row behind the last one of each part, from 0.

    A part ends with its row group; large groups are cut, small ones are joined.

    Raises:
        ValueError: the file is broken, or has no prompts.
    """
    pa = arrow()
    with _broken(file.url):
        metadata = pa.parquet.ParquetFile(opened).metadata
        names = metadata.schema.to_arrow_schema().names
    used_columns(names, prompt_column, file.url)
    digest.update(f"{file.num_bytes} ".encode() + _footer(opened, file.num_bytes))
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    start = 0
    for first, last in pairwise(accumulate(sizes, initial=0)):
        if last - start < part_rows and last < metadata.num_rows:
            continue
        step = max(part_rows, -(-(last - first) // _MOST_CUTS))
        while last - start > step:
            yield start, start + step
            start += step
        if last > start:
            yield start, last
        start = last


def parquet_rows(
    opened: IO[bytes], start: int, stop: int, prompt_column: str | None, name: str
) -> Iterator[str | BadLine]:
    """Rows `start` to `stop` from 0, each as the line of JSON that it stands for.

    A row with a value that JSON lacks comes as the bad line that it is.

    Raises:
        Exception: what pyarrow says of a broken page, once it is reached.
    """
    file = arrow().parquet.ParquetFile(opened, pre_buffer=False, buffer_size=2**20)
    columns = used_columns(file.schema_arrow.names, prompt_column, name)
    metadata = file.metadata
    ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
    groups = [
        i
        for i, end in enumerate(ends)
        if end > start and end - metadata.row_group(i).num_rows < stop
    ]
    row = ends[groups[0]] - metadata.row_group(groups[0]).num_rows if groups else stop
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(columns)):
        low, high = max(start - row, 0), min(stop - row, batch.num_rows)
        if low < high:
            wanted = batch.slice(low, high - low)
            # With a column, pyarrow reads those whose names go on behind a dot, too.
            read = {columns[name]: wanted.column(name) for name in columns}
            rows = zip(*(column.to_pylist() for column in read.values()), strict=True)
            for number, values in enumerate(rows, start=row + low + 1):
                yield line_of(dict(zip(read, values, strict=True)), number)
        row += batch.num_rows
        if row >= stop:
            return


def _footer(opened: IO[bytes], num_bytes: int) -> bytes:
    opened.seek(num_bytes - _FOOTER_TAIL_BYTES)
    length = int.from_bytes(opened.read(4), "little")
    opened.seek(max(0, num_bytes - _FOOTER_TAIL_BYTES - length))
    return opened.read(length)


def _has(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return f"; it has {shown}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@contextmanager
def _broken(name: str) -> Iterator[None]:
    try:
        yield
    except (arrow().ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"input: {name} is broken Parquet: {text}") from None


def arrow() -> Any:
    """The package pyarrow, with its Parquet.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'saqqara[data]'") from None
    return pa
