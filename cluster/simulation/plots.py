"""The picture of a simulation: how long users wait, and new tokens a second over time."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .measures import Measured, Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 400


def draw(
    title: str, found: Mapping[str, Measured], objective: Objective, fault_seconds: Sequence[float]
) -> "Figure":
    """Three panels: shares of first tokens and of gaps by how long they took; tokens/s over time.

    Args:
        title: of the figure.
        found: what was measured, by label.
        objective: drawn as lines.
        fault_seconds: when something died; drawn as ticks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title)
    first, gaps, over_time = figure.subplots(1, 3)
    for label, each in found.items():
        _draw_first(first, label, each)
        seconds, shares = each.gaps.shares()
        shown = (shares > 0.001) & (shares < 0.9999)
        gaps.plot(1000 * seconds[shown], 100 * shares[shown], label=label)
        times = each.bin_seconds * (np.arange(len(each.tokens_per_second)) + 0.5)
        over_time.plot(times, each.tokens_per_second, label=label)
    for axes, limit in ((first, objective.ttft_seconds), (gaps, 1000 * objective.itl_seconds)):
        axes.axvline(limit, linestyle="--", color="0.4")
        axes.set_xscale("log")
        axes.set_ylim(0, 102)
    if fault_seconds:
        at = over_time.get_ylim()[1] * 0.02
        over_time.plot(fault_seconds, [at] * len(fault_seconds), "r|", label="faults")
    over_time.set_ylim(bottom=0)
    handles, labels = over_time.get_legend_handles_labels()
    limit_line = first.get_lines()[-1]
    figure.legend(
        [*handles, limit_line], [*labels, "objective"], loc="outside lower center", ncols=4
    )
    _name(first, "seconds to the first token", "% of requests")
    _name(gaps, "milliseconds between tokens", "% of tokens")
    _name(over_time, "seconds", "new tokens/s")
    return figure


def _draw_first(axes: "Axes", label: str, each: Measured) -> None:
    if len(each.ttft) == 0:
        return
    places = np.unique(np.linspace(0, len(each.ttft) - 1, _POINTS).astype(int))
    axes.plot(each.ttft[places], 100 * (places + 1) / len(each.ttft), label=label)


def _name(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
