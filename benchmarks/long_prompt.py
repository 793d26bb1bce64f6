"""Peak memory of one long prompt, in a shallow and in a deep model of the same width.

    python benchmarks/long_prompt.py --json results/long_prompt.json

Layer-major prefill holds one layer's keys and values at full length and, of each layer before,
only what retention kept. So a deeper model may take more memory for its weights and kept pages, and
for nothing else. Each depth runs in a process of its own, on random bfloat16 weights: a prompt of
`--tokens` random tokens under `--retention`, then a few decoded tokens.

weights        bytes of the model on this rank
kept pages     pages in use once the prompt is through
prefill KV     peak of keys and values held by the prompt: kept pages and one layer at full length
activations    peak of all else that prefill holds by its own count (hidden states, queries, MLP)
resident       by how much the process's peak resident memory exceeds what it held before the model
               was loaded. Large blocks go back to the system when freed (MALLOC_MMAP_THRESHOLD_,
               which else grows as a process runs), so that little of it is the allocator's scrap

The last row is what the deeper model takes more; the line below it, how much of that is weights and
kept pages. Resident memory tells no less than some MiB: small blocks come from what there is.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from transformers import LlamaConfig

from saqqara.cluster.cli.tables import print_table
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.workers.host_memory import resident_bytes
from saqqara.workers.plan import DecodeItem, NewSequence, PrefillGroup, SamplingSpec, StepPlan
from saqqara.workers.worker import Worker

MIB, VOCAB, DECODED, SEED = 2**20, 1024, 8, 0
MMAP_THRESHOLD = 2**18  # bytes from which on a block is one of its own


@dataclass(frozen=True)
class Peak:
    """One row of the table, in bytes; see the top of this file."""

    num_layers: int
    weights: int
    kept_pages: int
    prefill_kv: int
    activations: int
    resident: int
    seconds: float


def config(num_layers: int, num_tokens: int) -> LlamaConfig:
    """A narrow Llama of so many layers."""
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=num_tokens + DECODED,
        dtype="bfloat16",
    )


def measure(num_layers: int, num_tokens: int, retention: Retention) -> Peak:
    """Run the prompt in this process, which should have loaded no model yet."""
    with tempfile.TemporaryDirectory() as folder:
        config(num_layers, num_tokens).save_pretrained(folder)
        before = resident_bytes()
        engine = EngineConfig(
            model=folder,
            load_format="dummy",
            dtype="bfloat16",
            device="cpu",
            max_num_seqs=1,
            kv_memory_gib=1,
            seed=SEED,
        )
        worker = Worker.local(engine.for_worker())
    prompt = np.random.default_rng(SEED).integers(0, VOCAB, num_tokens).astype(np.int32)
    new = NewSequence(0, prompt.tobytes(), num_tokens, SamplingSpec(temperature=0.0), retention)
    started = time.perf_counter()
    memory = None
    for layer in range(num_layers):  # one layer a step, so that progress can be told
        group = PrefillGroup((0,), layer, layer + 1)
        plan = StepPlan(layer, new=(new,) if layer == 0 else (), prefill=(group,))
        result = worker.execute(plan)
        memory = result.memory
        done = time.perf_counter() - started
        print(f"layer {layer + 1} of {num_layers}: {done:.0f} s", file=sys.stderr, flush=True)
    assert memory is not None
    kept = worker.info.num_pages - result.pages_free
    for step in range(DECODED - 1):
        worker.execute(StepPlan(num_layers + step, decode=(DecodeItem(0, num_tokens + step),)))
    worker.check_integrity()
    return Peak(
        num_layers=num_layers,
        weights=memory.weight_bytes,
        kept_pages=kept * worker.info.page_bytes,
        prefill_kv=memory.prefill_kv_bytes_peak,
        activations=memory.prefill_activation_bytes_peak,
        resident=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
        seconds=time.perf_counter() - started,
    )


def in_own_process(num_layers: int, options: argparse.Namespace) -> Peak:
    """`measure` in a fresh process, so that no depth sees another's memory."""
    command = [sys.executable, __file__, "--only", str(num_layers), "--tokens", str(options.tokens)]
    command += ["--retention", options.retention, "--budget", options.budget]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def summary(shallow: Peak, deep: Peak) -> dict[str, Any]:
    """What the deeper model takes more, in bytes, and how much of it is weights and pages."""
    names = ("weights", "kept_pages", "prefill_kv", "activations", "resident")
    more = {name: getattr(deep, name) - getattr(shallow, name) for name in names}
    explained = more["weights"] + more["kept_pages"]
    return {"more": more, "explained": explained}


def table(peaks: list[Peak], found: dict[str, Any], title: str) -> Table:
    """The figures for people, in MiB."""
    columns = ("weights", "kept_pages", "prefill_kv", "activations", "resident")
    shown = Table("layers", *(name.replace("_", " ") for name in columns), "s", title=title)
    for peak in peaks:
        cells = [f"{getattr(peak, name) / MIB:,.1f}" for name in columns]
        shown.add_row(str(peak.num_layers), *cells, f"{peak.seconds:.0f}")
    shown.add_row("more", *(f"{found['more'][name] / MIB:,.1f}" for name in columns), "")
    return shown


def main() -> None:
    """Parse the command line, run both depths and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=131_072, help="of the prompt")
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 16), help="the two depths")
    parser.add_argument("--retention", default="snapkv")
    parser.add_argument("--budget", default="1024", help="tokens per layer and kv head, or a share")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    budget = options.budget if options.budget.endswith("%") else int(options.budget)
    retention = Retention.parse(options.retention, budget=budget)
    if options.only is not None:
        peak = measure(options.only, options.tokens, retention)
        print(json.dumps(asdict(peak), allow_nan=False))
        return
    peaks = [in_own_process(depth, options) for depth in options.layers]
    found = summary(*peaks)
    print_table(table(peaks, found, f"{options.tokens:,} tokens, {retention.label}, MiB"))
    more = found["more"]["resident"] / MIB
    print(
        f"resident {more:,.1f} MiB more; weights and pages {found['explained'] / MIB:,.1f} MiB more"
    )
    if options.json is not None:
        options.json.write_text(
            json_text({"peaks": [asdict(peak) for peak in peaks], **found}), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
