"""How prefill, decoding and KV memory grow with the prompt, with full retention and PyramidKV.

    python benchmarks/growth.py --json results/growth.json --plot results/growth.png

One loaded engine (LocalExecutor, bf16) answers `--prompts` prompts of each length, all at once,
under both settings: `full`, and `pyramidkv` at `--budget` tokens per layer and kv head. The
settings take turns, length by length, for several rounds. The prompts are parts of Python's
documentation as token ids; decoding is greedy and ignores the end-of-sequence token. A prompt and
its new tokens must fit the model's context (8192 tokens for the demo model), so a longer prompt is
cut to what leaves room for them.

prefill s      wall time of the step that prefills all prompts
decode ms      wall time of a step in which all prompts get one token: the median of the steps of a
               round
KV MiB         most bytes of KV pages at one moment: kept prompt tokens and new ones
prefill KV MiB most bytes of keys and values that prefill holds: the pages, and one layer's fresh
               keys and values of all prompts at full length, because they share a step here

A figure is the median over the rounds, the range beside it. The last two rows of a setting are the
ratio of the longest to the shortest length, and the exponent `e` of a fit `value ~ length ** e`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from harness.stepped import SteppedEngine
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.figures.plots import distinct_colours
from saqqara.evaluation.speed.throughput import MIB, Workload
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.gguf.demo import fetch_demo_model
from saqqara.workers.models.spec import load_spec

LENGTHS = (1024, 2048, 4096, 8192)
FIGURES = ("prefill_seconds", "decode_step_seconds", "kv_kept_bytes", "prefill_kv_bytes")


@dataclass(frozen=True)
class Setting:
    """A retention method at a budget, in tokens per layer and kv head."""

    method: str
    budget: int | None = None

    @property
    def label(self) -> str:
        """Such as `pyramidkv 512`."""
        return self.method if self.budget is None else f"{self.method} {self.budget}"


@dataclass(frozen=True)
class Sample:
    """One setting at one length in one round; times in seconds."""

    setting: str
    prompt_tokens: int
    prefill_seconds: float
    decode_step_seconds: float
    kv_kept_bytes: int
    prefill_kv_bytes: int


def fitting(lengths: Sequence[int], context: int, new_tokens: int) -> list[int]:
    """Prompt lengths in ascending order, those that leave no room for the new tokens cut.

    Raises:
        ValueError: a length is not positive, two are the same, or nothing is left of the context.
    """
    room = context - new_tokens
    if room < 1:
        raise ValueError(f"new-tokens: {new_tokens} fill the model's context of {context} tokens")
    if min(lengths) < 1:
        raise ValueError(f"lengths: {min(lengths)} should be at least 1")
    cut = sorted(min(length, room) for length in lengths)
    if len(set(cut)) < len(cut):
        raise ValueError(f"lengths: two of {cut} are the same (the longest that fits is {room})")
    return cut


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """`e` of the least-squares fit of `log(value) = e * log(length) + c`."""
    slope, _ = np.polyfit(np.log(lengths), np.log(values), 1)
    return float(slope)


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """By setting: median, low and high of each figure by length, their ratio and exponent.

    A ratio is the median at the longest over that at the shortest prompt. With one length there is
    neither ratio nor exponent.
    """
    return {
        setting: _summarise_setting([s for s in samples if s.setting == setting])
        for setting in dict.fromkeys(sample.setting for sample in samples)
    }


def _summarise_setting(samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = sorted({sample.prompt_tokens for sample in samples})
    result: dict[str, Any] = {"prompt_tokens": lengths}
    for name in FIGURES:
        rounds = [
            [float(getattr(s, name)) for s in samples if s.prompt_tokens == length]
            for length in lengths
        ]
        middle = [median(values) for values in rounds]
        figure: dict[str, Any] = {
            "median": middle,
            "low": [min(values) for values in rounds],
            "high": [max(values) for values in rounds],
        }
        if len(lengths) > 1:
            figure["ratio"] = middle[-1] / middle[0]
            figure["exponent"] = exponent(lengths, middle)
        result[name] = figure
    return result


def table(summary: dict[str, Any], num_prompts: int, new_tokens: int) -> Table:
    """The figures for people."""
    title = f"{num_prompts} prompts at once, {new_tokens} new tokens each: median (low - high)"
    result = Table("setting", "prompt tokens", title=title)
    for column in ("prefill s", "decode ms per step", "KV MiB", "prefill KV MiB"):
        result.add_column(column, justify="right")
    for setting, figures in summary.items():
        lengths = figures["prompt_tokens"]
        for i, length in enumerate(lengths):
            cells = [
                _spread(figures["prefill_seconds"], i, 1.0, 2),
                _spread(figures["decode_step_seconds"], i, 1e3, 1),
                f"{figures['kv_kept_bytes']['median'][i] / MIB:.1f}",
                f"{figures['prefill_kv_bytes']['median'][i] / MIB:.1f}",
            ]
            result.add_row(setting, f"{length:,}", *cells)
        if len(lengths) > 1:
            ratios = [f"x {figures[name]['ratio']:.2f}" for name in FIGURES]
            result.add_row(setting, "longest / shortest", *ratios)
            exponents = [f"{figures[name]['exponent']:.2f}" for name in FIGURES]
            result.add_row(setting, "exponent", *exponents, end_section=True)
    return result


def _spread(figure: dict[str, Any], i: int, unit: float, digits: int) -> str:
    middle, low, high = (figure[key][i] * unit for key in ("median", "low", "high"))
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def plot(path: Path, summary: dict[str, Any]) -> None:
    """Prefill seconds, decode ms per step and KV MiB against the prompt's length.

    Decode time has a linear axis from zero, because it is to be flat; the others are logarithmic.
    """
    panels = (
        ("prefill_seconds", 1.0, "prefill, s", "log"),
        ("decode_step_seconds", 1e3, "decode, ms per step", "linear"),
        ("kv_kept_bytes", 1 / MIB, "KV at the peak, MiB", "log"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4))
    for axis, (name, unit, label, scale) in zip(axes, panels, strict=True):
        colours = distinct_colours(len(summary))
        for colour, (setting, figures) in zip(colours, summary.items(), strict=True):
            lengths, values = figures["prompt_tokens"], figures[name]
            middle, low, high = (np.array(values[key]) * unit for key in ("median", "low", "high"))
            axis.errorbar(
                lengths,
                middle,
                [middle - low, high - middle],
                color=colour,
                marker="o",
                capsize=3,
                label=setting,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale(scale)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set(xlabel="prompt tokens", ylabel=label)
        if scale == "linear":
            axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(options: argparse.Namespace, model: str, lengths: Sequence[int]) -> list[Sample]:
    """Measure every length under every setting, round by round, after a warm-up."""
    settings = [Setting("full"), Setting("pyramidkv", options.budget)]
    prompts = {
        length: Workload(num_requests=options.prompts, prompt_tokens=length, text=True).token_ids(
            EngineConfig(model=model)
        )
        for length in lengths
    }
    engine = SteppedEngine(
        model, options.threads, options.prompts, max(lengths) + options.new_tokens
    )
    samples = []
    work = sum(lengths) * options.rounds * len(settings)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("prompt lengths, settings and rounds", total=work)
        for setting in settings:
            engine.run(prompts[lengths[0]], 2, setting.method, setting.budget)
        for number in range(options.rounds):
            for length in lengths:
                for setting in settings if number % 2 == 0 else settings[::-1]:
                    done = engine.run(
                        prompts[length], options.new_tokens, setting.method, setting.budget
                    )
                    samples.append(
                        Sample(
                            setting.label,
                            length,
                            done.prefill_seconds,
                            done.decode_step_seconds,
                            done.kv_kept_bytes,
                            done.prefill_kv_bytes,
                        )
                    )
                    bar.advance(task, length)
    engine.close()
    return samples


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="local folder; default: the demo model")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    parser.add_argument("--prompts", type=int, default=4, help="answered at once")
    parser.add_argument("--new-tokens", type=int, default=64, help="for each prompt, at least 2")
    parser.add_argument("--budget", type=int, default=512, help="tokens per layer and kv head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) here")
    return parser


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    parser = arguments()
    options = parser.parse_args()
    if min(options.prompts, options.rounds) < 1 or options.new_tokens < 2:
        parser.error("--prompts and --rounds must be at least 1, --new-tokens at least 2")
    model = options.model or str(fetch_demo_model())
    try:
        lengths = fitting(options.lengths, load_spec(model).max_position, options.new_tokens)
    except ValueError as error:
        parser.error(str(error))
    samples = run(options, model, lengths)
    summary = summarise(samples)
    if options.json is not None:
        report = {
            "model": model,
            "dtype": "bfloat16",
            "prompts": options.prompts,
            "new_tokens": options.new_tokens,
            "budget": options.budget,
            "rounds": options.rounds,
            "threads": options.threads,
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
            "results": summary,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json_text(report, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(options.plot, summary)
    for length in set(options.lengths) - set(lengths):
        print(f"{length} prompt tokens were cut to {lengths[-1]}: the context is full then")
    print_table(table(summary, options.prompts, options.new_tokens))


if __name__ == "__main__":
    main()
