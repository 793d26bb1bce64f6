"""The rows of a part, read from its file."""

from collections.abc import Iterator

from saqqara.cluster.batch.lines import BadLine, Row, RowParser
from saqqara.cluster.batch.text import MAX_LINE_BYTES, content, naming, parse_line, split_lines

from .cutting import Part
from .parquet import parquet_rows
from .storage import check_unchanged, open_input


def rows_of(part: Part, parser: RowParser, prompt_column: str | None) -> Iterator[Row | BadLine]:
    """Rows of a part in order, one at a time.

    Rows that lie in a broken place of a Parquet file are bad lines, each of them.

    Raises:
        ValueError: the file is no longer what was cut.
    """
    check_unchanged(part.url, part.num_bytes, part.version)
    read = _parquet_rows(part, parser, prompt_column) if part.kind == "parquet" else None
    num_rows = 0
    for row in read or _text_rows(part, parser):
        num_rows += 1
        yield row
    if num_rows != part.num_rows:
        raise ValueError(
            f"input: {part.url} was changed while the job ran: {num_rows} rows from row "
            f"{part.first_line} on, and {part.num_rows} when it was cut"
        )


def _text_rows(part: Part, parser: RowParser) -> Iterator[Row | BadLine]:
    with open_input(part.url) as opened, naming(part.url):
        text = content(opened, part.kind == "packed")
        text.seek(part.start)
        left = part.stop - part.start
        for number, (raw, num_bytes) in enumerate(
            split_lines(text, MAX_LINE_BYTES), part.first_line
        ):
            if raw is None or raw.strip():
                yield parse_line(parser, number, raw, MAX_LINE_BYTES)
            left -= num_bytes
            if left <= 0:
                return


def _parquet_rows(
    part: Part, parser: RowParser, prompt_column: str | None
) -> Iterator[Row | BadLine]:
    number = part.first_line
    last = part.first_line + part.num_rows - 1
    with open_input(part.url) as opened:
        lines = parquet_rows(opened, part.start, part.stop, prompt_column, part.url)
        while number <= last:
            try:
                line = next(lines)
            except StopIteration:
                return
            except Exception as error:  # pyarrow has many; each is of what cannot be read
                where = f"rows {number} to {last} of {part.label}"
                message = f"{where} cannot be read: {' '.join(str(error).split())}"
                for broken in range(number, last + 1):
                    yield BadLine(broken, None, None, message)
                return
            if isinstance(line, BadLine):
                yield line
            else:
                yield parse_line(parser, number, line.encode(), MAX_LINE_BYTES)
            number += 1
