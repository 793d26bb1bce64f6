"""How long one `schedule()` and `absorb()` take, with 512 running and ever more waiting sequences.

The real scheduler and ledger on a model of 80 layers and 8 kv heads over 8 x 2 ranks; the workers'
answers are made up. Prints a table of microseconds (median and 99th percentile of the steps in
which 512 sequences decode and a finished one is replaced).

    python benchmarks/scheduler.py --json results/scheduler.json
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from rich.progress import track
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text
from saqqara.workers.plan import (
    KeptCounts,
    SampledToken,
    StepPlan,
    StepResult,
    WorkerInfo,
    WorkerMemory,
)

LAYERS, HEADS, STAGES, TENSOR = 80, 8, 2, 8
NUM_RUNNING = 512
PROMPT_TOKENS, BUDGET = 2048, 256
PAGES = 4_000_000
QUEUES = (10, 100, 1_000, 10_000, 100_000)


def workers() -> list[WorkerInfo]:
    """Every rank of a 70B-like model, with more pages than it will need."""
    per_stage = LAYERS // STAGES
    return [
        WorkerInfo(
            rank=stage * TENSOR + tensor,
            pipeline_rank=stage,
            tensor_rank=tensor,
            start_layer=stage * per_stage,
            stop_layer=(stage + 1) * per_stage,
            start_head=tensor,
            stop_head=tensor + 1,
            num_pages=PAGES,
            page_tokens=16,
            page_bytes=8192,
            device="none",
            dtype="bfloat16",
            dtype_reason="",
            attention_backend="none",
            attention_reason="",
            linear_backend="none",
            linear_reason="",
            memory=WorkerMemory(),
            hostname="",
            pid=0,
        )
        for stage in range(STAGES)
        for tensor in range(TENSOR)
    ]


def answer(scheduler: Scheduler, plan: StepPlan, all_workers: list[WorkerInfo]) -> list[StepResult]:
    """What the workers would say: token 7 everywhere, and what the retention keeps."""
    ends = [g for g in plan.prefill if g.stop_layer == LAYERS]
    sampled = [SampledToken(slot, PROMPT_TOKENS, 7) for g in ends for slot in g.slots]
    sampled += [SampledToken(i.slot, i.position + i.num_tokens, 7) for i in plan.decode if i.sample]
    rows = Retention.parse("pyramidkv", BUDGET).row_tokens(PROMPT_TOKENS, LAYERS, HEADS)
    allocated = scheduler.ledger.allocated()
    results = []
    for w in all_workers:
        mine = rows[w.start_layer : w.stop_layer, w.start_head : w.stop_head]
        counts = np.ascontiguousarray(mine, dtype=np.int32).tobytes()
        kept = tuple(
            KeptCounts(slot, counts)
            for g in plan.prefill
            if g.start_layer < w.stop_layer <= g.stop_layer
            for slot in g.slots
        )
        is_sampler = w.stop_layer == LAYERS and w.tensor_rank == 0
        results.append(
            StepResult(
                step=plan.step,
                rank=w.rank,
                sampled=tuple(sampled) if is_sampler else (),
                kept=kept,
                pages_free=PAGES - int(allocated[w.rank]),
            )
        )
    return results


def measure(num_waiting: int, num_steps: int) -> dict[str, float]:
    """Microseconds of the controller's part of a step."""
    all_workers = workers()
    scheduler = Scheduler(
        all_workers,
        max_num_seqs=NUM_RUNNING,
        max_model_len=8192,
        max_prefill_tokens=NUM_RUNNING * PROMPT_TOKENS,
    )
    retention = Retention.parse("pyramidkv", BUDGET)
    prompt = tuple(range(PROMPT_TOKENS))
    rng = np.random.default_rng(0)
    for number in range(NUM_RUNNING + num_waiting):
        tokens = int(rng.integers(200, 4000))
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request = TokenRequest(str(number), prompt, sampling, retention)
        scheduler.add(request, sampling.spec(0))
    samples: list[float] = []
    flights: list[StepPlan] = []
    while len(samples) < num_steps:
        started = time.perf_counter()
        plan = scheduler.schedule()
        spent = time.perf_counter() - started
        if plan is not None:
            flights.append(plan)
            if len(flights) < scheduler.max_in_flight:
                continue
        oldest = flights.pop(0)
        results = answer(scheduler, oldest, all_workers)
        started = time.perf_counter()
        scheduler.absorb(oldest, results)
        spent += time.perf_counter() - started
        if oldest.decode and scheduler.num_running >= NUM_RUNNING // 2:
            samples.append(1e6 * spent)
    return {
        "waiting": num_waiting,
        "running": scheduler.num_running,
        "median_microseconds": statistics.median(samples),
        "p99_microseconds": statistics.quantiles(samples, n=100)[98],
    }


def main() -> None:
    """Measure every queue length and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measure(QUEUES[0], arguments.steps)  # the first one only warms up
    rows = [measure(n, arguments.steps) for n in track(QUEUES, "queues")]
    table = Table(title=f"schedule() + absorb(), {NUM_RUNNING} slots, {LAYERS} x {HEADS} rows each")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.0f}" for value in row.values()))
    print_table(table)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json_text(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
