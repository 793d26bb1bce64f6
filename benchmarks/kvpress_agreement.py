"""Whether our methods keep what kvpress keeps, given the same keys and queries.

    python benchmarks/kvpress_agreement.py --json results/kvpress.json

kvpress runs in its own environment (docs/peers.md has the recipe). It takes prompts through a model
in fp32 without dropping anything, and its presses say for every layer what they would keep
(`peer_runners/select_kvpress.py`). Then our `select` chooses from the same tensors under the same
settings: no sinks, average pooling, `knorm` without a window, `tova` with a window of 1. kvpress
pools each query head's attention before it averages the group, we average first; averages commute,
so only rounding differs. `pyramidkv` is compared at kvpress's count for each layer, since the two
spread a budget differently; with `--beta 3`, since kvpress goes uniform where the top layer would
keep less than the window.

A selection is one kv head in one layer at one budget. Where two selections differ, the tokens that
only one of them keeps should lie at the cut: within 1e-5 of its score, relative.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.peer_process import environment
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from saqqara.cluster.cli.tables import print_table
from saqqara.compression.observation import Observation
from saqqara.compression.retention import Retention
from saqqara.compression.scoring import context_scores
from saqqara.compression.selecting import select
from saqqara.configs.json_text import json_text
from saqqara.configs.paths import cache_dir
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.speed.throughput import Workload
from saqqara.workers.attention.base import get_backend
from saqqara.workers.gguf.demo import fetch_demo_model

RUNNER = Path(__file__).resolve().parent / "peer_runners" / "select_kvpress.py"
METHODS = ("snapkv", "pyramidkv", "tova", "knorm")
NEAR_CUT = 1e-5


@dataclass(frozen=True)
class Source:
    """Where keys and queries come from: a model's name for the report, options of the runner."""

    name: str
    options: tuple[str, ...]
    prompts: list[list[int]]


@dataclass
class Agreement:
    """One method on one source.

    Attributes:
        selections: kv heads x layers x budgets x prompts.
        equal: selections that are the same token by token.
        tokens: kept tokens of all selections.
        differing_tokens: kept by us only (as many are kept by kvpress only).
        far_tokens: of those kept by one only, how many are not near the cut.
        farthest_from_cut: largest distance of such a token's score from the cut's, relative.
        largest_score_difference: relative to the larger score, over all context tokens.
    """

    source: str
    method: str
    selections: int = 0
    equal: int = 0
    tokens: int = 0
    differing_tokens: int = 0
    far_tokens: int = 0
    farthest_from_cut: float = 0.0
    largest_score_difference: float = 0.0

    def add(self, ours: list[int], theirs: list[int], scores: list[float]) -> None:
        """Count one selection; `scores` are ours, of the context tokens."""
        self.selections += 1
        self.equal += ours == theirs
        self.tokens += len(ours)
        mine, other = set(ours), set(theirs)
        self.differing_tokens += len(mine - other)
        if mine == other:
            return
        cut = min(scores[j] for j in mine if j < len(scores))
        for j in mine ^ other:
            distance = abs(scores[j] - cut) / abs(cut) if j < len(scores) else float("inf")
            self.farthest_from_cut = max(self.farthest_from_cut, distance)
            self.far_tokens += distance > NEAR_CUT


def settings_of(method: str, window: int, kernel: int) -> dict[str, Any]:
    """Our settings that mean what kvpress computes."""
    if method == "tova":
        return {"method": "tova", "sinks": 0}
    if method == "knorm":
        return {"method": "knorm", "sinks": 0, "window": 0}
    # Every layer is cut at a count of its own, so snapkv's score is all that pyramidkv needs.
    return {"method": "snapkv", "sinks": 0, "window": window, "kernel_size": kernel} | {
        "pooling": "avg"
    }


def observe(retention: Retention, keys: Tensor, queries: Tensor) -> Observation:
    """One layer of a model of one layer, as the engine's torch backend shows it."""
    num_tokens, num_heads, head_dim = keys.shape
    backend, _ = get_backend("torch", torch.device("cpu"), torch.float32)
    seen = retention.num_window_queries(num_tokens)
    scale = head_dim**-0.5
    return Observation(
        layer=0,
        layers=1,
        prompt_tokens=num_tokens,
        keys=keys,
        values=keys,
        queries=queries[len(queries) - seen :] if seen else None,
        scale=scale,
        heads=range(num_heads),
        num_heads=num_heads,
        group_size=queries.shape[1] // num_heads,
        mass_fn=partial(_mass, backend, scale),
    )


def _mass(backend: Any, scale: float, queries: Tensor, keys: Tensor) -> Tensor:
    mass: Tensor = backend.mass(queries, keys, scale)
    return mass


