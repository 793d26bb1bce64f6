"""Figures of `peers.py`: medians over rounds, ratios, agreement, tables and the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.table import Table

from saqqara.cluster.batch.compare import compare_answers
from saqqara.evaluation.figures.plots import distinct_colours

GIB = 2**30
COLUMNS = 2  # panels of a picture side by side
BUSY_SHARE = 0.05  # of the machine: above it, a figure is marked as disturbed


@dataclass(frozen=True)
class Sample:
    """One engine's answer to one workload in one round."""

    workload: str
    engine: str
    round: int
    wall_seconds: float
    prefill_seconds: float
    output_token_ids: list[list[int]]
    peak_rss_bytes: int
    foreign_cpu_share: float
    preemptions: int | None = None
    first_token_seconds: list[float] | None = None
    cached_tokens: int | None = None

    @property
    def at(self) -> tuple[str, str]:
        """Workload and engine."""
        return self.workload, self.engine

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens by the time after the last first token."""
        seconds = self.wall_seconds - self.prefill_seconds
        return sum(map(len, self.output_token_ids)) / seconds if seconds > 0 else float("nan")

    def __str__(self) -> str:
        told = "" if self.preemptions is None else f", {self.preemptions} preempted"
        return (
            f"{self.wall_seconds:.1f} s (prefill {self.prefill_seconds:.1f} s, "
            f"decode {self.decode_tokens_per_second:.0f} tok/s, "
            f"{self.peak_rss_bytes / GIB:.1f} GiB, foreign CPU {self.foreign_cpu_share:.0%}{told})"
        )


def is_ours(engine: str) -> bool:
    """Whether an engine is Saqqara."""
    return engine.startswith("saqqara:")


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Figures by workload: of each engine, ratios to ours, and agreement of each pair.

    Times and rates are medians over the rounds, memory and foreign CPU the largest. A ratio is the
    median wall time of an engine over that of one of ours. Answers are those of the first round.
    """
    result: dict[str, Any] = {}
    for workload in dict.fromkeys(sample.workload for sample in samples):
        here = [sample for sample in samples if sample.workload == workload]
        by_engine = {
            name: [sample for sample in here if sample.engine == name]
            for name in dict.fromkeys(sample.engine for sample in here)
        }
        engines = {name: _figures(of_engine) for name, of_engine in by_engine.items()}
        answers = {name: of_engine[0].output_token_ids for name, of_engine in by_engine.items()}
        result[workload] = {
            "engines": engines,
            "ratios": {
                ours: {
                    name: figures["wall_seconds"] / engines[ours]["wall_seconds"]
                    for name, figures in engines.items()
                    if name != ours
                }
                for ours in filter(is_ours, engines)
            },
            "agreement": {
                a: {b: compare_answers(answers[a], answers[b]).to_dict() for b in answers}
                for a in answers
            },
            "output_token_ids": answers,
        }
    return result


