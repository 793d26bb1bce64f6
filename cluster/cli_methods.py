"""What `saqqara methods` prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from saqqara.compression.methods import MethodRow
from saqqara.compression.registry import SCORES, SHAPES

from .console import console

TABLE_WIDTH = 90
"""Columns below which cells would be a word wide; then every method is a paragraph."""


def print_methods(rows: Sequence[MethodRow], target: Console | None = None) -> None:
    """Print the methods as a table, or as paragraphs where that is too wide."""
    target = target or console()
    if target.width >= TABLE_WIDTH:
        target.print(_table(rows))
    else:
        for row in rows:
            target.print(row.name, style="bold", highlight=False)
            for what in ("keeps", "needs", "costs"):
                target.print(f"  {what}: {getattr(row, what)}", highlight=False)
    for line in _notes():
        target.print(line, highlight=False, markup=False)


def _table(rows: Sequence[MethodRow]) -> Table:
    table = Table("--retention", "keeps", "needs", "costs")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(row.name, row.keeps, row.needs, row.costs)
    return table


def _notes() -> list[str]:
    return [
        "",
        "All with a budget also keep the first tokens (sinks) and the last (window). A budget is a "
        "number of tokens per layer and kv head, or a share of the prompt: --budget 25%.",
        f"Any score goes with any shape as <score>-<shape>: {', '.join(SCORES)}; "
        f"{', '.join(SHAPES)} (tova with the first three).",
        "A profile takes some minutes: saqqara eval calibrate --model FOLDER --out profile.json; "
        "without one take recommended-adaptive.",
    ]
