"""Where a step's time goes: one engine in this process, every part of every step timed.

The parts of a layer are *project* (norm, q/k/v, rotation, storing), *attention*, *retain* (scores,
selection, writing to pages) and *finish* (output projection, norm, MLP); *reserve* takes pages for
a decode step, *head* samples, and *host* is what lies outside the worker: scheduler, tokenizer,
metrics.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.workers.clock import Span
from saqqara.workers.models.spec import load_spec
from saqqara.workers.worker import Worker

from .throughput import Workload

_LAYER_PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the profile: a part of a phase, over all steps of that kind."""

    phase: str
    part: str
    seconds: float
    num_steps: int


def profile(config: EngineConfig, workload: Workload) -> tuple[list[Row], list[Span]]:
    """Run a workload step by step.

    Returns:
        Where the time went, and every single span (for `write_trace`).

    Raises:
        ValueError: a setting or a prompt is wrong; more than one rank is asked for.
    """
    if config.executor != "local":
        raise ValueError("executor: a profile runs in this process; use executor='local'")
    executor = LocalExecutor(config)
    engine = Engine(
        config, executor, Tokenizer.load(config.tokenizer or config.model), load_spec(config.model)
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=workload.new_tokens, ignore_eos=True)
    for number, prompt in enumerate(workload.token_ids(config)):
        engine.add(Request(str(number), prompt, sampling))
    rows, spans = profile_steps(engine, executor.worker)
    engine.shutdown()
    return rows, spans


def profile_steps(engine: Engine, worker: Worker) -> tuple[list[Row], list[Span]]:
    """Step an engine until it has nothing to do, and time every part of every step.

    Args:
        engine: with its requests.
        worker: its only one, in this process; it goes on tracing afterwards.

    Returns:
        Where the time went, and every single span (for `write_trace`).
    """
    spans = worker.trace()
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    steps: dict[str, int] = defaultdict(int)
    seen = 0
    while engine.has_unfinished():
        started = time.perf_counter()
        engine.step()
        spent = time.perf_counter() - started
        new, seen = spans[seen:], len(spans)
        kind = _kind(new)
        steps[kind] += 1
        for phase, part, took in _parts(new):
            seconds[kind, f"{phase} {part}".strip()] += took
        in_worker = sum(span.seconds for span in new if span.name == "total")
        seconds[kind, "host"] += spent - in_worker
    rows = [Row(kind, part, took, steps[kind]) for (kind, part), took in seconds.items()]
    return rows, spans


def profile_table(rows: list[Row]) -> Table:
    """The profile for people: by kind of step, the largest part first."""
    table = Table("step", "part", "ms per step", "share", "steps", title="Where the time goes")
    for column in table.columns[2:]:
        column.justify = "right"
    for kind in dict.fromkeys(row.phase for row in rows):
        mine = sorted((r for r in rows if r.phase == kind), key=lambda r: -r.seconds)
        total = sum(row.seconds for row in mine)
        for row in mine:
            each = 1e3 * row.seconds / row.num_steps
            share = f"{row.seconds / total:.1%}"
            table.add_row(kind, row.part, f"{each:.3f}", share, str(row.num_steps))
        table.add_row(
            kind, "all", f"{1e3 * total / mine[0].num_steps:.3f}", "", "", end_section=True
        )
    return table


def write_trace(spans: list[Span], path: Path) -> None:
    """Write the spans in the trace event format that Perfetto and chrome://tracing show."""
    events: list[dict[str, Any]] = [
        {
            "name": span.name,
            "cat": span.phase,
            "ph": "X",
            "ts": 1e6 * span.start_seconds,
            "dur": 1e6 * span.seconds,
            "pid": 0,
            "tid": 0,
        }
        for span in spans
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text({"traceEvents": events}), encoding="utf-8")


def _kind(spans: list[Span]) -> str:
    """What kind of step these spans are of."""
    phases = [phase for phase in _LAYER_PHASES if any(span.name == phase for span in spans)]
    return " + ".join(phases) or "other"


def _parts(spans: list[Span]) -> list[tuple[str, str, float]]:
    """(phase, part, seconds) that add up to the worker's time."""
    parts = [(s.phase, s.name, s.seconds) for s in spans if s.name != s.phase]
    phases = [(s.name, s.seconds) for s in spans if s.name == s.phase and s.name != "total"]
    rest = sum(s.seconds for s in spans if s.name == "total") - sum(took for _, took in phases)
    out = list(parts)
    for phase, took in phases:
        inside = sum(t for p, _, t in parts if p == phase)
        out.append((phase, "other" if inside else "", took - inside))
    out.append(("worker", "other", rest))
    return out
