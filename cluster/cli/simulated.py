"""What `saqqara simulate` does and prints."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from saqqara.cluster.planning.planner import Question
from saqqara.cluster.planning.plots import check_plot_file, save
from saqqara.cluster.planning.workload import Workload
from saqqara.cluster.presets import ModelPresets
from saqqara.cluster.simulation.arrivals import Lengths, Trace, drawn_trace, read_trace
from saqqara.cluster.simulation.deployment import Deployment, simulate
from saqqara.cluster.simulation.faults import Fault, FaultRates, outages, read_faults
from saqqara.cluster.simulation.measures import Measured, Objective, Summary
from saqqara.cluster.simulation.plots import draw
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text
from saqqara.configs.names import did_you_mean
from saqqara.workers.cgroups import usable_cores

from .plan import PlanFlags, from_yaml, question_of
from .tables import print_table

_DRAWN = ("poisson", "bursts")
_REQUESTS, _BURST = 1000, 32


@dataclass(frozen=True, slots=True)
class SimulateFlags:
    """The flags of `saqqara simulate`, as they were written; `planned` are those of `plan`."""

    planned: PlanFlags
    arrivals: str
    rate: float | None
    requests: int | None
    burst_size: int | None
    prompt_tokens: int | None
    new_tokens: int | None
    spread: float | None
    against: str | None
    slo_ttft: float
    slo_itl: float
    faults: Path | None
    rank_mtbf_hours: float | None
    node_mtbf_hours: float | None
    node_return_seconds: float
    detect_seconds: float
    restart_seconds: float
    prefill_quantum: int | None
    max_extend_tokens: int
    seed: int
    processes: int | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the flags ask: one deployment, by the label of its retention, and perhaps another."""

    deployments: Mapping[str, Deployment]
    trace: Trace
    faults: list[Fault]
    objective: Objective

    @property
    def first(self) -> Deployment:
        return next(iter(self.deployments.values()))


def simulate_and_print(flags: SimulateFlags) -> None:
    """Simulate, print, and draw where that is asked for."""
    if flags.planned.plot is not None:
        check_plot_file(flags.planned.plot)
    asked = _asked(flags)
    start = time.perf_counter()
    found = _simulated(flags, asked)
    seconds = time.perf_counter() - start
    if flags.planned.plot is not None:
        starts = [fault.seconds for fault in asked.faults]
        save(draw(_title(flags, asked), found, asked.objective, starts), flags.planned.plot)
    if flags.planned.as_json:
        typer.echo(json_text(_as_data(flags, asked, found), indent=2))
    else:
        _print(flags, asked, found, seconds)


def _asked(flags: SimulateFlags) -> _Asked:
    """What the flags ask.

    Raises:
        ValueError: a flag is wrong; names it.
    """
    trace = None if flags.arrivals in _DRAWN else _from_file(flags)
    planned = flags.planned
    if trace is not None:
        prompt, new = float(trace.prompt_tokens.mean()), float(trace.new_tokens.mean())
        planned = replace(planned, prompt_tokens=round(prompt), new_tokens=round(new))
    question = question_of(planned)
    quantum = "auto" if flags.prefill_quantum is None else flags.prefill_quantum
    first = Deployment.best(question, quantum, flags.max_extend_tokens)
    if trace is None:
        trace = _drawn(flags, first)
    trace.check_lengths(question.sizes.max_model_len)
    deployments = {question.workload.retention.label: first}
    if flags.against is not None:
        other = _against(flags.against, planned.model)
        deployments[other.label] = first.under(other)
    objective = Objective(flags.slo_ttft, flags.slo_itl)
    return _Asked(deployments, trace, _faults(flags, first, float(trace.seconds[-1])), objective)


def _against(text: str, model: str) -> Retention:
    try:
        return ModelPresets(model).resolve(Retention.parse(from_yaml(text)))
    except ValueError as error:
        raise ValueError(f"against: {error}") from None


def _from_file(flags: SimulateFlags) -> Trace:
    path = Path(flags.arrivals)
    if flags.arrivals and path.is_symlink() and not path.exists():
        raise ValueError(f"arrivals: {path} is a link that leads to no file")
    if not flags.arrivals or not path.exists():
        hint = did_you_mean(flags.arrivals, _DRAWN)
        raise ValueError(f"arrivals: {flags.arrivals!r} is neither a way nor a file; {hint}")
    for name in ("rate", "requests", "burst_size", "prompt_tokens", "new_tokens", "spread"):
        if getattr(flags, name) is not None:
            raise ValueError(f"{name}: not with a file of arrivals, which says it for each request")
    return read_trace(path)


def _drawn(flags: SimulateFlags, deployment: Deployment) -> Trace:
    workload, sizes = deployment.question.workload, deployment.question.sizes
    if flags.rate is None:
        assert deployment.layout.kept is not None
        most = deployment.layout.kept.output_tokens_per_second / workload.new_tokens
        raise ValueError(
            f"rate: say how many requests come in a second; these GPUs get through about {most:.3g}"
        )
    if flags.burst_size is not None and flags.arrivals != "bursts":
        raise ValueError("burst_size: only with --arrivals bursts")
    burst_size = flags.burst_size or (_BURST if flags.arrivals == "bursts" else 1)
    lengths = Lengths(
        workload.prompt_tokens, workload.new_tokens, flags.spread or 0.0, sizes.max_model_len
    )
    number = flags.requests or _REQUESTS
    return drawn_trace(number, flags.rate, lengths, flags.seed, burst_size)


