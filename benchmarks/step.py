"""One decode step of the whole engine against what the machine allows, and where its time goes.

    python benchmarks/step.py --json results/step.json

`--prompts` sequences decode together under `pyramidkv` at `--budget` tokens per layer and kv head,
through the real engine (LocalExecutor, bf16). The limit of a step is

    1.5 * max(weight bytes / bandwidth, FLOPs / GEMM rate) + KV bytes / bandwidth

with the weights of all layers and the head read once, two FLOPs per weight and sequence, and the
keys and values that the sequences keep at the middle of the run read once. The factor leaves room
for everything else that a step does. Bandwidth (a plain read of memory) and GEMM rate (a large bf16
product) are measured between the rounds of the engine, so that whatever else the machine does meets
all of them; the limit is also given for a nominal GEMM rate (`--nominal-gflops`).

A step's time is the wall time of `Engine.step`, scheduling and detokenisation included: the median
over all steps of all rounds, and the range of the rounds' medians. The profile comes from a last
run whose parts are timed, which takes some time of its own.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from harness.limits import measure_limits
from harness.stepped import Run, SteppedEngine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.speed.profile import Row, profile_table
from saqqara.evaluation.speed.throughput import MIB, Workload
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.gguf.demo import fetch_demo_model
from saqqara.workers.models.spec import ModelSpec

SLACK = 1.5
METHOD = "pyramidkv"
LIMIT_ROUNDS = 7  # of the machine's limits, before each round of the engine


@dataclass(frozen=True)
class Work:
    """What one decode step has to do."""

    weight_bytes: float
    flops: float
    kv_bytes: float


@dataclass(frozen=True)
class Limit:
    """Seconds of each term of the limit, at a bandwidth in bytes and a GEMM rate in FLOPs a second.

    Attributes:
        weights: all weights read once.
        products: all products.
        kv: all kept keys and values read once.
    """

    weights: float
    products: float
    kv: float

    @classmethod
    def of(cls, work: Work, bandwidth: float, gemm_rate: float) -> "Limit":
        """The terms for some work on some machine."""
        return cls(work.weight_bytes / bandwidth, work.flops / gemm_rate, work.kv_bytes / bandwidth)

    @property
    def total(self) -> float:
        """The limit in seconds."""
        return SLACK * max(self.weights, self.products) + self.kv


def step_work(spec: ModelSpec, num_sequences: int, kept_row_tokens: float) -> Work:
    """The work of a step.

    Args:
        spec: sizes of the model, in bf16.
        num_sequences: decoded together.
        kept_row_tokens: kept tokens, summed over sequences, layers and kv heads.
    """
    parameters = spec.num_layers * spec.layer_parameters + spec.head_parameters
    dtype = torch.bfloat16
    return Work(
        weight_bytes=parameters * dtype.itemsize,
        flops=2 * parameters * num_sequences,  # a product and a sum
        kv_bytes=kept_row_tokens * spec.kv_bytes_per_row_token(dtype),
    )


def mean_row_tokens(run: Run, prompt_tokens: int, kept_LH: np.ndarray) -> float:
    """Tokens that a decode step reads, summed over rows, mean over the steps of a run.

    Args:
        run: of prompts of one length.
        prompt_tokens: that length.
        kept_LH: kept tokens of a prompt, int [layers, kv heads].
    """
    new = fmean(
        sum(position + 1 - prompt_tokens for position in step.positions)  # its own among them
        for step in run.decode_steps
    )
    return run.num_prompts * float(kept_LH.sum()) + new * kept_LH.size


@dataclass(frozen=True)
class Result:
    """All that has been measured; times in seconds, rates per second."""

    work: Work
    bandwidth: float
    gemm_rate: float
    nominal_gemm_rate: float
    step_seconds: float
    round_seconds: tuple[float, ...]
    num_steps: int
    profile: tuple[Row, ...]

    @property
    def limits(self) -> dict[str, Limit]:
        """The limit at the measured and at the nominal GEMM rate."""
        rates = {"measured": self.gemm_rate, "nominal": self.nominal_gemm_rate}
        return {name: Limit.of(self.work, self.bandwidth, rate) for name, rate in rates.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the limits and the ratios to them included."""
        limits = {
            name: asdict(limit)
            | {"total": limit.total, "step_over_limit": self.step_seconds / limit.total}
            for name, limit in self.limits.items()
        }
        return asdict(self) | {"limits": limits}


