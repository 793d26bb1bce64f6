"""`make demo`: what retention is for, on a real model and a pool of KV that is too small.

Fetches the demo model, hides facts in documents of 1,500 to 3,000 tokens, starts a Ray head, and
submits `saqqara batch` three times: all keys and values, PyramidKV as published, and our own
setting, in the same pool. Compares speed, memory, and how many facts the answers give. Everything
is left in results/demo/.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.demo_documents import Document, facts_found, make_documents, write_documents
from harness.local_ray import RayHead, environment, ray_head, show
from matplotlib.figure import Figure
from rich.table import Table

from saqqara.cluster.batch.summary import MIB, BatchSummary
from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.models.spec import load_spec
from saqqara.workers.part import choose_dtype, cpu_has_bfloat16

NUM_DOCUMENTS = 26
NUM_DOCUMENTS_SLOWLY = 10  # without bfloat16 arithmetic, where each takes several times as long
SHORTEST, LONGEST = 1500, 3000  # tokens of a prompt
NUM_STAGES = 2
POOL_PROMPTS = 3  # the longest prompts, with all of their KV, that fill the pool
GIB = 2**30


def main() -> int:
    """Run the demo; 0 when every job answered every document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/demo"), help="result folder")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--budget", default="25%", help="of the reduced runs: tokens, or a share")
    parser.add_argument("--num-documents", type=int, help=f"default: {NUM_DOCUMENTS}")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    start = time.monotonic()

    model = fetch_model()
    lengths = prompt_lengths(arguments.num_documents or default_documents())
    documents = make_documents(Tokenizer.load(model), lengths)
    prompts = write_documents(folder, documents)
    print(
        f"\n{len(documents)} documents of {min(lengths):,} to {max(lengths):,} tokens "
        f"({sum(lengths):,} in all), {sum(len(d.facts) for d in documents)} facts: {prompts}"
    )
    pool_gib = kv_memory_gib(model, LONGEST + arguments.max_tokens)
    common = ["saqqara", "batch", str(prompts), "--model", model, "--config", "ray-pp2"]
    common += ["--temperature", "0", "--max-tokens", str(arguments.max_tokens), "--ignore-eos"]
    common += ["--kv-memory-gib", f"{pool_gib:.3f}", "--overwrite", "--no-prefix-caching"]
    runs = []
    with ray_head(num_cpus=max(NUM_STAGES, usable_cores())) as ray:
        for method in ("full", "pyramidkv", "recommended"):
            output = folder / f"{method}.jsonl"
            budget = [] if method == "full" else ["--budget", arguments.budget]
            submit(ray, [*common, "--output", str(output), "--retention", method, *budget])
            runs.append(read_run(output, documents))

    report(folder, runs, pool_gib)
    print(f"\nDone in {time.monotonic() - start:.0f} s; documents, answers and numbers: {folder}")
    return 0 if all(run.summary.answered == run.summary.rows for run in runs) else 1


@dataclass(frozen=True)
class Run:
    """One job: its summary, its engine's report, and how many of how many facts it found."""

    summary: BatchSummary
    report: EngineReport
    found: int
    num_facts: int


def fetch_model() -> str:
    """Folder of the demo model."""
    command = ["saqqara", "fetch-demo-model"]
    show(command)
    env = environment()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def default_documents() -> int:
    """As many documents as take some minutes on this machine."""
    if cpu_has_bfloat16():
        return NUM_DOCUMENTS
    print(
        f"\nThis CPU has no bfloat16 arithmetic: {NUM_DOCUMENTS_SLOWLY} documents instead of "
        f"{NUM_DOCUMENTS}, so that it takes minutes (all of them: --num-documents {NUM_DOCUMENTS})."
    )
    return NUM_DOCUMENTS_SLOWLY


def prompt_lengths(count: int) -> list[int]:
    """Lengths from `SHORTEST` to `LONGEST`, more of the short ones, in mixed order."""
    ratio = LONGEST / SHORTEST
    lengths = [round(SHORTEST * ratio ** ((i / max(count - 1, 1)) ** 2)) for i in range(count)]
    return lengths[::2] + lengths[1::2][::-1]


def kv_memory_gib(model: str, num_tokens: int) -> float:
    """A pool that `POOL_PROMPTS` sequences of so many tokens fill when all of their KV is kept."""
    spec = load_spec(model)
    dtype, _ = choose_dtype(WorkerSettings(model=model), torch.device("cpu"))
    token_bytes = (
        2  # key + value
        * spec.num_layers
        * spec.num_kv_heads
        * spec.head_dim
        * dtype.itemsize
    )
    return POOL_PROMPTS * num_tokens * token_bytes / GIB