def _faults(flags: SimulateFlags, deployment: Deployment, seconds: float) -> list[Fault]:
    """What dies, by a file, and by rates while requests arrive."""
    placement = deployment.placement
    rates = FaultRates(flags.rank_mtbf_hours, flags.node_mtbf_hours, flags.node_return_seconds)
    known = [] if flags.faults is None else read_faults(flags.faults, placement)
    return sorted(known + rates.draw(placement, seconds, flags.seed))


def _simulated(flags: SimulateFlags, asked: _Asked) -> dict[str, Measured]:
    """Each deployment's figures, under a progress bar."""
    placement = asked.first.placement
    lost = outages(asked.faults, placement, flags.detect_seconds, flags.restart_seconds)
    processes = flags.processes or usable_cores()
    columns = (*Progress.get_default_columns()[:-1], TextColumn("{task.completed:,.0f} requests"))
    found: dict[str, Measured] = {}
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        for label, deployment in asked.deployments.items():
            task = bar.add_task(label, total=len(asked.trace))
            found[label] = simulate(
                deployment,
                asked.trace,
                lost,
                asked.objective,
                processes=processes,
                progress=lambda number, task=task: bar.advance(task, number),  # type: ignore[misc]
            )
    return found


def _as_data(flags: SimulateFlags, asked: _Asked, found: Mapping[str, Measured]) -> dict[str, Any]:
    """The simulation as JSON values."""
    question, layout = asked.first.question, asked.first.layout
    return {
        "model": flags.planned.model,
        "gpu": asdict(question.device),
        "num_gpus": question.num_gpus,
        "num_nodes": question.num_nodes,
        "layout": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "replicas": layout.replicas,
        },
        "engine": asdict(question.sizes),
        "factors": asdict(question.factors),
        "calibrated": bool(flags.planned.calibrate),
        "arrivals": flags.arrivals,
        "rate": flags.rate,
        "objective": asdict(asked.objective),
        "faults": [asdict(fault) for fault in asked.faults],
        "detect_seconds": flags.detect_seconds,
        "restart_seconds": flags.restart_seconds,
        "seed": flags.seed,
        "runs": [
            {
                "retention": label,
                "max_num_seqs": asked.deployments[label].max_num_seqs,
                "dollars_per_million": _dollars(question, each.summary),
                **asdict(each.summary),
            }
            for label, each in found.items()
        ],
    }


def _print(
    flags: SimulateFlags, asked: _Asked, found: Mapping[str, Measured], seconds: float
) -> None:
    table = Table("", *found, title=escape(_title(flags, asked)))
    for column in table.columns[1:]:
        column.justify = "right"
    columns = [
        _column(asked, asked.deployments[label], each.summary) for label, each in found.items()
    ]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    print_table(table)
    layout, number = asked.first.layout, len(asked.trace) * len(found)
    typer.echo(
        f"Layout: {layout.tensor} x {layout.pipeline} x {layout.replicas} (tensor x pipeline x "
        f"replicas). Objective: first token within {flags.slo_ttft:g} s, then one every "
        f"{flags.slo_itl:g} s. Simulated {number / seconds:,.0f} requests a second."
    )
    if not flags.planned.calibrate:
        typer.echo(
            "Steps take what a roofline with assumed factors says; --calibrate RUN.json fits it."
        )


def _column(asked: _Asked, deployment: Deployment, found: Summary) -> dict[str, str]:
    """One run's cells by the name of their row."""
    dollars = _dollars(deployment.question, found)
    cells = {
        "slots of a replica": f"{deployment.max_num_seqs:,}",
        "requests": f"{found.requests:,}",
        "finished": f"{found.finished:,}",
        "seconds": f"{found.seconds:,.1f}",
        "requests/s": f"{found.requests_per_second:,.1f}",
        "new tokens/s": f"{found.tokens_per_second:,.0f}",
        "TTFT s, p50 / p90 / p99": _three(found.ttft_seconds, 1, 2),
        "ITL ms, p50 / p90 / p99": _three(found.itl_seconds, 1000, 0),
        "latency s, p50 / p90 / p99": _three(found.latency_seconds, 1, 1),
        "within objective": f"{100 * found.attained:.1f}%",
        "goodput, requests/s": f"{found.goodput_requests_per_second:,.1f}",
        "goodput, tokens/s": f"{found.goodput_tokens_per_second:,.0f}",
        "running at once, mean": f"{found.running:,.0f}",
        "KV pool charged, mean / peak": f"{100 * found.pages_used:.0f}% / "
        f"{100 * found.pages_peak:.0f}%",
        "ranks busy": f"{100 * found.utilisation:.0f}%",
        "preemptions": f"{found.preemptions:,}",
    }
    if found.refused:
        cells["refused, too large"] = f"{found.refused:,}"
    if asked.faults:
        cells["recoveries"] = f"{found.recoveries:,}"
        cells["without workers"] = f"{100 * found.unavailable:.2f}%"
    if dollars is not None:
        cells["$ per million"] = f"{dollars:.2f}"
    return cells


def _dollars(question: Question, found: Summary) -> float | None:
    """For a million new tokens."""
    if question.hour_price is None or found.new_tokens == 0:
        return None
    return question.hour_price * question.num_gpus * found.seconds / 3600 / found.new_tokens * 1e6


def _three(values: Mapping[str, float], factor: float, digits: int) -> str:
    return " / ".join(f"{factor * value:,.{digits}f}" for value in values.values())


def _title(flags: SimulateFlags, asked: _Asked) -> str:
    question = asked.first.question
    workload: Workload = question.workload
    come = f"{flags.rate:g} requests/s" if flags.rate is not None else Path(flags.arrivals).name
    return (
        f"{flags.planned.model} on {question.num_gpus} x {question.device.name}, {come}, "
        f"{workload.prompt_tokens} tokens in, {workload.new_tokens} out"
    )