def run(options: argparse.Namespace, model: str) -> Result:
    """Measure limits and engine in turns, then profile."""
    prompts = Workload(
        num_requests=options.prompts, prompt_tokens=options.prompt_tokens, text=True
    ).token_ids(EngineConfig(model=model))
    max_model_len = options.prompt_tokens + options.new_tokens
    engine = SteppedEngine(model, options.threads, options.prompts, max_model_len)
    rates: dict[str, list[float]] = {"GB/s": [], "GFLOP/s": []}
    runs = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rounds and profile", total=options.rounds + 2)
        engine.run(prompts, 4, METHOD, options.budget)  # to warm up
        bar.advance(task)
        for _ in range(options.rounds):
            for unit, rate in measure_limits(LIMIT_ROUNDS).items():
                rates[unit].append(rate)
            runs.append(engine.run(prompts, options.new_tokens, METHOD, options.budget))
            bar.advance(task)
        rows = engine.profile(prompts, options.new_tokens, METHOD, options.budget)
        bar.advance(task)
    engine.close()
    spec = engine.spec
    kept_LH = Retention.parse(METHOD, options.budget).row_tokens(
        options.prompt_tokens, spec.num_layers, spec.num_kv_heads
    )
    steps = [step.seconds for one in runs for step in one.decode_steps]
    return Result(
        work=step_work(
            spec, options.prompts, mean_row_tokens(runs[0], options.prompt_tokens, kept_LH)
        ),
        bandwidth=1e9 * median(rates["GB/s"]),
        gemm_rate=1e9 * median(rates["GFLOP/s"]),
        nominal_gemm_rate=1e9 * options.nominal_gflops,
        step_seconds=median(steps),
        round_seconds=tuple(one.decode_step_seconds for one in runs),
        num_steps=len(steps),
        profile=tuple(row for row in rows if row.phase == "decode"),
    )


def table(result: Result, title: str) -> Table:
    """The step, the limit and its terms."""
    work, limits = result.work, result.limits
    measured, nominal = limits["measured"], limits["nominal"]
    low, high = min(result.round_seconds), max(result.round_seconds)
    out = Table("", "how much", title=title)
    rates = [
        f"GEMM {rate / 1e9:.0f} GFLOP/s" for rate in (result.gemm_rate, result.nominal_gemm_rate)
    ]
    for column, said in zip(rates, ("measured", "nominal"), strict=True):
        out.add_column(f"ms, {column} ({said})", justify="right")

    def row(name: str, amount: str, *seconds: float) -> None:
        out.add_row(name, amount, *(f"{1e3 * value:.2f}" for value in seconds))

    bandwidth = f"at {result.bandwidth / 1e9:.1f} GB/s"
    row(
        "weights read",
        f"{work.weight_bytes / MIB:.1f} MiB {bandwidth}",
        measured.weights,
        nominal.weights,
    )
    row("products", f"{work.flops / 1e9:.2f} GFLOP", measured.products, nominal.products)
    row("KV read", f"{work.kv_bytes / MIB:.1f} MiB {bandwidth}", measured.kv, nominal.kv)
    row("limit", f"{SLACK} x max(weights, products) + KV", measured.total, nominal.total)
    out.add_section()
    row(
        "step",
        f"{1e3 * low:.2f} to {1e3 * high:.2f} ms by round, {result.num_steps} steps",
        result.step_seconds,
        result.step_seconds,
    )
    shares = [f"{result.step_seconds / limit.total:.2f}" for limit in (measured, nominal)]
    out.add_row("step / limit", "", *shares)
    return out


def main() -> None:
    """Measure, write the JSON, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="local folder; default: the demo model")
    parser.add_argument("--prompts", type=int, default=16, help="sequences that decode together")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=65, help="decode steps and one")
    parser.add_argument("--budget", type=int, default=256, help="tokens per layer and kv head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--nominal-gflops", type=float, default=400.0, help="GFLOP/s of bf16")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    if min(options.prompts, options.rounds) < 1 or options.new_tokens < 2:
        parser.error("--prompts and --rounds must be at least 1, --new-tokens at least 2")
    model = options.model or str(fetch_demo_model())
    result = run(options, model)
    if options.json is not None:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "model")}
        report = settings | {
            "model": model,
            "dtype": "bfloat16",
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
            "results": result.to_dict(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json_text(report, indent=2) + "\n", encoding="utf-8")
    print_table(profile_table(list(result.profile)))
    title = (
        f"Decode step of {options.prompts} sequences, {METHOD} {options.budget}, "
        f"{options.threads} threads"
    )
    print_table(table(result, title))


if __name__ == "__main__":
    main()
