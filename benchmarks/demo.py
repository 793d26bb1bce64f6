"""`make demo`: one batch job on Ray over a real model, with full retention and with PyramidKV.

Fetches the demo model, writes 32 prompts about Python's own documentation, starts a Ray head,
submits `saqqara batch` twice and compares the two runs. Everything is left in results/demo/.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib

matplotlib.use("Agg")
from local_ray import RayHead, environment, ray_head, show
from matplotlib import pyplot as plt

from saqqara.cluster.batch_summary import MIB, BatchSummary, summary_table
from saqqara.cluster.tables import print_table
from saqqara.cluster.tokenizer import Tokenizer
from saqqara.evaluation.agreement import Agreement, compare_results

NUM_PROMPTS = 32
SHORTEST, LONGEST = 310, 2990  # tokens, the chat template included
NUM_STAGES = 2
QUESTIONS = (
    "Summarise the text above in two sentences.",
    "What is the most important rule in the text above, and why?",
    "Explain the text above to somebody who is new to Python.",
    "Which mistakes does the text above warn of?",
    "Name three terms that the text above defines, each with its meaning.",
    "Write one question that the text above answers, and its answer.",
)


def main() -> int:
    """Run the demo; 0 when both jobs answered every prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/demo"), help="result folder")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument("--budget", default="25%", help="of PyramidKV: tokens, or a share")
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS)
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    start = time.monotonic()

    model = fetch_model()
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, model, arguments.num_prompts)

    full, pyramid = folder / "full.jsonl", folder / "pyramidkv.jsonl"
    common = ["saqqara", "batch", str(prompts), "--model", model, "--config", "ray-pp2"]
    common += ["--temperature", "0", "--max-tokens", str(arguments.max_tokens)]
    common += ["--check-integrity", "--return-token-ids", "--overwrite"]
    with ray_head(num_cpus=max(NUM_STAGES, os.cpu_count() or 1)) as ray:
        submit(ray, [*common, "--output", str(full), "--retention", "full"])
        reduced = ["--retention", "pyramidkv", "--budget", arguments.budget]
        submit(ray, [*common, "--output", str(pyramid), *reduced, "--compare", str(full)])

    summaries = [read_summary(full), read_summary(pyramid)]
    agreement = compare_results(pyramid, full)
    report(folder, summaries, agreement)
    print(f"\nDone in {time.monotonic() - start:.0f} s; prompts, answers and numbers: {folder}")
    return 0 if all(s.answered == s.rows for s in summaries) else 1


def fetch_model() -> str:
    """Folder of the demo model."""
    command = ["saqqara", "fetch-demo-model"]
    show(command)
    env = environment()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def write_prompts(path: Path, model: str, count: int) -> None:
    """Write chat prompts whose lengths go from `SHORTEST` to `LONGEST` tokens, in mixed order."""
    tokenizer = Tokenizer.load(model)
    shuffled = random.Random(0)
    ratio = LONGEST / SHORTEST
    lengths = [round(SHORTEST * ratio ** (i / max(count - 1, 1))) for i in range(count)]
    shuffled.shuffle(lengths)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = []
    with path.open("w", encoding="utf-8") as file:
        for i, length in enumerate(lengths):
            first = text.index("\n\n", i * (len(text) - 8 * LONGEST) // count) + 2
            messages = make_chat(tokenizer, text[first:], QUESTIONS[i % len(QUESTIONS)], length)
            sizes.append(len(tokenizer.apply_chat(messages)))
            file.write(json.dumps({"custom_id": f"prompt-{i + 1}", "messages": messages}) + "\n")
    print(f"\n{count} prompts of {min(sizes)} to {max(sizes)} tokens ({sum(sizes)} in all): {path}")


def make_chat(
    tokenizer: Tokenizer, text: str, question: str, num_tokens: int
) -> list[dict[str, str]]:
    """One user message of about `num_tokens` tokens: the start of a text, and a question."""
    around = len(tokenizer.apply_chat([{"role": "user", "content": question}]))
    ids = tokenizer.encode(text[: 8 * num_tokens], add_special_tokens=False)
    excerpt = tokenizer.decode(ids[: num_tokens - around])
    return [{"role": "user", "content": f"{excerpt}\n\n{question}"}]


def submit(ray: RayHead, entrypoint: list[str]) -> None:
    """Submit a job and follow its log until it ends."""
    command = ["ray", "job", "submit", "--address", ray.address, "--", *entrypoint]
    show(command)
    subprocess.run(command, env=ray.env, check=True)


def read_summary(results: Path) -> BatchSummary:
    """The summary that a batch job left beside its results."""
    data = json.loads(results.with_name(results.name + ".summary.json").read_text("utf-8"))
    return BatchSummary.model_validate(data)


def report(folder: Path, summaries: list[BatchSummary], agreement: Agreement) -> None:
    """Print one table for both jobs; leave it as JSON and as a picture."""
    extra = [(label, ["-", *cells]) for label, cells in agreement.cells()]
    print()
    print_table(summary_table(summaries, extra))
    data = {s.title: s.model_dump(mode="json") for s in summaries}
    data["agreement"] = agreement.to_dict()
    (folder / "summary.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    plot(folder / "summary.png", summaries)


def plot(path: Path, summaries: list[BatchSummary]) -> None:
    """The pyramid (kept tokens by layer), and memory and speed beside it."""
    figure, (layers, memory, speed) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(2, 1, 1))
    names = [summary.title for summary in summaries]
    reports = [summary.report for summary in summaries if summary.report is not None]
    for name, one in zip(names, reports, strict=True):
        kept = [tokens / one.num_requests for tokens in one.kept_tokens_by_layer]
        layers.step(range(len(kept)), kept, where="mid", label=name)
    layers.set(xlabel="layer", ylabel="kept tokens per prompt, over kv heads", ylim=(0, None))
    layers.legend()
    colours = [f"C{i}" for i in range(len(names))]
    memory.bar(names, [one.kv_kept_bytes_peak / MIB for one in reports], color=colours)
    memory.set(ylabel="KV at the peak, MiB")
    speed.bar(names, [one.generation_tokens_per_second for one in reports], color=colours)
    speed.set(ylabel="tokens/s out")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