def submit(ray: RayHead, entrypoint: list[str]) -> None:
    """Submit a job and follow its log until it ends."""
    command = ["ray", "job", "submit", "--address", ray.address, "--", *entrypoint]
    show(command)
    subprocess.run(command, env=ray.env, check=True)


def read_run(results: Path, documents: Sequence[Document]) -> Run:
    """What a batch job left: its summary beside its results, and the facts in its answers."""
    data = json.loads(results.with_name(results.name + ".summary.json").read_text("utf-8"))
    summary = BatchSummary.model_validate(data)
    assert summary.report is not None, "the job ran nothing"
    num_facts = sum(len(document.facts) for document in documents)
    return Run(summary, summary.report, facts_found(results, documents), num_facts)


def _kv(report: EngineReport) -> str:
    kept, full = report.kv_kept_bytes_peak, report.kv_full_bytes_peak
    return f"{kept / MIB:.0f} of {full / MIB:.0f} MiB"


ROWS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("documents answered", lambda run: f"{run.summary.answered} of {run.summary.rows}"),
    ("facts found", lambda run: f"{run.found} of {run.num_facts}"),
    ("wall time", lambda run: f"{run.report.wall_seconds:.0f} s"),
    ("tokens/s out", lambda run: f"{run.report.generation_tokens_per_second:.1f}"),
    ("time between tokens, p50", lambda run: f"{run.report.inter_token_latency.p50 * 1e3:.0f} ms"),
    (
        "time between tokens, mean",
        lambda run: f"{run.report.inter_token_latency.mean * 1e3:.0f} ms",
    ),
    ("time to first token, p50", lambda run: f"{run.report.time_to_first_token.p50:.1f} s"),
    ("KV at peak, of what full needs", lambda run: _kv(run.report)),
    ("sequences at once, at most", lambda run: str(run.report.num_running_peak)),
    ("preemptions", lambda run: str(run.report.num_preemptions)),
    ("page integrity", lambda run: run.summary.integrity or "-"),
)


def report(folder: Path, runs: Sequence[Run], pool_gib: float) -> None:
    """Print one table for all jobs; leave it as JSON and as a picture."""
    table = Table(title=f"The same {pool_gib * GIB / MIB:.0f} MiB for keys and values")
    table.add_column("")
    for run in runs:
        table.add_column(run.summary.title, justify="right")
    for label, cell in ROWS:
        table.add_row(label, *map(cell, runs))
    rates = [run.report.generation_tokens_per_second for run in runs]
    table.add_row("tokens/s out, of full", *(f"{rate / rates[0]:.2f}" for rate in rates))
    print()
    print_table(table)
    data = {
        run.summary.title: {
            "facts_found": run.found,
            "num_facts": run.num_facts,
            **run.summary.model_dump(mode="json"),
        }
        for run in runs
    }
    (folder / "summary.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    plot(runs).savefig(folder / "summary.png", dpi=120)


def plot(runs: Sequence[Run]) -> Figure:
    """Kept tokens by layer, and beside them facts, speed and sequences; a colour for each run."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    layers, *others = figure.subplots(1, 4, width_ratios=(2, 1, 1, 1))
    names = [run.summary.title for run in runs]
    colours = [f"C{i}" for i in range(len(runs))]
    for run, colour in zip(runs, colours, strict=True):
        by_layer = zip(
            run.report.kept_tokens_by_layer, run.report.dropped_tokens_by_layer, strict=True
        )
        kept = [100 * kept / (kept + dropped) for kept, dropped in by_layer]
        layers.step(range(len(kept)), kept, where="mid", label=run.summary.title, color=colour)
    layers.set(xlabel="layer", title="kept of the prompts' tokens, %", ylim=(0, 150))
    layers.legend(loc="upper right")
    panels: tuple[tuple[str, list[float]], ...] = (
        ("facts found, %", [100 * run.found / run.num_facts for run in runs]),
        ("tokens/s out", [run.report.generation_tokens_per_second for run in runs]),
        ("sequences at once, at most", [float(run.report.num_running_peak) for run in runs]),
    )
    for axes, (title, values) in zip(others, panels, strict=True):
        bars = axes.bar(names, values, color=colours)
        axes.bar_label(bars, fmt="%.0f")
        axes.set(title=title, ylim=(0, 1.1 * max(*values, 1.0)))
        axes.tick_params(axis="x", labelrotation=20)
    return figure


if __name__ == "__main__":
    sys.exit(main())
