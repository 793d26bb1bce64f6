"""What it costs to bring a preempted sequence back: copied to the host and back, or computed again.

    python benchmarks/preemption.py --prompts 512,2000,4000 --rounds 3
    python benchmarks/preemption.py --race 0,0.25 --rounds 2

One worker on this machine prefills a prompt, generates `--generated` tokens, and preempts the
sequence in both ways, in turns. `copy` parks it in the host's memory and puts it back; `again`
prefills its prompt and replays its tokens, one by one where a decode stage cuts rows. Seconds are
medians over the rounds, without the first; `MiB` is what is copied one way.

`--race` lets 12 requests of 200 tokens in and 200 out race for the room of three full ones. Each
given share of it is host memory for those that are preempted, in turns.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
from harness.comma_lists import above_zero, comma_list, fraction

from saqqara import LLM, SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.gguf.demo import fetch_demo_model
from saqqara.workers.models.spec import load_spec
from saqqara.workers.plan import (
    DecodeItem,
    NewSequence,
    Parking,
    PrefillGroup,
    SamplingSpec,
    StepPlan,
)
from saqqara.workers.worker import Worker

MIB = 1 << 20
METHODS: dict[str, Any] = {
    "full": "full",
    "snapkv 25%": {"method": "snapkv", "budget": "25%"},
    "pyramidinfer, decode stage": {
        "method": "pyramidinfer",
        "decode": {"trigger": "published"},
    },
}


def seconds(worker: Worker, *plans: StepPlan) -> float:
    """How long a worker takes for plans."""
    started = time.perf_counter()
    for plan in plans:
        worker.execute(plan)
    return time.perf_counter() - started


def measure(
    worker: Worker, retention: Retention, num_prompt: int, num_generated: int, rounds: int
) -> tuple[float, float, float]:
    """Seconds of a copy there and back, seconds of computing it again, and MiB that are copied."""
    rng = np.random.default_rng(num_prompt)
    prompt = rng.integers(1000, 40_000, num_prompt).tolist()
    group = (PrefillGroup((0,), 0, worker.spec.num_layers),)

    def new(tokens: list[int], **others: Any) -> NewSequence:
        data = np.array(tokens, dtype=np.int32).tobytes()
        return NewSequence(0, data, num_prompt, SamplingSpec(temperature=0.0), retention, **others)

    result = worker.execute(StepPlan(0, new=(new(prompt),), prefill=group))
    tokens = [*prompt, result.sampled[0].token_id]
    for _ in range(num_generated):
        step = worker.execute(StepPlan(0, decode=(DecodeItem(0, len(tokens) - 1),)))
        tokens.append(step.sampled[0].token_id)
    fed = len(tokens) - 1
    num_replay = fed - num_prompt
    items = [DecodeItem(0, num_prompt, num_replay, sample=False)]
    if retention.decode is not None:
        items = [DecodeItem(0, num_prompt + n, sample=False) for n in range(num_replay)]
    replay = [StepPlan(0, decode=(item,)) for item in items]
    copies, again, copied = [], [], 0
    for _ in range(rounds + 1):
        leave = StepPlan(0, park=(Parking(0, 1),), free=(0,))
        spent = seconds(worker, leave)
        copied = worker._shard.parked.host_bytes
        back = StepPlan(0, new=(new(tokens, resumes=1, resumed_tokens=fed),))
        copies.append(spent + seconds(worker, back))
        anew = StepPlan(0, free=(0,), new=(new(tokens),), prefill=group)
        again.append(seconds(worker, anew, *replay))
    worker.execute(StepPlan(0, free=(0,)))
    return statistics.median(copies[1:]), statistics.median(again[1:]), copied / MIB


def race(model: str, shares: list[float], rounds: int) -> None:
    """Print how long requests take that share too little room, by the share of host memory."""
    spec = load_spec(model)
    token_bytes = 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    gib = 3 * (200 + 200 + 16) * token_bytes / (1 << 30)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1000, 40_000, 200).tolist() for _ in range(12)]
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    print("| retention | host share | wall s | preempted | prefilled s |")
    print("|---|---|---|---|---|")
    for _ in range(rounds):
        for retention in (METHODS["full"], METHODS["snapkv 25%"]):
            for share in shares:
                with LLM(
                    model,
                    retention=retention,
                    kv_memory_gib=gib,
                    host_kv_gib=share * gib,
                    max_num_seqs=12,
                    prefix_caching=False,
                ) as llm:
                    llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
                    report = llm.report()
                name = Retention.parse(retention).method
                figures = f"{report.num_preemptions} | {report.prefill_seconds:.1f}"
                print(
                    f"| {name} | {share:.0%} | {report.wall_seconds:.1f} | {figures} |", flush=True
                )


def main() -> None:
    """Read the options, and print a line for each retention and length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument(
        "--prompts",
        type=comma_list(above_zero, "whole numbers above 0"),
        default=[512, 2000, 4000],
        help="tokens of prompts, such as 512,2000,4000",
    )
    parser.add_argument("--generated", type=int, default=64, help="tokens after them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--race",
        type=comma_list(fraction, "shares from 0 to less than 1"),
        help="shares of the room that are host memory, such as 0,0.25",
    )
    args = parser.parse_args()
    if args.race is not None:
        race(args.model or str(fetch_demo_model()), args.race, args.rounds)
        return
    lengths = args.prompts
    config = EngineConfig(
        model=args.model or str(fetch_demo_model()),
        max_num_seqs=2,
        max_model_len=max(lengths) + args.generated + 2,
    )
    worker = Worker.local(config.for_worker())
    print(f"{worker.info.device}, {worker.info.dtype}, {args.generated} tokens generated")
    print("| retention | prompt | MiB | copy ms | again ms | again / copy |")
    print("|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        for length in lengths:
            retention = Retention.parse(method)
            copy, again, mib = measure(worker, retention, length, args.generated, args.rounds)
            ms = f"{1e3 * copy:.1f} | {1e3 * again:.0f} | {again / copy:.0f}"
            print(f"| {name} | {length} | {mib:.1f} | {ms} |", flush=True)


if __name__ == "__main__":
    main()
