"""What HTTP and Ray Serve cost: the same engine offline and behind its server, in pairs.

Throughput: a batch of prompts is given to the offline engine at once, and to the server as one
request each (streamed, and not), in turns that begin with another of them each round; the ratio is
taken within a round. Time to first token: one request at a time; what the engine itself measured
for it (from its /metrics) is subtracted from what the client saw, and between two of them the
server is asked for its models, which tells what HTTP and Serve take alone. Gaps: with many streams
at once, the seconds between two pieces at the client, and between two tokens in the engine.

    python benchmarks/server.py --json results/server.json
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness.local_server import LocalServer, local_server
from harness.server_figures import (
    FirstTokens,
    buckets,
    gaps,
    histogram_quantile,
    percentile,
    ratios,
    rotated,
    targets,
)
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.client import LocalClient
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.workers.gguf.demo import fetch_demo_model
from saqqara.workers.models.spec import load_spec

NAME = "bench"
POLL_SECONDS = 1.0
FIRST_TOKEN = "vllm:time_to_first_token_seconds_sum"
GAP = "vllm:inter_token_latency_seconds"
WAYS = ("offline", "server", "server, streamed")


def main() -> int:
    """Measure, print and write; 1 if a target is missed."""
    arguments = parse_arguments()
    model = arguments.model or str(fetch_demo_model())
    config = EngineConfig(
        model=model,
        retention=arguments.retention,
        max_num_seqs=max(arguments.batch, arguments.streams),
        kv_memory_gib=arguments.kv_memory_gib,
        num_threads=arguments.threads,
        dtype=arguments.dtype,
        prefix_caching=False,
    )
    flags = ["--model", model, "--served-model-name", NAME, "--no-prefix-caching"]
    for name in ("retention", "max_num_seqs", "kv_memory_gib", "num_threads", "dtype"):
        if (value := getattr(config, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    offline = LocalClient(config)
    try:
        with local_server(*flags) as server:
            result = measure(offline, server, config, arguments)
    finally:
        offline.shutdown()
    print_table(table(result))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json_text(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["meets_targets"] else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder; default: the demo model")
    parser.add_argument("--retention", default="full")
    parser.add_argument("--batch", type=int, default=16, help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--first-tokens", type=int, default=100, help="requests for the latency")
    parser.add_argument("--streams", type=int, default=64, help="at once, for the gaps")
    parser.add_argument("--dtype", default="auto", help="of the engine")
    parser.add_argument("--kv-memory-gib", type=float, default=1.0)
    parser.add_argument("--threads", type=int, help="CPU threads of the engine; default: all")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def measure(
    offline: LocalClient, server: LocalServer, config: EngineConfig, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All rounds, the latencies and the gaps; the first round only warms up."""
    generator = np.random.default_rng(0)
    vocab_size = load_spec(config.model).vocab_size
    length = arguments.prompt_tokens

    def draw(count: int) -> list[list[int]]:
        prompts: list[list[int]] = generator.integers(vocab_size, size=(count, length)).tolist()
        return prompts

    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds + 1):
        rates = one_round(offline, server, draw(arguments.batch), arguments.new_tokens, number)
        say(f"round {number} of {arguments.rounds}: {rates}" + " (warm-up)" * (number == 0))
        if number > 0:
            rounds.append(rates)
    first = asyncio.run(first_tokens(server, draw(arguments.first_tokens)))
    say(f"{arguments.first_tokens} single requests are through")
    client_gaps, engine_gap = asyncio.run(
        stream_gaps(server, draw(arguments.streams), arguments.new_tokens)
    )
    say(f"{arguments.streams} streams are through")
    found = list(targets(rounds, first, client_gaps, engine_gap))
    return {
        "config": config.model_dump(mode="json"),
        "workload": {k: v for k, v in vars(arguments).items() if k != "json"},
        "tokens_per_second": rounds,
        "first_token_seconds": {**asdict(first), "overhead": first.overhead, "ours": first.ours},
        "gap_seconds": {
            "client": {str(q): percentile(client_gaps, q) for q in (0.5, 0.9, 0.99)},
            "engine": {"0.99": engine_gap},
        },
        "targets": [dict(zip(("name", "value", "bound", "met"), t, strict=True)) for t in found],
        "meets_targets": all(is_met for *_, is_met in found),
    }


def say(line: str) -> None:
    """How far it is."""
    print(line, file=sys.stderr, flush=True)


