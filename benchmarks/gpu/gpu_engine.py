"""Correctness and speed of the whole engine on a GPU, for `gpu_check.py`."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gpu_baselines import LARGEST, SAME, deepspeed_rows, release, transformers_rows
from gpu_generation import Generated, generate, largest_batch
from gpu_models import Load, Shape, memory_cap, random_worker
from gpu_report import Bench, OutOfTimeError, Row, failure, judged
from gpu_trace import STEPS, StepTrace
from transformers import AutoModelForCausalLM

from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.worker import Worker

TINY = Shape(
    "tiny", hidden=96, inner=112, num_layers=3, num_queries=6, num_heads=3, vocab=199, dim=16
)
STEP_TARGET = 1.4
_RUN_SECONDS = 40.0
_TRACED_FROM = 3  # steps of a full batch, after which the clocks of a GPU are up
_WARM_UP_TOKENS = 2

FULL = Retention.parse("full")
PYRAMID_INFER = Retention.parse("pyramidinfer-13b")
PYRAMID_INFER_DECODE = Retention.parse(
    {**PYRAMID_INFER.to_dict(), "decode": {"trigger": "published"}}
)

_PAPERS = {"full": FULL, "pyramidinfer-13b": PYRAMID_INFER}

# Few layers and tokens show nothing of the published setting: this one drops and cuts all the time.
OFTEN_TRIMMED = {
    "score": None,
    "propagate": {"kind": "pyramidinfer", "rho": 0.7, "interval": 1, "min_context": 16},
    "decode": {"trigger": "stored", "exceed": 3},
}


def check_parity(bench: Bench, new_tokens: int = 24) -> Iterator[Row]:
    """Greedy tokens in float32: transformers' under full retention, torch's backend under others.

    Each with decode steps launched by the host and, on a GPU, replayed as graphs.
    """
    exact = replace(bench, dtype=torch.float32)
    torch.manual_seed(0)
    config = TINY.config(512)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = [tuple(torch.randint(3, 199, (n,)).tolist()) for n in (5, 33, 100)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.to(bench.device)
        base = WorkerSettings(
            model=folder,
            dtype="float32",
            device=bench.device.type,
            max_num_seqs=4,
            kv_memory_gib=0.1,
            attention_backend="torch",
        )
        snapkv = Retention.parse({"score": "snapkv", "window": 4}, 16)
        trimmed = Retention.parse(OFTEN_TRIMMED)
        for what, retention in (("full", FULL), ("snapkv", snapkv), ("trimmed", trimmed)):
            oracle = partial(_tokens, exact, base, prompts, new_tokens, retention)
            name = "the torch backend"
            if retention is FULL:
                oracle, name = (
                    partial(_greedy, model, prompts, new_tokens, bench.device),
                    "transformers",
                )
            for graphs in ("off", "auto") if bench.device.type == "cuda" else ("off",):
                settings = replace(base, attention_backend="triton", cuda_graphs=graphs)
                ours = partial(_tokens, exact, settings, prompts, new_tokens, retention)
                title = f"greedy tokens, {what}, graphs {graphs}, as {name}"
                yield from guarded(title, _compared(title, ours, oracle))


def _greedy(
    model: torch.nn.Module, prompts: list[tuple[int, ...]], steps: int, device: torch.device
) -> list[list[int]]:
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                ids,
                max_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
                attention_mask=torch.ones_like(ids),
            )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def _tokens(
    bench: Bench,
    settings: WorkerSettings,
    prompts: list[tuple[int, ...]],
    new_tokens: int,
    retention: Retention,
) -> list[list[int]]:
    worker = Worker.local(settings)
    try:
        run = generate(bench, worker, settings, prompts, new_tokens, retention, check_pages=True)
    finally:
        worker.close()
    return run.tokens


def _compared(
    what: str, ours: Callable[[], list[list[int]]], oracle: Callable[[], list[list[int]]]
) -> Iterator[Row]:
    got, expected = ours(), oracle()
    pairs = [pair for x, y in zip(got, expected, strict=True) for pair in zip(x, y, strict=True)]
    same = sum(a == b for a, b in pairs)
    numbers = {"same": float(same), "tokens": float(len(pairs))}
    if same == len(pairs):
        yield Row(what, f"{same} of {len(pairs)} tokens", numbers)
        return
    places = [
        f"prompt {n} from token {first}"
        for n, (x, y) in enumerate(zip(got, expected, strict=True))
        if (first := next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None))
        is not None
    ]
    result = f"{same} of {len(pairs)} tokens; differs in {', '.join(places)}"
    yield Row(what, result, numbers, "wrong")


def warm_up(bench: Bench, shape: Shape) -> Row:
    """Run everything that the sections run on a model, so that its kernels are compiled."""
    load, started = Load(300, 6, 2), time.perf_counter()
    retentions = (FULL, Retention.parse("pyramidkv", "25%"), PYRAMID_INFER, PYRAMID_INFER_DECODE)
    with random_worker(bench, shape, load, 2, cuda_graphs="off", kv_memory_gib=1.0) as (
        worker,
        settings,
    ):
        for retention in retentions:
            prompts = load.prompts(shape.vocab)
            generate(bench, worker, settings, prompts, load.new_tokens, retention)
    seconds = time.perf_counter() - started
    return Row(f"warm-up, {shape.name}", f"{seconds:.0f} s", {"seconds": seconds})


def measure_step(
    bench: Bench, shape: Shape, load: Load, out: Path, copy_bytes: int = 1 << 30
) -> Iterator[Row]:
    """Decode steps of a full batch, against the time that reading their bytes once takes.

    Recorded, then launched by the host; of each a trace of a few steps, in the folder `out`.
    """
    bandwidth = bench.copy_bandwidth(copy_bytes)
    for graphs in ("auto", "off"):
        what = f"decode step, {shape.name}, batch {load.batch}, graphs {graphs}"
        yield from guarded(what, _measured_step(bench, shape, load, graphs, bandwidth, what, out))
        release()


def _measured_step(
    bench: Bench, shape: Shape, load: Load, graphs: str, bandwidth: float, what: str, out: Path
) -> Iterator[Row]:
    with (
        memory_cap(bench),
        random_worker(bench, shape, load, load.batch, cuda_graphs=graphs) as (worker, settings),
    ):
        prompts = load.prompts(shape.vocab)
        run = generate(bench, worker, settings, prompts, load.new_tokens, FULL)
        seconds = statistics.median(run.step_seconds)
        # Of the embedding a step reads a row per sequence only.
        embedding_bytes = shape.vocab * shape.hidden * bench.dtype.itemsize
        weight_bytes = worker.info.memory.weight_bytes - embedding_bytes
        yield _step_row(bench, shape, load, graphs, bandwidth, what, seconds, weight_bytes)
        trace = StepTrace(bench.device, out / f"step-graphs-{graphs}.json.gz", _TRACED_FROM)
        new_tokens = _TRACED_FROM + STEPS + 2
        generate(bench, worker, settings, prompts, new_tokens, FULL, trace=trace)
        yield trace.row(f"{what}, traced")


def _step_row(
    bench: Bench,
    shape: Shape,
    load: Load,
    graphs: str,
    bandwidth: float,
    what: str,
    seconds: float,
    weight_bytes: int,
) -> Row:
    kv_bytes = load.batch * load.prompt_tokens * shape.kv_token_bytes(bench.dtype)
    floor = (weight_bytes + kv_bytes) / bandwidth
    ratio = seconds / floor
    return Row(
        what,
        f"{ratio:.2f}x the time to read weights and KV ({seconds * 1e3:.2f} ms of "
        f"{floor * 1e3:.2f} ms)" + (f"; target {STEP_TARGET}x" if graphs == "auto" else ""),
        {"seconds": seconds, "floor_seconds": floor, "ratio": ratio},
        judged(ratio <= STEP_TARGET or graphs == "off"),
    )


def measure_retentions(
    bench: Bench,
    shape: Shape,
    load: Load,
    retentions: Mapping[str, Retention],
    size: str = SAME,
    max_num_seqs: int | None = None,
    shorter: Sequence[int] = (),
) -> Iterator[Row]:
    """Tokens per second under each retention.

    Args:
        bench: where, and until when.
        shape: of the model.
        load: prompts, and the most new tokens after each.
        retentions: by name.
        size: whether the batch is the load's, or the largest that fits under each.
        max_num_seqs: slots; default: the load's batch.
        shorter: also measured, and first: so many new tokens.
    """
    most = max_num_seqs or load.batch
    with memory_cap(bench), random_worker(bench, shape, load, most) as (worker, settings):
        warm_up = load.prompts(shape.vocab, 1)
        for retention in retentions.values():  # each has kernels of its own to compile
            generate(bench, worker, settings, warm_up, _WARM_UP_TOKENS, retention)
        for new_tokens in (*shorter, load.new_tokens):
            this = replace(load, new_tokens=new_tokens)
            for name, retention in retentions.items():
                batch = load.batch
                if size == LARGEST:
                    batch = largest_batch(worker, settings, this, retention)
                tokens = f", {new_tokens} out" if shorter else ""
                what = f"{shape.name}, {name}{tokens}, {size}"
                row = _measured(bench, worker, settings, shape, this, retention, batch, what)
                yield from guarded(what, row)


def _measured(
    bench: Bench,
    worker: Worker,
    settings: WorkerSettings,
    shape: Shape,
    load: Load,
    retention: Retention,
    batch: int,
    what: str,
) -> Iterator[Row]:
    bench.deadline.check()
    bench.say(f"{what}, batch {batch}")
    limited = replace(bench, deadline=bench.deadline.part(_RUN_SECONDS))
    prompts = load.prompts(shape.vocab, batch)
    try:
        run: Generated = generate(limited, worker, settings, prompts, load.new_tokens, retention)
    except OutOfTimeError:
        yield Row(what, f"batch {batch} takes longer than it may", state="skipped")
    else:
        yield run.row(what)


def compare_13b(bench: Bench, shape: Shape, load: Load) -> Iterator[Row]:
    """The comparison of the papers at one batch: ours, then transformers with each cache."""
    yield from _compared_engines(
        shape,
        {
            "ours": measure_retentions(bench, shape, load, _PAPERS),
            "transformers": _with_cap(bench, transformers_rows(bench, shape, load, SAME)),
        },
    )


def compare_largest(bench: Bench, shape: Shape, load: Load, max_num_seqs: int) -> Iterator[Row]:
    """The slow rows of the comparison: the decode stage, and each at its largest batch."""
    decode_stage = {"pyramidinfer-13b with its decode stage": PYRAMID_INFER_DECODE}
    dynamic = ("dynamic cache",)
    yield from _compared_engines(
        shape,
        {
            "ours": measure_retentions(bench, shape, load, _PAPERS, LARGEST, max_num_seqs),
            "transformers": _with_cap(
                bench, transformers_rows(bench, shape, load, LARGEST, dynamic)
            ),
            "ours, decode stage": measure_retentions(bench, shape, load, decode_stage),
            "DeepSpeed": _with_cap(bench, deepspeed_rows(bench, shape, load, LARGEST)),
        },
    )


def _compared_engines(shape: Shape, parts: Mapping[str, Iterator[Row]]) -> Iterator[Row]:
    """The rows of each engine, and how they compare as soon as there are both."""
    rows: list[Row] = []
    for name, part in parts.items():
        for row in guarded(f"{shape.name}, {name}", part):
            yield row
            yield from ratios(row, rows)
            rows.append(row)
        release()


def _with_cap(bench: Bench, rows: Iterator[Row]) -> Iterator[Row]:
    with memory_cap(bench):
        yield from rows


def guarded(what: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, and one more if an error ends them: what comes after is still measured."""
    try:
        yield from rows
        return
    except OutOfTimeError:
        raise
    except Exception as error:
        row = failure(what, error)
    release()  # the error is gone by now, and with it what its frames held
    yield row


def ratios(row: Row, earlier: Sequence[Row]) -> Iterator[Row]:
    """Ours over transformers', of one more row with the rows before it; at one size of batch."""
    speed = "tokens_per_second"
    for other in earlier:
        is_base = ", transformers" in row.what
        if is_base == (", transformers" in other.what) or not {speed} <= row.numbers.keys():
            continue
        if speed not in other.numbers or (SAME in row.what) != (SAME in other.what):
            continue
        ours, base = (other, row) if is_base else (row, other)
        ratio = ours.numbers[speed] / base.numbers[speed]
        yield Row(f"{ours.what}, over {base.what}", f"{ratio:.2f}x", {"ratio": ratio})
