"""What `saqqara plan` prints."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from saqqara.cluster.planning.cost_model import Factors
from saqqara.cluster.planning.devices import device_of
from saqqara.cluster.planning.memory import EngineSizes, RankMemory
from saqqara.cluster.planning.models import known_models, model_of
from saqqara.cluster.planning.planner import DTYPES, LayoutPlan, Question, plan
from saqqara.cluster.planning.plots import check_plot_file, curve, draw, save
from saqqara.cluster.planning.reuse import ReusedMemory, ReuseSizes, reused_memory
from saqqara.cluster.planning.workload import Workload
from saqqara.cluster.presets import ModelPresets
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text
from saqqara.configs.names import did_you_mean

from .tables import print_table

GIB = 1024**3
# What `saqqara serve` does without being told, on a GPU.
_ENGINE_DEFAULTS = {
    "retention": "full",
    "dtype": "bfloat16",
    "page-tokens": 16,
    "memory-utilization": 0.9,
    "max-prefill-tokens": 2048,
}


@dataclass(frozen=True, slots=True)
class PlanFlags:
    """The flags of `saqqara plan`, as they were written."""

    model: str
    gpu: str
    gpus: int
    nodes: int | None
    prompt_tokens: int
    new_tokens: int
    requests: int | None
    retention: str
    budget: str | None
    dtype: str
    max_model_len: int | None
    max_num_seqs: int | None
    max_prefill_tokens: int
    page_tokens: int
    memory_utilization: float
    kv_memory_gib: float | None
    tensor_parallel_size: int | None
    pipeline_parallel_size: int | None
    layer_split: str | None
    gpu_hour_price: float | None
    calibrate: tuple[Path, ...]
    as_json: bool
    plot: Path | None
    reuse: ReuseSizes = field(default_factory=ReuseSizes)


def plan_and_print(flags: PlanFlags) -> int:
    """Plan, print, and draw where that is asked for; returns the exit code: 1 if nothing fits."""
    if flags.plot is not None:
        check_plot_file(flags.plot)
    question = question_of(flags)
    plans = plan(question)
    served = [each for each in plans if each.kept is not None]
    if flags.plot is not None and served:
        points = curve(question, served[0])
        save(draw(_title(flags, served[0]), points, served[0].replicas), flags.plot)
    if flags.as_json:
        typer.echo(json_text(as_data(question, flags, plans), indent=2))
    else:
        print_plans(question, flags, plans)
    return 0 if served else 1


def question_of(flags: PlanFlags) -> Question:
    """What the flags ask.

    Raises:
        ValueError: a flag is wrong; names it.
    """
    model, device = model_of(flags.model), device_of(flags.gpu)
    if flags.dtype not in DTYPES:
        raise ValueError(f"dtype: {flags.dtype!r} is none; {did_you_mean(flags.dtype, DTYPES)}")
    retention = Retention.parse(from_yaml(flags.retention), from_yaml(flags.budget))
    retention = ModelPresets(flags.model).resolve(retention)
    most = model.spec.longest
    if flags.max_model_len is not None and flags.max_model_len > most:
        raise ValueError(
            f"max_model_len={flags.max_model_len} is more than the model's context of {most} tokens"
        )
    factors = Factors.default(device.kind)
    if flags.calibrate:
        from saqqara.cluster.planning.calibration import calibrate, read_run

        runs = [read_run(path) for path in flags.calibrate]
        factors = Factors.default(device.kind, runs[0].attention_backend)
        factors = calibrate(runs, model, device, factors)
    return Question(
        model=model,
        device=device,
        num_gpus=flags.gpus,
        num_nodes=flags.nodes or -(-flags.gpus // device.gpus_per_node),
        workload=Workload(flags.prompt_tokens, flags.new_tokens, retention),
        dtype=DTYPES[flags.dtype],
        sizes=EngineSizes(
            max_model_len=flags.max_model_len or most,
            max_num_seqs=flags.max_num_seqs,
            max_prefill_tokens=flags.max_prefill_tokens,
            page_tokens=flags.page_tokens,
            memory_utilization=flags.memory_utilization,
            kv_memory_gib=_pool_gib(flags, device.kind),
        ),
        factors=factors,
        hour_price=device.hour_price if flags.gpu_hour_price is None else flags.gpu_hour_price,
        num_requests=flags.requests,
        tensor=flags.tensor_parallel_size,
        pipeline=flags.pipeline_parallel_size,
        split=_split(flags.layer_split),
    )


def _pool_gib(flags: PlanFlags, kind: str) -> float | None:
    """What is left of a replica's `kv_memory_gib` for pages."""
    host = flags.reuse.host_kv_gib
    if kind == "cuda" or not host:
        return flags.kv_memory_gib
    if flags.kv_memory_gib is None or flags.kv_memory_gib <= host:
        raise ValueError(
            f"host_kv_gib={host:g}: on a CPU it is taken from kv_memory_gib, which has to be given "
            "and larger"
        )
    return flags.kv_memory_gib - host


