"""Pictures of results. Figures are made without pyplot, so nothing global is set."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from saqqara.compression.retention import Retention
from saqqara.evaluation.result import Result
from saqqara.workers.models.spec import ModelSpec

from .summary import main_figure, summarise

SUFFIXES = (".png", ".svg", ".pdf")
MANY_SERIES = 4  # more have their legend beside the picture, where it hides no point
MARKS, LINES = "osD^", ("-", "--", ":", "-.")
LARGEST_LISTS = ("tab10", "tab20")  # colours that were chosen to be told apart, the fewest first
COLUMNS = 3
COLOURS = "RdYlGn"
DARK = 0.12  # as near to an end of these colours, black is hard to read
LOWER_IS_BETTER = frozenset({"perplexity"})

Floats = NDArray[np.float64]


def check_plot_file(path: Path) -> None:
    """Raise a ValueError unless a plot can have this name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"plot: {path} must end in {', '.join(SUFFIXES)}")


def plot(result: Result) -> Figure:
    """The picture that says most about a task: heat maps where there is a grid, else a curve."""
    if result.task == "needle":
        return needle_maps(result)
    if len(result.groups) > 1:
        return group_map(result)
    return quality_curve(result)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the name's ending says the format."""
    check_plot_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def distinct_colours(count: int) -> list[str]:
    """So many colours, none twice, as `#rrggbb`: those of a list, else steps around the wheel."""
    for name in LARGEST_LISTS:
        listed = [to_hex(colour) for colour in map(colormaps[name], range(colormaps[name].N))]
        if count <= len(listed):
            return listed[:count]
    # Neighbours in a legend differ in lightness, too.
    hues = np.arange(count) / count
    return [to_hex(hsv_to_rgb((hue, 0.85, (0.9, 0.55)[i % 2]))) for i, hue in enumerate(hues)]


def needle_maps(result: Result) -> Figure:
    """Share of needles found by depth and length, one panel for each setting."""
    lengths = sorted({o.details["length"] for o in result.outcomes})
    depths = sorted({o.details["depth"] for o in result.outcomes})
    figure, panels = _panels(len(result.labels), width=0.7 * len(lengths) + 2.2, height=3.0)
    for panel, label in zip(panels, result.labels, strict=False):
        found = np.full((len(depths), len(lengths)), np.nan)
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                scores = [
                    o.score
                    for o in result.of(label)
                    if (o.details["depth"], o.details["length"]) == (depth, length)
                ]
                found[row, column] = np.mean(scores)
        _heat_map(panel, found, [f"{d:.0%}" for d in depths], [f"{n:,}" for n in lengths])
        panel.set_title(f"{label}: {np.mean([o.score for o in result.of(label)]):.0%}", fontsize=9)
        panel.set_xlabel("prompt tokens")
        panel.set_ylabel("depth")
    return figure


def group_map(result: Result) -> Figure:
    """Main figure of every setting in every group."""
    columns = [summarise(result, group) for group in result.groups]
    values = np.array([[main_figure(row)[1].value for row in column] for column in columns]).T
    width, height = 0.9 * len(result.groups) + 3, 0.35 * len(result.labels) + 2.2
    figure, panels = _panels(1, width, height)
    _heat_map(panels[0], values, result.labels, result.groups)
    panels[0].tick_params(axis="x", rotation=40)
    panels[0].set_title(f"{result.task}: {main_figure(columns[0][0])[0]}", fontsize=10)
    return figure


def quality_curve(result: Result) -> Figure:
    """Main figure against the share of keys and values kept, with 95% intervals."""
    figure, panels = _panels(1, 7, 4.5)
    panel = panels[0]
    full, *rows = summarise(result)
    name, reference, _ = main_figure(full)
    panel.axhline(reference.value, color="black", linestyle="--", linewidth=1, label="full")
    all_series = dict.fromkeys(_series(row.retention) for row in rows)
    colours = distinct_colours(len(all_series))
    for number, series in enumerate(all_series):
        mine = sorted(
            (row for row in rows if _series(row.retention) == series), key=lambda r: r.kept_share
        )
        estimates = [main_figure(row)[1] for row in mine]
        values = [estimate.value for estimate in estimates]
        below = np.nan_to_num([max(e.value - e.low, 0.0) for e in estimates])
        above = np.nan_to_num([max(e.high - e.value, 0.0) for e in estimates])
        kept = [100 * row.kept_share for row in mine]
        panel.errorbar(
            kept,
            values,
            [below, above],
            color=colours[number],
            marker=MARKS[number % len(MARKS)],
            linestyle=LINES[number // len(MARKS) % len(LINES)],
            elinewidth=0.6,
            capsize=2,
            label=series,
        )
    panel.set_xlabel("keys and values kept, % of full")
    panel.set_ylabel(name)
    panel.set_title(f"{result.task}{_direction(result.task)}", fontsize=10)
    panel.grid(alpha=0.3)
    if len(all_series) > MANY_SERIES:
        figure.set_figwidth(9)
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    else:
        panel.legend(fontsize=8)
    return figure


def pyramid(settings: Sequence[Retention], prompt_tokens: int, spec: ModelSpec) -> Figure:
    """Kept tokens by layer and kv head, one panel for each setting (expected, where ragged)."""
    figure, panels = _panels(len(settings), width=2.9, height=3.4)
    for panel, setting in zip(panels, settings, strict=False):
        kept = setting.row_tokens(prompt_tokens, spec.layers, spec.num_kv_heads)
        image = panel.imshow(kept, aspect="auto", origin="lower", vmin=0, vmax=prompt_tokens)
        figure.colorbar(image, ax=panel)
        shared = kept[list(spec.layers.global_layers)]  # the others hold their window
        mean = shared.mean() if len(shared) else kept.mean()
        panel.set_title(f"{setting.label}: {mean:.0f} of {prompt_tokens}", fontsize=9)
        panel.set_xlabel("kv head")
        panel.set_ylabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of that size (inches), some in a row."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.set_axis_off()
    return figure, panels


def _heat_map(panel: Axes, values: Floats, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Shares as colours, with the number in each field."""
    panel.imshow(values, aspect="auto", cmap=COLOURS, vmin=0, vmax=1)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.set_xticks(range(len(columns)), columns, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "black" if DARK < value < 1 - DARK else "white"
            panel.text(
                column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=colour
            )


def _series(label: str) -> str:
    """A setting's label without its budget."""
    return re.sub(r"@[^,]+", "", label)


def _direction(task: str) -> str:
    return " (lower is better)" if task in LOWER_IS_BETTER else ""
