"""What `saqqara methods` prints."""

import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich.table import Table

from saqqara.compression.methods import MethodRow
from saqqara.compression.scores import SCORES
from saqqara.compression.shapes import SHAPES

from .tables import print_table, terminal_width

TABLE_WIDTH = 90
"""Columns below which cells would be a word wide; then every method is a paragraph."""
FILE_WIDTH = 120
"""Columns where there is no terminal."""


def print_methods(
    rows: Sequence[MethodRow], *, file: TextIO | None = None, width: int | None = None
) -> None:
    """Print the methods as a table, or as paragraphs where that is too wide."""
    file = sys.stdout if file is None else file
    width = width or terminal_width(file) or FILE_WIDTH
    if width >= TABLE_WIDTH:
        print_table(_table(rows), file=file, width=width)
    else:
        for row in rows:
            file.write(f"{row.name}\n")
            for what in ("keeps", "needs", "costs"):
                file.write(_wrapped(f"{what}: {getattr(row, what)}", width, "  "))
    for note in _notes():
        file.write("\n" + _wrapped(note, width))


def _table(rows: Sequence[MethodRow]) -> Table:
    table = Table("--retention", "keeps", "needs", "costs")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(row.name, row.keeps, row.needs, row.costs)
    return table


def _wrapped(text: str, width: int, indent: str = "") -> str:
    following = indent + "  " if indent else ""
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=following)
    return "\n".join(lines) + "\n"


def _notes() -> list[str]:
    return [
        "All with a budget also keep the first tokens (sinks) and the last (window). A budget is a "
        "number of tokens per layer and kv head, or a share of the prompt: --budget 25%.",
        f"Any score goes with any shape as <score>-<shape>: {', '.join(SCORES)}; "
        f"{', '.join(SHAPES)} (tova with the first three).",
        "A profile takes some minutes, once per model: saqqara eval calibrate --model FOLDER; the "
        "recommended presets find it from then on, and are recommended-adaptive without one.",
    ]