def compare(
    found: dict[str, Tensor], into: dict[str, Agreement], shares: Sequence[float], **how: int
) -> None:
    """Select from every layer that kvpress has seen, and count."""
    for layer in sorted(int(name.split(".")[0]) for name in found if name.endswith(".keys")):
        keys, queries = found[f"{layer}.keys"], found[f"{layer}.queries"]
        for method in METHODS:
            agreement = into[method]
            for share in shares:
                theirs = found[f"{layer}.{method}.{share}"].tolist()
                settings = settings_of(method, **how) | {"budget": len(theirs[0])}
                retention = Retention.parse(settings)
                observation = observe(retention, keys, queries)
                chosen = select(retention, observation)
                rows = [row.tolist() for row in chosen] if chosen is not None else None
                if rows is None:  # a pyramid's lowest layer may keep the whole prompt
                    rows = [list(range(len(keys)))] * keys.shape[1]
                assert retention.score is not None
                scores = context_scores(retention.score, observation, retention.window)
                for head, row in enumerate(rows):
                    agreement.add(row, theirs[head], scores[head].tolist())
                context = found[f"{layer}.{method}.scores"][:, : scores.shape[1]]
                larger = torch.maximum(scores.abs(), context.abs()).clamp_min(1e-30)
                off = float(((scores - context).abs() / larger).max())
                agreement.largest_score_difference = max(agreement.largest_score_difference, off)


def ask_kvpress(
    python: Path, source: Source, given: argparse.Namespace
) -> Iterator[dict[str, Tensor]]:
    """What kvpress says about each prompt.

    Raises:
        RuntimeError: its script failed.
    """
    for prompt in source.prompts:
        with tempfile.TemporaryDirectory() as folder:
            tokens, out = Path(folder) / "tokens.json", Path(folder) / "out.safetensors"
            tokens.write_text(json.dumps(prompt), encoding="utf-8")
            command = [str(python), str(RUNNER), "--threads", str(given.threads)]
            command += ["--tokens", str(tokens), "--out", str(out), *source.options]
            command += ["--window", str(given.window), "--kernel", str(given.kernel)]
            command += ["--beta", str(given.beta), "--shares", json.dumps(given.shares)]
            done = subprocess.run(
                command, env=environment(command), capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"kvpress: {done.stderr[-2000:]}")
            yield load_file(out)


def sources(given: argparse.Namespace) -> list[Source]:
    """Random weights with and without groups, and a real model on English text."""
    rng = np.random.default_rng(0)
    noise = [
        rng.integers(1000, size=given.prompt_tokens).tolist() for _ in range(given.num_prompts)
    ]
    model = given.model or str(fetch_demo_model())
    made = Workload(num_requests=given.num_prompts, prompt_tokens=given.prompt_tokens, text=True)
    text = made.token_ids(EngineConfig(model=model))
    return [
        Source("random, G=1", ("--query-heads", "8", "--kv-heads", "8"), noise),
        Source("random, G=3", ("--query-heads", "12", "--kv-heads", "4"), noise),
        Source(Path(model).name, ("--model", model), text),
    ]


def table_of(results: Sequence[Agreement]) -> Table:
    """For people."""
    table = Table(title="What we keep beside what kvpress keeps")
    for column in ("tensors", "method", "equal selections", "tokens apart", "not at the cut"):
        table.add_column(column, justify="left" if column in ("tensors", "method") else "right")
    table.add_column("farthest from the cut", justify="right")
    table.add_column("scores differ by", justify="right")
    for one in results:
        table.add_row(
            one.source,
            one.method,
            f"{one.equal} of {one.selections} ({one.equal / one.selections:.2%})",
            f"{one.differing_tokens} of {one.tokens}",
            str(one.far_tokens),
            f"{one.farthest_from_cut:.1e}",
            f"{one.largest_score_difference:.1e}",
        )
    return table


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a Llama; default: the demo model")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--num-prompts", type=int, default=2, help="of each kind of tensors")
    parser.add_argument(
        "--shares", type=json.loads, default=[0.125, 0.25, 0.5], help="JSON list of kept shares"
    )
    parser.add_argument("--window", type=int, default=32, help="of snapkv and pyramidkv")
    parser.add_argument("--kernel", type=int, default=5, help="of snapkv and pyramidkv")
    parser.add_argument(
        "--beta", type=int, default=3, help="of pyramidkv: with 20, its own, it is mostly uniform"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-dir", type=Path, help="environments; default: <cache>/peers")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser


def main() -> int:
    """Compare and report; 0 when whatever differs lies at the cut."""
    given = arguments().parse_args()
    torch.set_num_threads(given.threads)
    python = (given.peers_dir or cache_dir() / "peers").absolute() / "kvpress" / "bin" / "python"
    if not python.exists():
        print(f"no {python}: see 'kvpress' in docs/peers.md", file=sys.stderr)
        return 2
    results: list[Agreement] = []
    for source in sources(given):
        print(f"{source.name}: {len(source.prompts)} prompts", file=sys.stderr, flush=True)
        into = {method: Agreement(source.name, method) for method in METHODS}
        for found in ask_kvpress(python, source, given):
            compare(found, into, given.shares, window=given.window, kernel=given.kernel)
        results += into.values()
    if given.json is not None:
        settings = {
            name: getattr(given, name)
            for name in ("prompt_tokens", "num_prompts", "shares", "window", "kernel", "beta")
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        text = json_text({"settings": settings, "results": [asdict(r) for r in results]}, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")
    print_table(table_of(results))
    return 1 if any(one.far_tokens for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
