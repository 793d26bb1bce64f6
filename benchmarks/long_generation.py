"""A long generation with rows that stay short: every method's decode stage, step by step.

    python benchmarks/long_generation.py --json results/long.json --plot results/long.png

`full` generates `--new-tokens` tokens greedily after a prompt from Python's documentation; with
`--follow text` they are what the documentation itself goes on with. Then one engine is fed exactly
these tokens, one per decode step, under `full` and under every method, all sequences in one batch.
So every method sees the same past, and its rows are compacted (or, for PyramidInfer, trimmed) just
as if it had generated that text. (A small model's greedy answer may run in circles, which most
methods can follow; the documentation is the harder test.) After every step the length of every row
is read from the worker: none may be longer than its target, the slack and one page, or the script
fails. The ledger's count of pages is compared with the worker's after every step, too.

rows, last    mean length of a row after the last token
longest row   most tokens that any row ever had, the one just fed included
over target   most tokens by which any row ever outgrew its own target, out of slack + page
KV MiB, peak  most bytes of this sequence's pages between steps
top-1         of the tokens that full holds most likely (all that it generates itself), the share
              that the method holds most likely, too
logprob       mean difference of the tokens' log-probability, the method's less full's

PyramidInfer has no targets; its rows are what its rule leaves. `--answer FILE` keeps full's tokens
for another run: it is read where it exists and fits, and written otherwise.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from harness.watching import EVERY, Track, WatchingExecutor
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.decode import DecodeStage
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.figures.plots import distinct_colours
from saqqara.evaluation.speed.throughput import MIB, Workload
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.gguf.demo import fetch_demo_model
from saqqara.workers.models.spec import ModelSpec, load_spec

METHODS = (
    "streaming",
    "h2o",
    "snapkv",
    "pyramidkv",
    "adakv",
    "ada-pyramidkv",
    "headkv",
    "tova",
    "knorm",
    "random",
    "recommended",
)
PROFILE = "SmolLM2-135M-Instruct"
TRIGGERS = ("published", "stored")
GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """One method's figures; see the top of this file. `halves` are top-1 of the text's halves."""

    label: str
    mean_length: float
    longest: int
    over_target: int | None
    limit: int | None
    peak_bytes: int
    top1: float
    halves: tuple[float, float]
    logprob_difference: float
    mean_lengths: list[float]


class Bench:
    """One engine in this process, stepped by hand.

    Args:
        model: folder of the model.
        num_threads: of the CPU.
        num_sequences: at once.
        max_model_len: tokens of the prompt and its continuation.
    """

    def __init__(
        self, model: str, num_threads: int, num_sequences: int, max_model_len: int
    ) -> None:
        spec = load_spec(model)
        rows = spec.num_layers * spec.num_kv_heads
        row_bytes = max_model_len * spec.kv_bytes_per_row_token(torch.bfloat16)
        self.config = EngineConfig(
            model=model,
            dtype="bfloat16",
            num_threads=num_threads,
            max_num_seqs=num_sequences,
            max_model_len=max_model_len,
            max_prefill_tokens=max_model_len,
            kv_memory_gib=(num_sequences + 1) * rows * row_bytes / GIB,
            prefix_caching=False,
        )
        self.executor = WatchingExecutor(self.config)
        self._engine = Engine(self.config, self.executor, Tokenizer.load(model), spec)

    def generate(self, prompt: Sequence[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
        """Greedy tokens of full retention, after every step all so far."""
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._engine.add(Request("full", list(prompt), sampling, retention="full", stream=True))
        for outputs in self._steps():
            for output in outputs:
                assert isinstance(output, RequestOutput)
                yield output.outputs[0].token_ids

    def feed(
        self, prompt: Sequence[int], answer: Sequence[int], retentions: Sequence[Retention]
    ) -> Iterator[dict[str, ScoreOutput]]:
        """Feed an answer under all settings at once; after every step what is through, by label."""
        for retention in retentions:
            self._engine.add(
                Request(
                    retention.label,
                    list(prompt),
                    score_continuation=list(answer),
                    retention=retention,
                    token_by_token=True,
                )
            )
        for outputs in self._steps():
            done = {o.request_id: o for o in outputs if isinstance(o, ScoreOutput)}
            for output in done.values():
                if output.error is not None:
                    raise RuntimeError(output.error)
            yield done

    def close(self) -> None:
        """Release the worker."""
        self._engine.shutdown()

    def _steps(self) -> Iterator[list[RequestOutput | ScoreOutput]]:
        while self._engine.has_unfinished():
            yield self._engine.step()


def settings(
    methods: Sequence[str], budget: int, slack_pages: int, triggers: Sequence[str]
) -> list[Retention]:
    """`full`, the methods with a decode stage, and PyramidInfer with each trigger.

    Raises:
        ValueError: a method is unknown or takes no decode stage.
    """
    stage = {"decode": DecodeStage(slack_pages).to_dict(), "budget": budget}
    return [
        Retention(),
        *(
            Retention.parse(
                {"method": m, **stage, **({"profile": PROFILE} if m == "headkv" else {})}
            )
            for m in methods
        ),
        *(Retention.parse({"method": "pyramidinfer", "decode": {"trigger": t}}) for t in triggers),
    ]


def outcomes(
    retentions: Sequence[Retention], tracks: dict[str, Track], scores: dict[str, ScoreOutput]
) -> list[Outcome]:
    """The figures of every setting, compared with those of the first, `full`."""
    full = scores[retentions[0].label]
    reference, is_top = np.array(full.logprobs), np.array(full.ranks) == 1
    half = len(is_top) // 2
    result = []
    for retention in retentions:
        track, score = tracks[retention.label], scores[retention.label]
        agrees = np.array(score.ranks) == 1
        first, second = agrees[:half][is_top[:half]], agrees[half:][is_top[half:]]
        result.append(
            Outcome(
                label=retention.label,
                mean_length=track.mean_length,
                longest=track.longest,
                over_target=None if track.limit is None else track.over_target,
                limit=track.limit,
                peak_bytes=track.peak_bytes,
                top1=float(agrees[is_top].mean()),
                halves=(float(first.mean()), float(second.mean())),
                logprob_difference=float((np.array(score.logprobs) - reference).mean()),
                mean_lengths=track.mean_lengths,
            )
        )
    return result


def table(results: Sequence[Outcome], prompt_tokens: int, new_tokens: int) -> Table:
    """The figures for people."""
    made = Table(
        "setting", title=f"{prompt_tokens} prompt tokens and {new_tokens:,} fed one by one"
    )
    for column in (
        "rows, last",
        "longest row",
        "over target",
        "KV MiB, peak",
        "top-1",
        "first half",
        "second half",
        "logprob",
    ):
        made.add_column(column, justify="right")
    for one in results:
        over = "-" if one.limit is None else f"{one.over_target} of {one.limit}"
        made.add_row(
            one.label,
            f"{one.mean_length:,.0f}",
            f"{one.longest:,}",
            over,
            f"{one.peak_bytes / MIB:.1f}",
            f"{one.top1:.1%}",
            *(f"{half:.1%}" for half in one.halves),
            f"{one.logprob_difference:+.3f}",
        )
    return made


def plot(path: Path, results: Sequence[Outcome]) -> None:
    """Mean row length by fed tokens (logarithmic), and agreement with full, in like colours."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    colours = distinct_colours(len(results))
    for one, colour in zip(results, colours, strict=True):
        fed = EVERY * np.arange(1, len(one.mean_lengths) + 1)
        left.plot(fed, one.mean_lengths, color=colour, linewidth=1.2)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.set(xlabel="tokens fed after the prompt", ylabel="mean tokens of a row")
    names = [one.label.partition("@")[0].replace(",decode=", ", ") for one in results]
    bars = right.barh(names, [100 * one.top1 for one in results], color=colours)
    right.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="top-1 agreement with full, %", xlim=(0, 108))
    left.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_answer(path: Path | None, prompt: Sequence[int], num_tokens: int) -> list[int] | None:
    """Full's tokens from an earlier run with this prompt; None if there is no such run."""
    if path is None or not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    tokens: list[int] = saved["tokens"]
    if saved["prompt"] != list(prompt) or len(tokens) < num_tokens:
        return None
    return tokens[:num_tokens]


