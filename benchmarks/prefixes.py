"""Prompts that begin alike: what is computed, how soon tokens come, and the time of all of it.

    python benchmarks/prefixes.py --rounds 3 \\
        --engines saqqara:full,saqqara:full/prefix_caching=true,vllm/prefix-caching=on

Requests come at once. They share a prefix, which is another one in each round, so that nothing of
it is cached when a round begins, and each has a suffix of its own. Engines are named as in
`peers.py`, take turns, and decode greedily without an end; the text is Python's own documentation.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

from harness.peer_models import NAMES, peer_model
from harness.peer_report import Sample
from peers import Run, Workload, parse_engines, positive, say
from rich.table import Table

from saqqara.cluster.batch.compare import compare_answers
from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.configs.json_text import json_text
from saqqara.configs.paths import cache_dir
from saqqara.evaluation.prompts.corpus import pydoc_text

ON = "prefix_caching=true"
ENGINES = ",".join(
    f"saqqara:{method}{cached}"
    for method in ("full", "recommended@25%")
    for cached in ("", f"/{ON}")
)


def make_prompts(
    tokens: list[int], number: int, num_requests: int, num_shared: int, num_own: int
) -> list[list[int]]:
    """Prompts of one round: a prefix that no other round has, and suffixes of their own.

    Raises:
        ValueError: there is too little text for it.
    """
    size = num_shared + num_requests * num_own
    start = number * size
    if start + size > len(tokens):
        raise ValueError(f"the text has {len(tokens)} tokens, round {number} needs {start + size}")
    prefix, rest = tokens[start : start + num_shared], tokens[start + num_shared :]
    suffixes = [rest[i * num_own : (i + 1) * num_own] for i in range(num_requests)]
    return [prefix + suffix for suffix in suffixes]


def figures(samples: list[Sample], prompt_tokens: int) -> dict[str, Any]:
    """Of one engine: medians over rounds; `computed_tokens` of all prompts of a round."""
    firsts = [median(s.first_token_seconds) for s in samples if s.first_token_seconds]
    cached = [s.cached_tokens for s in samples if s.cached_tokens is not None]
    return {
        "rounds": len(samples),
        "wall_seconds": median(s.wall_seconds for s in samples),
        "first_token_seconds": median(firsts) if firsts else None,
        "computed_tokens": prompt_tokens - median(cached) if cached else None,
        "walls": [s.wall_seconds for s in samples],
        "foreign_cpu_share": max(s.foreign_cpu_share for s in samples),
    }


def pairs(samples: list[Sample]) -> dict[str, dict[str, Any]]:
    """Of each engine against the first: wall times of the same rounds, and equal answers."""
    by_name: dict[str, dict[int, Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.engine, {})[sample.round] = sample
    [(first, base), *others] = by_name.items()
    found = {}
    for name, rounds in others:
        both = sorted(base.keys() & rounds.keys())
        ratios = [rounds[n].wall_seconds / base[n].wall_seconds for n in both]
        answers = [
            compare_answers(base[n].output_token_ids, rounds[n].output_token_ids).to_dict()
            for n in both[:1]
        ]
        found[f"{name} / {first}"] = {"wall_ratios": ratios, "agreement": answers}
    return found


def table(result: dict[str, Any]) -> Table:
    """The figures side by side."""
    shown = Table(title="Prompts that begin alike")
    for name in ("engine", "tokens computed", "first token (median)", "wall", "foreign CPU"):
        shown.add_column(name, justify="left" if name == "engine" else "right")
    for name, of in result["engines"].items():
        first = of["first_token_seconds"]
        shown.add_row(
            name,
            "" if of["computed_tokens"] is None else f"{of['computed_tokens']:,.0f}",
            "" if first is None else f"{first:.2f} s",
            f"{of['wall_seconds']:.2f} s",
            f"{of['foreign_cpu_share']:.0%}",
        )
    return shown


def main() -> int:
    """Measure and report; 0 when every engine has answered."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=NAMES[0], help=f"folder, or {', '.join(NAMES)}")
    parser.add_argument("--engines", default=ENGINES, help="as in peers.py, with commas between")
    parser.add_argument("--requests", type=positive, default=64)
    parser.add_argument("--shared-tokens", type=positive, default=2000)
    parser.add_argument("--own-tokens", type=positive, default=50)
    parser.add_argument("--new-tokens", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="number of the first one")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one call")
    parser.add_argument("--peers-dir", type=Path, help="environments; default: <cache>/peers")
    parser.add_argument("--logs", type=Path, default=Path("results/prefixes"))
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    model = peer_model(given.model, say)
    peers_dir = (given.peers_dir or cache_dir() / "peers").absolute()
    try:
        specs = parse_engines(given.engines, peers_dir, model, given.threads)
    except ValueError as error:
        parser.error(str(error))
    tokens = Tokenizer.load(model).encode(pydoc_text())
    length = given.shared_tokens + given.own_tokens
    workload = Workload("prefixes", given.requests, length, given.new_tokens)
    run = Run(model, given.logs, given.timeout)
    with run.start(specs):
        for name in list(run.engines):
            run.call(name, workload, [tokens[-length:]], None)
        for number in range(given.first_round, given.first_round + given.rounds):
            sizes = given.requests, given.shared_tokens, given.own_tokens
            prompts = make_prompts(tokens, number, *sizes)
            names = [name for name in run.engines if name not in run.failures]
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                run.call(name, workload, prompts, number)
    result: dict[str, Any] = {
        "settings": {key: str(value) for key, value in vars(given).items()},
        "failures": run.failures,
        "engines": {
            name: figures(samples, given.requests * length)
            for name in run.engines
            if (samples := [s for s in run.samples if s.engine == name])
        },
        "pairs": pairs(run.samples) if run.samples else {},
    }
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    print_table(table(result))
    for name, of in result["pairs"].items():
        ratios = ", ".join(f"{ratio:.2f}" for ratio in of["wall_ratios"])
        print(f"{name}: wall {ratios}; agreement {of['agreement']}")
    for name, reason in run.failures.items():
        print(f"{name}: {reason}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