def one_round(
    offline: LocalClient,
    server: LocalServer,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    number: int,
) -> dict[str, float]:
    """Tokens per second of each way, which take turns in beginning."""
    seconds = {}
    for name in rotated(WAYS, number):
        if name == "offline":
            seconds[name] = run_offline(offline, prompts, new_tokens)
        else:
            is_streamed = name == "server, streamed"
            seconds[name] = run_server(server, prompts, new_tokens, stream=is_streamed)
    return {name: len(prompts) * new_tokens / seconds[name] for name in WAYS}


def run_offline(client: LocalClient, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Seconds that the offline engine takes for a batch."""
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    requests = [Request(str(i), tuple(prompt), sampling) for i, prompt in enumerate(prompts)]
    started = time.perf_counter()
    rejections = client.submit(requests)
    assert not rejections, rejections
    left = len(requests)
    while left:
        left -= len(client.poll(POLL_SECONDS))
    return time.perf_counter() - started


def run_server(
    server: LocalServer, prompts: Sequence[Sequence[int]], new_tokens: int, *, stream: bool
) -> float:
    """Seconds that the server takes for a batch of one request per prompt."""

    async def run() -> float:
        started = time.perf_counter()
        bodies = [body(prompt, new_tokens, stream=stream) for prompt in prompts]
        answers = await asyncio.gather(*(server.post("/v1/completions", b) for b in bodies))
        seconds = time.perf_counter() - started
        for answer in answers:
            assert answer.status == 200, answer
            assert f'"completion_tokens":{new_tokens}'.encode() in answer.body
        return seconds

    return asyncio.run(run())


def body(prompt: Sequence[int], new_tokens: int, *, stream: bool) -> dict[str, Any]:
    """A greedy completion of a fixed length."""
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return {
        "model": NAME,
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        **options,
    }


async def first_tokens(server: LocalServer, prompts: Sequence[Sequence[int]]) -> FirstTokens:
    """One request at a time, and one for nothing after each."""
    client: list[float] = []
    engine: list[float] = []
    idle: list[float] = []
    before = server.metric(FIRST_TOKEN)
    for prompt in prompts:
        answer = await server.post("/v1/completions", body(prompt, 2, stream=True))
        assert answer.status == 200, answer
        after = server.metric(FIRST_TOKEN)
        client.append(answer.first_seconds)
        engine.append(after - before)
        before = after
        nothing = await server.ask("/v1/models")
        assert nothing.status == 200, nothing
        idle.append(nothing.first_seconds)
    return FirstTokens(client, engine, idle)


async def stream_gaps(
    server: LocalServer, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[float], float]:
    """Seconds between pieces at the client, and the engine's 99th percentile between tokens."""
    before = buckets(server.get("/metrics"), GAP)
    bodies = [body(prompt, new_tokens, stream=True) for prompt in prompts]
    answers = await asyncio.gather(*(server.post("/v1/completions", b) for b in bodies))
    assert {answer.status for answer in answers} == {200}
    found = [gap for answer in answers for gap in gaps(answer.piece_seconds)]
    return found, histogram_quantile(before, buckets(server.get("/metrics"), GAP), 0.99)


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    table = Table(title="The engine behind HTTP and Ray Serve", title_justify="left")
    for name in ("", "median", "least", "most"):
        table.add_column(name, justify="left" if not name else "right")
    rounds = result["tokens_per_second"]
    for name in WAYS:
        table.add_row(f"{name}, tokens/s", *_cells([r[name] for r in rounds], "{:.1f}"))
    for name in WAYS[1:]:
        table.add_row(f"{name} / offline", *_cells(ratios(rounds, name, "offline"), "{:.1%}"))
    for name, values in result["first_token_seconds"].items():
        cells = _cells([1e3 * value for value in values], "{:.1f}")
        table.add_row(f"first token, {name}, ms", *cells)
    for side, quantiles in result["gap_seconds"].items():
        for share, value in quantiles.items():
            table.add_row(f"gap, {side}, {share}, ms", f"{1e3 * value:.1f}", "", "")
    for target in result["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        table.add_row(f"{target['name']}: {verdict}", f"{target['value']:.4f}", "", "")
    return table


def _cells(values: Sequence[float], form: str) -> list[str]:
    return [form.format(f(values)) for f in (statistics.median, min, max)]


if __name__ == "__main__":
    sys.exit(main())