def prepare(
    options: argparse.Namespace, config: EngineConfig
) -> tuple[list[int], list[int] | None]:
    """The prompt, and what follows it where that is known."""
    follows = options.new_tokens if options.follow == "text" else 0
    workload = Workload(num_requests=1, prompt_tokens=options.prompt_tokens + follows, text=True)
    [tokens] = workload.token_ids(config)
    prompt, text = tokens[: options.prompt_tokens], tokens[options.prompt_tokens :]
    return prompt, text or read_answer(options.answer, prompt, options.new_tokens)


def run(options: argparse.Namespace, model: str, spec: ModelSpec) -> list[Outcome]:
    """Generate, feed, and collect the figures."""
    triggers = TRIGGERS if options.triggers else ()
    retentions = settings(options.methods, options.budget, options.slack_pages, triggers)
    for retention in retentions:
        retention.row_tokens(options.prompt_tokens, spec.num_layers, spec.num_kv_heads)
    prompt, answer = prepare(options, EngineConfig(model=model))
    length = options.prompt_tokens + options.new_tokens
    bench = Bench(model, options.threads, len(retentions), length)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        if answer is None:
            task = bar.add_task("full generates", total=options.new_tokens)
            for tokens in bench.generate(prompt, options.new_tokens):
                bar.update(task, completed=len(tokens))
                answer = list(tokens)
            assert answer is not None
            if options.answer is not None:
                saved = {"prompt": list(prompt), "tokens": answer}
                options.answer.write_text(json_text(saved), encoding="utf-8")
        task = bar.add_task("all are fed its tokens", total=options.new_tokens)
        scores: dict[str, ScoreOutput] = {}
        for done in bench.feed(prompt, answer, retentions):
            scores |= done
            fed = min(track.num_fed for track in bench.executor.tracks.values())
            bar.update(task, completed=fed)
    bench.executor.check_integrity()
    bench.close()
    return outcomes(retentions, bench.executor.tracks, scores)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="local folder; default: the demo model")
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=4000)
    parser.add_argument("--budget", type=int, default=256, help="tokens per layer and kv head")
    parser.add_argument("--slack-pages", type=int, default=4, help="pages that rows may outgrow it")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="with a decode stage")
    parser.add_argument(
        "--no-triggers", dest="triggers", action="store_false", help="leave PyramidInfer out"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--follow", choices=("answer", "text"), default="answer", help="what is fed"
    )
    parser.add_argument("--answer", type=Path, help="keep full's tokens here for another run")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) here")
    return parser


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    parser = arguments()
    options = parser.parse_args()
    if min(options.prompt_tokens, options.new_tokens) < 1:
        parser.error("--prompt-tokens and --new-tokens must be at least 1")
    model = options.model or str(fetch_demo_model())
    spec = load_spec(model)
    length = options.prompt_tokens + options.new_tokens
    if length > spec.max_position:
        parser.error(f"{length} tokens are more than the model's context of {spec.max_position}")
    try:
        results = run(options, model, spec)
    except ValueError as error:
        parser.error(str(error))
    if options.json is not None:
        report: dict[str, Any] = {
            "model": Path(model).name,
            "dtype": "bfloat16",
            "follow": options.follow,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "budget": options.budget,
            "slack_pages": options.slack_pages,
            "tokens_between_lengths": EVERY,
            "torch": torch.__version__,
            "results": [asdict(one) for one in results],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json_text(report, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(options.plot, results)
    print_table(table(results, options.prompt_tokens, options.new_tokens))


if __name__ == "__main__":
    main()
