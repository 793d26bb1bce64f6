"""What the way through Ray adds to a decode step: one rank as an actor against one in this process.

    python benchmarks/controller.py --json results/controller.json

The same engine, scheduler and worker, `--prompts` sequences that decode together, all threads of
the machine for the one rank; rounds of both take turns, so that whatever else the machine does
meets both. A step is the wall time of `Engine.step`, scheduling and detokenisation included; the
time is the median of all steps in which all decode.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from rich.progress import track
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import Executor, LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.on_ray.controller import connect
from saqqara.cluster.on_ray.executor import RayExecutor
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.gguf.demo import fetch_demo_model
from saqqara.workers.models.spec import load_spec

AT_MOST = 0.10  # of a step in this process


def main() -> None:
    """Run the rounds, print the table, write the numbers."""
    arguments = parse_arguments()
    model = arguments.model or str(fetch_demo_model())
    config = EngineConfig(
        model=model,
        dtype=arguments.dtype,
        max_num_seqs=arguments.prompts,
        max_model_len=arguments.prompt_tokens + arguments.new_tokens + 1,
        max_prefill_tokens=arguments.prompts * arguments.prompt_tokens,
        num_threads=usable_cores(),
        prefix_caching=False,
    )
    connect()
    local = make_engine(config, LocalExecutor(config))
    remote = make_engine(config, RayExecutor(config.model_copy(update={"executor": "ray"})))
    steps: dict[str, list[float]] = {"local": [], "ray": []}
    try:
        for number in track(range(arguments.rounds), "rounds"):
            for name, engine in (("local", local), ("ray", remote)):
                seconds = decode(engine, arguments, number)
                steps[name] += seconds if number else []  # the first round warms up
    finally:
        local.shutdown()
        remote.shutdown()
    report(steps, arguments)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder; default: the demo model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6, help="the first only warms up")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_engine(config: EngineConfig, executor: Executor) -> Engine:
    """An engine that is stepped by hand."""
    return Engine(config, executor, Tokenizer.load(config.model), load_spec(config.model))


def decode(engine: Engine, arguments: argparse.Namespace, number: int) -> list[float]:
    """Seconds of the steps in which all prompts decode."""
    params = SamplingParams(temperature=0.0, max_tokens=arguments.new_tokens, ignore_eos=True)
    for index in range(arguments.prompts):
        prompt = tuple(100 + (7 * index + i) % 1000 for i in range(arguments.prompt_tokens))
        engine.add(Request(f"{number}-{index}", prompt, params))
    seconds = []
    while engine.has_unfinished():
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds[2:-2]  # without prefill and the last tokens


def report(steps: Mapping[str, Sequence[float]], arguments: argparse.Namespace) -> None:
    """Print the table; write the numbers."""
    local, remote = (1000 * median(steps[name]) for name in ("local", "ray"))
    share = (remote - local) / local
    table = Table(title=f"a decode step of {arguments.prompts} sequences")
    table.add_column("")
    table.add_column("milliseconds", justify="right")
    table.add_row("in this process", f"{local:.2f}")
    table.add_row("through Ray", f"{remote:.2f}")
    table.add_row("overhead", f"{remote - local:+.2f}")
    table.add_row(f"of a step (at most {AT_MOST:.0%})", f"{share:+.1%}")
    print_table(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"local_ms": local, "ray_ms": remote, "overhead": share}
        arguments.json.write_text(json_text(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
