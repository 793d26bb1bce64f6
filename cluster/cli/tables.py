"""Prints tables so that every cell can be read, on a terminal of any width and in a file.

Rich alone makes columns narrower until the table fits, down to nothing, and cuts numbers short.
Here a table that is too wide is split instead: each part has the first column again.
"""

import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

_NATURAL = 100_000  # columns of a console that no table is too wide for


def print_table(table: Table, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print a table; no cell is dropped or cut short.

    Args:
        table: its cells are strings; the first column says what each row is.
        file: where to print; default: standard output.
        width: columns that lines may have; default: those of the terminal, or of `COLUMNS`, and no
            limit where there is neither. A line is longer only if its longest words are.
    """
    file = sys.stdout if file is None else file
    width = width or terminal_width(file)
    measuring = Console(file=file, width=_NATURAL)
    parts = [table] if width is None else _split(table, measuring, width)
    for part in parts:
        # A part that cannot be as narrow as the terminal is printed whole, and wraps there.
        needed = measuring.measure(part).minimum
        console = Console(file=file, width=_NATURAL if width is None else max(width, needed))
        console.print(part, crop=False)


def terminal_width(file: TextIO) -> int | None:
    """Columns of the terminal that `file` is, or what `COLUMNS` says; None if neither is known."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(file.fileno()).columns or None
    except (OSError, ValueError):
        return None


def _split(table: Table, console: Console, width: int) -> list[Table]:
    """The table in as few parts as fit side by side, its first column in each."""
    columns = [_whole_words(table, column, console) for column in table.columns]
    if console.measure(table).maximum <= width or len(columns) < 2:
        return [_part(table, columns)]
    parts: list[list[Column]] = []
    for column in columns[1:]:
        wider = _part(table, [*(parts[-1] if parts else columns[:1]), column])
        if parts and console.measure(wider).maximum <= width:
            parts[-1].append(column)
        else:
            parts.append([columns[0], column])
    split = [_part(table, part) for part in parts]
    for part in split[1:]:
        part.title = None
    for part in split[:-1]:
        part.caption = None
    return split


def _part(table: Table, columns: Sequence[Column]) -> Table:
    """A table of some of another's columns."""
    part = copy.copy(table)
    part.columns = [replace(column, _index=at) for at, column in enumerate(columns)]
    return part


def _whole_words(table: Table, column: Column, console: Console) -> Column:
    """A column that may wrap between words, so no word or number in it is ever cut."""
    cells = [column.header, *column.cells]
    if table.show_footer:
        cells.append(column.footer)
    longest = max(Measurement.get(console, console.options, cell).minimum for cell in cells)
    return replace(column, no_wrap=False, overflow="fold", min_width=longest)
