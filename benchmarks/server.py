"""What HTTP and Ray Serve cost: the same engine offline and behind its server, in pairs.

Throughput: a batch of prompts is given to the offline engine at once, then to the server as one
request each (streamed, and not), and so on in turns; the ratio is taken within each round. Time to
first token: one request at a time; what the engine itself measured for it (from its /metrics) is
subtracted from what the client saw.

    python benchmarks/server.py --json results/server.json
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from local_server import LocalServer, local_server
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.client import LocalClient
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.demo import fetch_demo_model
from saqqara.workers.models.spec import load_spec

NAME = "bench"
MIN_RATIO = 0.90
MAX_OVERHEAD_SECONDS = 0.015
POLL_SECONDS = 1.0
FIRST_TOKEN = "vllm:time_to_first_token_seconds_sum"


def main() -> int:
    """Measure, print and write; 1 if a target is missed."""
    arguments = parse_arguments()
    model = arguments.model or str(fetch_demo_model())
    config = EngineConfig(
        model=model,
        retention=arguments.retention,
        max_num_seqs=arguments.batch,
        kv_memory_gib=arguments.kv_memory_gib,
        num_threads=arguments.threads,
    )
    flags = ["--model", model, "--served-model-name", NAME]
    for name in ("retention", "max_num_seqs", "kv_memory_gib", "num_threads"):
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-tokens", type=int, default=40, help="requests for the latency")
    parser.add_argument("--kv-memory-gib", type=float, default=1.0)
    parser.add_argument("--threads", type=int, help="CPU threads of the engine; default: all")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def measure(
    offline: LocalClient, server: LocalServer, config: EngineConfig, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All rounds, and the latencies; the first round only warms up."""
    generator = np.random.default_rng(0)
    shape = (arguments.batch, arguments.prompt_tokens)
    vocab_size = load_spec(config.model).vocab_size
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds + 1):
        prompts = generator.integers(vocab_size, size=shape).tolist()
        tokens = arguments.batch * arguments.new_tokens
        rates = {
            "offline": tokens / run_offline(offline, prompts, arguments.new_tokens),
            "server": tokens / run_server(server, prompts, arguments.new_tokens, stream=False),
            "server, streamed": tokens
            / run_server(server, prompts, arguments.new_tokens, stream=True),
        }
        if number > 0:
            rounds.append(rates)
    prompts = generator.integers(vocab_size, size=(arguments.first_tokens, shape[1])).tolist()
    latencies = asyncio.run(first_tokens(server, prompts))
    ratios = {
        name: statistics.median(r[name] / r["offline"] for r in rounds)
        for name in ("server", "server, streamed")
    }
    overhead = statistics.median(latencies["overhead"])
    return {
        "config": config.model_dump(mode="json"),
        "workload": {k: v for k, v in vars(arguments).items() if k != "json"},
        "tokens_per_second": rounds,
        "ratio_to_offline": ratios,
        "first_token_seconds": latencies,
        "first_token_overhead_seconds": overhead,
        "meets_targets": min(ratios.values()) >= MIN_RATIO and overhead < MAX_OVERHEAD_SECONDS,
    }


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


async def first_tokens(
    server: LocalServer, prompts: Sequence[Sequence[int]]
) -> dict[str, list[float]]:
    """Seconds to the first token of one request at a time: of the client, the engine, between."""
    seen: dict[str, list[float]] = {"client": [], "engine": [], "overhead": []}
    before = server.metric(FIRST_TOKEN)
    for prompt in prompts:
        answer = await server.post("/v1/completions", body(prompt, 2, stream=True))
        assert answer.status == 200, answer
        after = server.metric(FIRST_TOKEN)
        seen["client"].append(answer.first_seconds)
        seen["engine"].append(after - before)
        seen["overhead"].append(answer.first_seconds - (after - before))
        before = after
    return seen


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    table = Table(title="The engine behind HTTP and Ray Serve", title_justify="left")
    for name in ("", "median", "least", "most", "target"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("offline", "server", "server, streamed"):
        values = [r[name] for r in result["tokens_per_second"]]
        table.add_row(f"{name}, tokens/s", *_cells(values, "{:.1f}"), "")
    for name in result["ratio_to_offline"]:
        values = [r[name] / r["offline"] for r in result["tokens_per_second"]]
        table.add_row(f"{name} / offline", *_cells(values, "{:.1%}"), f">= {MIN_RATIO:.0%}")
    limits = {"overhead": f"< {1e3 * MAX_OVERHEAD_SECONDS:.0f}"}
    for name, values in result["first_token_seconds"].items():
        cells = _cells([1e3 * value for value in values], "{:.1f}")
        table.add_row(f"first token, {name}, ms", *cells, limits.get(name, ""))
    return table


def _cells(values: Sequence[float], form: str) -> list[str]:
    return [form.format(f(values)) for f in (statistics.median, min, max)]


if __name__ == "__main__":
    sys.exit(main())
