"""A whole report on retention settings: several tasks, cell by cell, and one page that shows them.

A cell is one task (of RULER, one kind of question). Its outcomes are in a JSON file of its own, and
a setting that a cell's file has is not run again, so a report that was stopped goes on where it
was, and settings can be added to it.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.figures import plots
from saqqara.evaluation.figures.report_page import page
from saqqara.evaluation.prompts.haystack import Split
from saqqara.evaluation.prompts.prompt_maker import settings_of
from saqqara.evaluation.tasks.forced_agreement import AgreementTask
from saqqara.evaluation.tasks.needle import NeedleTask
from saqqara.evaluation.tasks.perplexity import PerplexityTask
from saqqara.evaluation.tasks.ruler import RulerTask
from saqqara.evaluation.tasks.ruler_tasks import TASKS
from saqqara.evaluation.tasks.task import Task

from .result import Result
from .session import Session

logger = logging.getLogger(__name__)

KINDS = ("needle", "ruler", "perplexity", "agreement")


@dataclass(frozen=True, slots=True)
class ReportPlan:
    """What a report runs.

    Attributes:
        kinds: of tasks, of `KINDS`.
        length: of prompts (of contexts, for perplexity), in tokens.
        num_samples: prompts per RULER task, and of each other task.
        num_needles: prompts per needle depth; None for `num_samples`.
        seed: of all that is drawn.
        haystack: folder with texts, or None for the topics of `pydoc`.
        split: the half of the text.
    """

    kinds: tuple[str, ...] = KINDS
    length: int = 2048
    num_samples: int = 10
    num_needles: int | None = None
    seed: int = 0
    haystack: Path | None = None
    split: Split = "report"

    def cells(self) -> dict[str, Task]:
        """The tasks by the names of their files.

        Raises:
            ValueError: an unknown kind.
        """
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"tasks: unknown {kind!r}; known: {', '.join(KINDS)}")
        text: dict[str, Any] = {"haystack": self.haystack, "split": self.split}
        common: dict[str, Any] = {**text, "num_samples": self.num_samples, "seed": self.seed}
        found: dict[str, Task] = {}
        if "needle" in self.kinds:
            needles = {**common, "num_samples": self.num_needles or self.num_samples}
            found["needle"] = NeedleTask(lengths=(self.length,), **needles)
        if "ruler" in self.kinds:
            for task in TASKS:
                found[f"ruler-{task}"] = RulerTask((task,), (self.length,), **common)
        if "perplexity" in self.kinds:
            found["perplexity"] = PerplexityTask(self.length, num_samples=self.num_samples, **text)
        if "agreement" in self.kinds:
            found["agreement"] = AgreementTask(self.length, **common)
        return found


def run_report(
    config: EngineConfig, retentions: Sequence[Retention], plan: ReportPlan, folder: Path
) -> tuple[list[Result], Path]:
    """Run what is missing, and write `<cell>.json`, `<picture>.png` and `report.html`.

    Returns:
        The results by task, the cells of RULER in one, and the page.

    Raises:
        ValueError: a setting is wrong, or a file in the folder is of other settings.
        RuntimeError: the engine failed.
    """
    cells = plan.cells()
    results: dict[str, list[Result]] = {}
    with Session(config, retentions) as session:
        done = {name: _done(session, task, _file(folder, name)) for name, task in cells.items()}
        missing = {name: _missing(session, result) for name, result in done.items()}
        logger.info("%d of %d cells are to be run", sum(map(bool, missing.values())), len(cells))
        for name, task in cells.items():
            file, result = _file(folder, name), done[name]
            if missing[name]:
                added = task.run(session.comparing(missing[name]))
                (added if result is None else result.joined(added)).write(file)
                logger.info("%s: written to %s", name, file)
            asked = Result.read(file).only([one.label for one in session.retentions])
            results.setdefault(task.name, []).append(asked)
        merged = [merge(parts) for parts in results.values()]
        pictures = _pictures(merged, session, plan.length)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    file = folder / "report.html"
    file.write_text(page(merged, pictures), encoding="utf-8")
    return merged, file


def merge(parts: Sequence[Result]) -> Result:
    """Results of one task on different prompts, as one; shares are weighted by prompt tokens."""
    first = parts[0]
    if len(parts) == 1:
        return first
    weights = [sum(o.prompt_tokens for o in part.of("full")) for part in parts]
    counts = [len(part.of("full")) for part in parts]
    outcomes = []
    for at, part in enumerate(parts):
        outcomes += [replace(o, sample=o.sample + sum(counts[:at])) for o in part.outcomes]
    return replace(
        first,
        kept_shares={
            label: sum(w * part.kept_shares[label] for w, part in zip(weights, parts, strict=True))
            / sum(weights)
            for label in first.labels
        },
        full_kv_bytes=sum(n * part.full_kv_bytes for n, part in zip(counts, parts, strict=True))
        / sum(counts),
        local_kv_bytes=sum(n * part.local_kv_bytes for n, part in zip(counts, parts, strict=True))
        / sum(counts),
        outcomes=tuple(outcomes),
    )


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _done(session: Session, task: Task, file: Path) -> Result | None:
    """What a cell's file holds, or None; an error if it was made with other settings."""
    if not file.exists():
        return None
    found = Result.read(file)
    wanted = json.loads(json.dumps(session.identity(task.name, settings_of(task))))
    retentions = wanted.pop("retentions")
    wrong = [field for field, value in wanted.items() if getattr(found, field) != value]
    if any(
        found.retentions[label] != retentions.get(label, found.retentions[label])
        for label in found.labels
    ):
        wrong.append("retentions")
    if wrong:
        raise ValueError(
            f"out: {file} was made with other {wrong[0]}; give another folder, or remove the file"
        )
    return found


def _missing(session: Session, result: Result | None) -> list[Retention]:
    """The settings whose outcomes a cell lacks."""
    there = [] if result is None else result.labels
    return [one for one in session.retentions if one.label not in there]


def _pictures(results: Sequence[Result], session: Session, length: int) -> dict[str, bytes]:
    """PNG by name, in the order of the page."""
    found = {}
    for result in results:
        if len(result.labels) > 1:
            found[f"{result.task}-curve"] = plots.png(plots.quality_curve(result))
        if result.task == "needle" or len(result.groups) > 1:
            found[f"{result.task}-map"] = plots.png(plots.plot(result))
    found["pyramid"] = plots.png(plots.pyramid(session.retentions, length, session.spec))
    return found