def _reused(question: Question, flags: PlanFlags, each: LayoutPlan) -> ReusedMemory:
    return reused_memory(
        flags.reuse,
        each.ranks,
        replicas=each.replicas,
        num_nodes=question.num_nodes,
        is_gpu=question.device.kind == "cuda",
    )


def as_data(question: Question, flags: PlanFlags, plans: Sequence[LayoutPlan]) -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "model": flags.model,
        "gpu": asdict(question.device),
        "num_gpus": question.num_gpus,
        "num_nodes": question.num_nodes,
        "prompt_tokens": flags.prompt_tokens,
        "new_tokens": flags.new_tokens,
        "requests": flags.requests,
        "retention": question.workload.retention.label,
        "dtype": flags.dtype,
        "engine": asdict(question.sizes),
        "factors": asdict(question.factors),
        "calibrated": bool(flags.calibrate),
        "layouts": [
            asdict(each) | ({"reuse": asdict(_reused(question, flags, each))} if each.kept else {})
            for each in plans
        ],
    }


def print_plans(question: Question, flags: PlanFlags, plans: Sequence[LayoutPlan]) -> None:
    """Two tables: what layouts do, and what the best one's ranks hold; then what to know."""
    table = Table(
        "tensor x pipeline x replicas",
        *("sequences", "of full", "tokens/s", "of full", "decode/s", "prefill/s"),
        *("step ms", "prompt s", "$ per million"),
        *(["job s"] if flags.requests else []),
        title=escape(_question(question, flags)),
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for each in plans:
        if each.kept is not None:
            table.add_row(*_row(each))
    served = [each for each in plans if each.kept is not None]
    if served:
        print_table(table)
        print_table(_memory_table(served[0]))
        typer.echo(_reuse_line(_reused(question, flags, served[0])))
    for each in plans:
        if each.why_not is not None:
            typer.echo(f"{_name(each)} cannot serve: {each.why_not}")
    if served:
        typer.echo(f"To run it: {_command(flags, served[0])}")
        if flags.model in known_models():
            typer.echo(f"FOLDER: a folder or hub id of {flags.model}'s weights.")
    typer.echo(_kinds_of_layers(question), nl=False)
    for note in _notes(question, flags):
        typer.echo(note)


def _row(each: LayoutPlan) -> list[str]:
    kept, full, dollars = each.kept, each.full, each.dollars_per_million
    assert kept is not None
    more, faster = "-", "-"
    if full is not None:
        more = f"{kept.sequences / full.sequences:.2f}x"
        faster = f"{kept.output_tokens_per_second / full.output_tokens_per_second:.2f}x"
    return [
        _name(each),
        f"{kept.sequences * each.replicas:,}",
        more,
        f"{kept.output_tokens_per_second:,.0f}",
        faster,
        f"{kept.decode_tokens_per_second:,.0f}",
        f"{kept.prefill_tokens_per_second:,.0f}",
        f"{1000 * kept.step_seconds:.1f}",
        f"{kept.prompt_seconds:.2f}",
        "-" if dollars is None else f"{dollars:.2f}",
        *([] if each.job_seconds is None else [f"{each.job_seconds:,.1f}"]),
    ]


def _memory_table(best: LayoutPlan) -> Table:
    """What each rank of a replica holds; ranks that hold the same stand in one row."""
    table = Table(
        "rank",
        *("layers", "kv heads", "weights", "KV pool", "pages", "activations", "tables"),
        *("rings, sums", "driver", "total GiB"),
        title=f"GiB on each GPU of a replica, {_name(best)}",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    alike: dict[tuple[Any, ...], list[RankMemory]] = {}
    for rank in best.ranks:
        heads = rank.kv_heads[1] - rank.kv_heads[0]
        alike.setdefault((rank.layers, heads, rank.weight_bytes, rank.num_pages), []).append(rank)
    for (layers, heads, _, _), ranks in alike.items():
        first, numbers = ranks[0], [rank.rank for rank in ranks]
        name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        held = (first.activation_bytes, first.table_bytes, first.remembered_bytes)
        table.add_row(
            name if numbers == list(range(numbers[0], numbers[-1] + 1)) else str(numbers)[1:-1],
            f"{layers[0]}-{layers[1] - 1}",
            str(heads),
            _gib(first.weight_bytes),
            _gib(first.pool_bytes),
            f"{first.num_pages:,}",
            *map(_gib, held),
            _gib(first.reserved_bytes),
            _gib(first.total_bytes),
        )
    return table


def _reuse_line(reused: ReusedMemory) -> str:
    """What of the best layout's memory is used again."""
    return (
        f"Used again: prefixes may take {_gib(reused.prefix_bytes)} GiB of a replica's pool and "
        f"conversations {_gib(reused.conversation_bytes)}, while no sequence needs it; preempted "
        f"sequences and conversations {_gib(reused.host_bytes_per_node)} GiB of each node's own "
        "memory."
    )


def _notes(question: Question, flags: PlanFlags) -> list[str]:
    notes = [
        "sequences: of all replicas, that fit at their longest at once, so that none is preempted; "
        "tokens/s: new ones, prompts included in the time; decode/s and prefill/s: either alone."
    ]
    if not flags.calibrate:
        notes.append(
            "Rates are a roofline with assumed factors; --calibrate RUN.json fits them to a run "
            "(saqqara bench throughput --json). Activations and driver are estimates, too."
        )
    return notes


def _kinds_of_layers(question: Question) -> str:
    """A line on what layers with a window hold beside the budget; "" without any."""
    layers, spec = question.model.spec.layers, question.model.spec
    if not layers.local_layers:
        return ""
    tokens = layers.local_tokens(question.workload.prompt_tokens + question.workload.fed_tokens)
    row_bytes = spec.kv_bytes_per_row_token(question.dtype)
    local = tokens * len(layers.local_layers) * spec.num_kv_heads * row_bytes
    return (
        f"Budgets are of the {len(layers.global_layers)} layers that see all tokens; the other "
        f"{len(layers.local_layers)} hold a window of {layers.window} tokens, "
        f"{local / 2**20:.1f} MiB a sequence.\n"
    )


def _question(question: Question, flags: PlanFlags) -> str:
    nodes = f" on {question.num_nodes} nodes" if question.num_nodes > 1 else ""
    return (
        f"{flags.model} on {question.num_gpus} x {question.device.name}{nodes}, "
        f"{flags.prompt_tokens} tokens in, {flags.new_tokens} out, "
        f"{question.workload.retention.label}"
    )


def _command(flags: PlanFlags, best: LayoutPlan) -> str:
    """The server that the best layout is; a folder or hub id takes the place of a known name."""
    assert best.kept is not None
    slots = flags.max_num_seqs or best.kept.sequences
    model = "FOLDER" if flags.model in known_models() else shlex.quote(flags.model)
    parts = [f"saqqara serve --model {model}"]
    if best.tensor * best.pipeline > 1:
        parts.append(f"--tensor-parallel-size {best.tensor}")
        parts.append(f"--pipeline-parallel-size {best.pipeline}")
    parts.append(f"--max-num-seqs {slots} --num-replicas {best.replicas}")
    settings: dict[str, Any] = {"retention": flags.retention, "budget": flags.budget}
    settings |= {"max-model-len": flags.max_model_len, "layer-split": flags.layer_split}
    settings |= {"kv-memory-gib": flags.kv_memory_gib, "dtype": flags.dtype}
    settings |= {"page-tokens": flags.page_tokens, "memory-utilization": flags.memory_utilization}
    settings |= {"max-prefill-tokens": flags.max_prefill_tokens}
    settings |= {name.replace("_", "-"): gib for name, gib in asdict(flags.reuse).items()}
    given = {
        name: str(value)
        for name, value in settings.items()
        if value is not None and value != _ENGINE_DEFAULTS.get(name)
    }
    parts += [f"--{name} {shlex.quote(value)}" for name, value in given.items()]
    return " ".join(parts)


def _title(flags: PlanFlags, best: LayoutPlan) -> str:
    return (
        f"{flags.model}, {flags.gpus} x {Path(flags.gpu).stem}, {_name(best)}: {flags.retention}, "
        f"{flags.prompt_tokens} in, {flags.new_tokens} out"
    )


def _name(each: LayoutPlan) -> str:
    return f"{each.tensor} x {each.pipeline} x {each.replicas}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def from_yaml(text: str | None) -> Any:
    """What YAML reads; the text itself, where it is none."""
    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _split(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError:
        raise ValueError(f"layer_split: {text!r} is no list of numbers such as 16,14") from None
