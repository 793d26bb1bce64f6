"""Correctness and speed of the whole engine on a GPU, for `gpu_check.py`."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from gpu_baselines import deepspeed_rows, release, transformers_rows
from gpu_generation import Generated, generate, largest_batch
from gpu_models import Load, Shape, memory_cap, random_worker
from gpu_report import Bench, OutOfTimeError, Row, failure, judged
from transformers import AutoModelForCausalLM

from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.worker import Worker

TINY = Shape(
    "tiny", hidden=96, inner=112, num_layers=3, num_queries=6, num_heads=3, vocab=199, dim=16
)
STEP_TARGET = 1.4
_RUN_SECONDS = 40.0
_WARM_UP_TOKENS = 2

FULL = Retention.parse("full")
PYRAMID_INFER = Retention.parse("pyramidinfer-13b")
PYRAMID_INFER_DECODE = Retention.parse(
    {**PYRAMID_INFER.to_dict(), "decode": {"trigger": "published"}}
)

# Few layers and tokens show nothing of the published setting: this one drops and cuts all the time.
_OFTEN_TRIMMED = {
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
        trimmed = Retention.parse(_OFTEN_TRIMMED)
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


def measure_step(
    bench: Bench, shape: Shape, load: Load, copy_bytes: int = 1 << 30
) -> Iterator[Row]:
    """Decode steps of a full batch, against the time that reading their bytes once takes."""
    bandwidth = bench.copy_bandwidth(copy_bytes)
    for graphs in ("off", "auto"):
        what = f"decode step, {shape.name}, batch {load.batch}, graphs {graphs}"
        yield from guarded(what, _measured_step(bench, shape, load, graphs, bandwidth, what))
        release()


def _measured_step(
    bench: Bench, shape: Shape, load: Load, graphs: str, bandwidth: float, what: str
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
    kv_bytes = load.batch * load.prompt_tokens * shape.kv_token_bytes(bench.dtype)
    floor = (weight_bytes + kv_bytes) / bandwidth
    ratio = seconds / floor
    yield Row(
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
    at_largest: bool = False,
    max_num_seqs: int | None = None,
) -> Iterator[Row]:
    """Tokens per second under each retention, and with `at_largest` at each one's largest batch."""
    most = max_num_seqs or load.batch
    with memory_cap(bench), random_worker(bench, shape, load, most) as (worker, settings):
        warm_up = load.prompts(shape.vocab, 1)
        for retention in retentions.values():  # each has kernels of its own to compile
            generate(bench, worker, settings, warm_up, _WARM_UP_TOKENS, retention)
        sizes = ("same batch", "largest batch") if at_largest else ("same batch",)
        for size in sizes:
            for name, retention in retentions.items():
                batch = load.batch
                if size == "largest batch":
                    batch = largest_batch(worker, settings, load, retention)
                what = f"{shape.name}, {name}" + (f", {size}" if at_largest else "")
                row = _measured(bench, worker, settings, shape, load, retention, batch, what)
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


def compare_13b(bench: Bench, shape: Shape, load: Load, max_num_seqs: int) -> Iterator[Row]:
    """The comparison of the papers: ours in full and as PyramidInfer, transformers, DeepSpeed."""
    retentions = {
        "full": FULL,
        "pyramidinfer-13b": PYRAMID_INFER,
        "pyramidinfer-13b with its decode stage": PYRAMID_INFER_DECODE,
    }
    rows: list[Row] = []
    parts = {
        "ours": measure_retentions(bench, shape, load, retentions, True, max_num_seqs),
        "transformers": _with_cap(bench, transformers_rows(bench, shape, load)),
        "DeepSpeed": _with_cap(bench, deepspeed_rows(bench, shape, load)),
    }
    for name, part in parts.items():
        for row in guarded(f"{shape.name}, {name}", part):
            rows.append(row)
            yield row
        release()
    yield from ratios(rows)


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


def ratios(rows: list[Row]) -> Iterator[Row]:
    """Every measured row of ours over transformers', at the same batch and at the largest."""
    for size in ("same batch", "largest batch"):
        measured = {
            row.what: row.numbers["tokens_per_second"]
            for row in rows
            if size in row.what and "tokens_per_second" in row.numbers
        }
        base = [speed for what, speed in measured.items() if ", transformers" in what]
        for what, speed in measured.items():
            if base and ", transformers" not in what:
                ratio = speed / base[0]
                yield Row(f"{what}, over transformers", f"{ratio:.2f}x", {"ratio": ratio})
