"""Figures with intervals from the outcomes of a task, and the tables that show them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from saqqara.evaluation.result import Outcome, Result

from .interval import Estimate, bootstrapped, proportion

Figures = Callable[[Sequence[Outcome], Sequence[Outcome]], dict[str, tuple[Estimate, str]]]
"""Of a setting's and full's outcomes on the same prompts: by name, estimate and number format."""

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One retention setting in a summary."""

    retention: str
    kept_share: float
    figures: dict[str, tuple[Estimate, str]]


def score_figures(
    mine: Sequence[Outcome], full: Sequence[Outcome]
) -> dict[str, tuple[Estimate, str]]:
    """Mean score of tasks whose scores lie in [0, 1]."""
    return {"score": (proportion([o.score for o in mine]), ".1%")}


def perplexity_figures(
    mine: Sequence[Outcome], full: Sequence[Outcome]
) -> dict[str, tuple[Estimate, str]]:
    """Perplexity, and its ratio to full's: windows are drawn in pairs with full's."""
    differences = [a.score - b.score for a, b in zip(mine, full, strict=True)]
    return {
        "ratio to full": (bootstrapped(differences, np.exp), ".3f"),
        "perplexity": (bootstrapped([o.score for o in mine], np.exp), ".2f"),
        "NLL, nats per token": (bootstrapped([o.score for o in mine]), ".3f"),
    }


def agreement_figures(
    mine: Sequence[Outcome], full: Sequence[Outcome]
) -> dict[str, tuple[Estimate, str]]:
    """Top-1 agreement and divergence along full's answers; prompts are what is drawn."""
    divergences = [float(o.details["divergence"]) for o in mine]
    differences = [float(o.details["logprob_difference"]) for o in mine]
    identical = [float(o.details["identical"]) for o in mine]
    return {
        "top-1 agreement": (bootstrapped([o.score for o in mine]), ".1%"),
        "KL from full, nats": (bootstrapped(divergences), ".3f"),
        "logprob of full's token - full's": (bootstrapped(differences), ".3f"),
        "greedy answers identical": (proportion(identical), ".0%"),
    }


FIGURES: dict[str, Figures] = {
    "needle": score_figures,
    "ruler": score_figures,
    "longbench": score_figures,
    "perplexity": perplexity_figures,
    "agreement": agreement_figures,
}


def summarise(result: Result, group: str | None = None) -> list[Row]:
    """Figures of every setting, `full` first, over all prompts or those of one group."""
    figures = FIGURES[result.task]
    full = result.of("full", group)
    return [
        Row(label, result.kept_shares[label], figures(result.of(label, group), full))
        for label in result.labels
    ]


def main_figure(row: Row) -> tuple[str, Estimate, str]:
    """Name, estimate and format of the figure that plots show."""
    name = next(iter(row.figures))
    return (name, *row.figures[name])


def overall_cells(result: Result) -> list[list[str]]:
    """Header and rows: every setting with its kept bytes and all figures over all prompts.

    Where some layers hold a window in any case, their bytes stand beside those that are kept.
    """
    rows = summarise(result)
    local = f" + {result.local_kv_bytes / MIB:.1f}" if result.local_kv_bytes else ""
    cells = [["retention", "kept", "KV per prompt", "prompts", *rows[0].figures]]
    for row in rows:
        size = f"{result.full_kv_bytes * row.kept_share / MIB:.1f}{local} MiB"
        num = next(iter(row.figures.values()))[0].num_samples
        values = [estimate.text(form) for estimate, form in row.figures.values()]
        cells.append([row.retention, f"{row.kept_share:.1%}", size, str(num), *values])
    return cells


def group_cells(result: Result) -> list[list[str]]:
    """Header and rows: the main figure of every setting in each group."""
    columns = [summarise(result, group) for group in result.groups]
    cells = [["retention", *result.groups]]
    for at, label in enumerate(result.labels):
        found = [main_figure(column[at]) for column in columns]
        cells.append([label, *(estimate.text(form) for _, estimate, form in found)])
    return cells


def tables(result: Result) -> list[Table]:
    """The summary for people: split by group first (if there are several), then the whole."""
    found = []
    if len(result.groups) > 1:
        cells = group_cells(result)
        if len(cells[0]) > len(cells):  # more groups than settings read better downwards
            cells = [list(column) for column in zip(*cells, strict=True)]
        found.append(_table(f"{result.task}, by group, with 95% intervals", cells))
    found.append(_table(f"{result.task}, with 95% intervals", overall_cells(result)))
    return found


def _table(title: str, cells: list[list[str]]) -> Table:
    table = Table(title=title)
    table.add_column(cells[0][0], no_wrap=True)
    for name in cells[0][1:]:
        table.add_column(name, justify="right", overflow="fold")
    for row in cells[1:]:
        table.add_row(*row)
    return table
