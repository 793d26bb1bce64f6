"""The picture of a plan: sequences at once and tokens a second against the budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from saqqara.compression.retention import Retention
from saqqara.workers.mesh.layout import MeshLayout

from .planner import FULL, LayoutPlan, Question, Rates, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
BUDGETS = ("5%", "10%", "15%", "20%", "25%", "35%", "50%", "65%", "80%", "100%")


@dataclass(frozen=True, slots=True)
class Curve:
    """Rates of one layout by budget, as a share of the prompt; and those of full retention."""

    shares: tuple[float, ...]
    rates: tuple[Rates | None, ...]
    full: Rates | None


def curve(question: Question, best: LayoutPlan, budgets: Sequence[str] = BUDGETS) -> Curve:
    """The best layout's rates at several budgets of the question's retention.

    Raises:
        ValueError: the retention takes no budget.
    """
    retention = question.workload.retention
    if retention.score is None:
        raise ValueError(
            f"plot: it is drawn over budgets, and {retention.method!r} takes none; give a "
            "--retention that does"
        )
    layout, replicas = MeshLayout(best.tensor, best.pipeline), best.replicas

    def under(retention: Retention) -> Rates | None:
        workload = replace(question.workload, retention=retention)
        return estimate(replace(question, workload=workload), layout, replicas)

    prompt = question.workload.prompt_tokens
    kept = [Retention.parse(retention, budget) for budget in budgets]
    shares = tuple(each.budget_tokens(prompt) / prompt for each in kept)
    return Curve(shares, tuple(map(under, kept)), under(FULL))


def check_plot_file(path: Path) -> None:
    """Raise a ValueError unless a plot can have this name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"plot: {path} must end in {', '.join(SUFFIXES)}")


def draw(title: str, points: Curve, replicas: int) -> "Figure":
    """Two panels over the budget: sequences of all replicas, and new tokens a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    labels = ("sequences at once", "new tokens/s")
    for axes, label, of in zip(panels, labels, (_sequences, _tokens), strict=True):
        known = [
            (100 * share, of(rates, replicas))
            for share, rates in zip(points.shares, points.rates, strict=True)
            if rates is not None
        ]
        axes.plot(*zip(*known, strict=True), marker="o", label="retention")
        if points.full is not None:
            axes.axhline(of(points.full, replicas), linestyle="--", color="0.4", label="full")
        axes.set_xlabel("budget, % of the prompt")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure; the name's ending says the format."""
    check_plot_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _sequences(rates: Rates, replicas: int) -> float:
    return rates.sequences * replicas


def _tokens(rates: Rates, replicas: int) -> float:
    return rates.output_tokens_per_second