def _figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Of one engine on one workload."""
    return {
        "rounds": len(samples),
        "wall_seconds": median(s.wall_seconds for s in samples),
        "prefill_seconds": median(s.prefill_seconds for s in samples),
        "decode_tokens_per_second": median(s.decode_tokens_per_second for s in samples),
        "peak_rss_bytes": max(s.peak_rss_bytes for s in samples),
        "foreign_cpu_share": max(s.foreign_cpu_share for s in samples),
        "same_answers_in_all_rounds": all(
            s.output_token_ids == samples[0].output_token_ids for s in samples
        ),
        "wall_seconds_of_rounds": [s.wall_seconds for s in samples],
        "preemptions_of_rounds": [s.preemptions for s in samples],
        "prefill_seconds_of_rounds": [s.prefill_seconds for s in samples],
    }


def plain(ours: Sequence[str]) -> list[str]:
    """Those of our engines that others are held against: without settings of their own, if any."""
    return [name for name in ours if "/" not in name] or list(ours[:1])


def tables(result: dict[str, Any]) -> list[Table]:
    """One table for each workload, with figures, ratios to ours (see `plain`), and agreement."""
    return [
        _table(result["workloads"][name], figures) for name, figures in result["results"].items()
    ]


def _table(workload: dict[str, Any], figures: dict[str, Any]) -> Table:
    engines: dict[str, Any] = figures["engines"]
    reference = next(iter(engines))
    table = Table(
        title=f"{workload['name']}: {title_of(workload)}",
        caption=f"x NAME: wall time over that of saqqara:NAME; agreement with {reference}; "
        f"*: more than {BUSY_SHARE:.0%} of the machine was busy with something else",
    )
    table.add_column("engine", overflow="fold")
    shown = {ours: figures["ratios"][ours] for ours in plain(list(figures["ratios"]))}
    columns = ["wall s", "low - high", "prefill s", "decode tok/s", "GiB"]
    preempted = {name: _preempted(one["preemptions_of_rounds"]) for name, one in engines.items()}
    if any(preempted.values()):
        columns.append("preempted")
    columns += [f"x {ours.removeprefix('saqqara:')}" for ours in shown]
    for column in [*columns, "same prefix", "same answers"]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in engines.items():
        walls = one["wall_seconds_of_rounds"]
        agreement = figures["agreement"][name][reference]
        mark = "*" if one["foreign_cpu_share"] > BUSY_SHARE else ""
        cells = [f"{one['wall_seconds']:.2f}{mark}", f"{min(walls):.2f} - {max(walls):.2f}"]
        cells += [f"{one['prefill_seconds']:.2f}", f"{one['decode_tokens_per_second']:.0f}"]
        cells.append(f"{one['peak_rss_bytes'] / GIB:.2f}")
        if any(preempted.values()):
            cells.append(preempted[name])
        cells += [f"{ratios.get(name, 1.0):.2f}" for ratios in shown.values()]
        cells.append(f"{agreement['common_prefix_share']:.0%}")
        cells.append(f"{agreement['identical']} of {agreement['answers']}")
        table.add_row(name, *cells)
    return table


def _preempted(rounds: Sequence[int | None]) -> str:
    """How often, as a median over the rounds; nothing where an engine does not tell, or never."""
    known = [count for count in rounds if count is not None]
    return f"{median(known):.0f}" if any(known) else ""


def title_of(workload: dict[str, Any]) -> str:
    """A workload in words."""
    return "{num_requests} requests x {prompt_tokens:,} in, {new_tokens:,} out".format(**workload)


def _work(workload: dict[str, Any]) -> tuple[int, int]:
    """Tokens in and out of a workload, by which pictures are ordered."""
    count = workload["num_requests"]
    return count * workload["prompt_tokens"], count * workload["new_tokens"]


def plot(path: Path, result: dict[str, Any]) -> None:
    """Wall seconds of each engine as bars, prefill and the rest apart, one panel a workload.

    An engine has the same colour in every panel, and no other has it; the least work comes first.
    """
    found = result["results"]
    if not found:
        return
    names = sorted(found, key=lambda name: _work(result["workloads"][name]))
    known = list(dict.fromkeys(engine for name in names for engine in found[name]["engines"]))
    colour_of = dict(zip(known, distinct_colours(len(known)), strict=True))
    rows = -(-len(names) // COLUMNS)
    columns = min(len(names), COLUMNS)
    height = 1.2 + 0.32 * len(known)
    figure, panels = plt.subplots(
        rows, columns, figsize=(6.5 * columns, height * rows), squeeze=False
    )
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels.flat, names, strict=False):
        engines = found[name]["engines"]
        labels = list(engines)[::-1]
        prefill = [engines[label]["prefill_seconds"] for label in labels]
        wall = [engines[label]["wall_seconds"] for label in labels]
        colours = [colour_of[label] for label in labels]
        rest = [a - b for a, b in zip(wall, prefill, strict=True)]
        panel.barh(labels, prefill, color=colours)
        bars = panel.barh(labels, rest, left=prefill, color=colours, alpha=0.5)
        panel.bar_label(bars, [f"{seconds:.1f}" for seconds in wall], padding=3)
        title = title_of(result["workloads"][name])
        panel.set(title=title, xlabel="s, prefill dark", xlim=(0, 1.25 * max(wall)))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
