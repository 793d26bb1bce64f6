"""Proves the GPU path on one GPU and measures it: every kernel, graphs, bandwidth, parity.

    PYTHONPATH=src python benchmarks/gpu_check.py --out gpu_check.json [--trace trace.json]

Needs torch, triton, transformers and what the worker imports, but neither Ray nor a network. Takes
a few minutes. Prints one table last and ends with status 1 if something is wrong.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PAGE_TOKENS = 16
SEQUENCES, KEPT, KV_HEADS, GROUP, DIM = 64, 4096, 8, 4, 128
PROMPT, WINDOW, BUDGET = 8192, 32, 1024
SEEDS = 4


def use_source_tree() -> None:
    """Make `import saqqara` work from a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("saqqara")
    except PackageNotFoundError:
        info = Path(tempfile.mkdtemp()) / "saqqara-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saqqara\nVersion: 0\n")
        sys.path.append(str(info.parent))


use_source_tree()

# ruff: noqa: E402 - these come after the source tree is importable

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from saqqara.compression.retention import Retention
from saqqara.compression.select import kept_positions
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.kernel_checks import CHECKS
from saqqara.workers.attention.base import CuSeqlens, get_backend
from saqqara.workers.kernels.decode import PagedRows, decode
from saqqara.workers.kv.store import KVStore
from saqqara.workers.plan import DecodeItem, NewSequence, PrefillGroup, SamplingSpec, StepPlan
from saqqara.workers.worker import Worker

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


def seconds_of(work: Callable[[], object], repeats: int = 20) -> float:
    """Median GPU seconds of some work, after three rounds that do not count."""
    times = []
    for number in range(repeats + 3):
        event: Callable[..., torch.cuda.Event] = torch.cuda.Event
        start, stop = event(enable_timing=True), event(enable_timing=True)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(stop) / 1e3)
    return float(statistics.median(times))


def check_kernels() -> Iterator[Row]:
    """Every kernel against the float32 oracle."""
    for name, check in CHECKS.items():
        for dtype in (BF16, torch.float16, torch.float32):
            row: Row = {"what": f"{name}, {str(dtype).removeprefix('torch.')}", "ok": True}
            try:
                worst = max(check(GPU, dtype, seed) for seed in range(SEEDS))
                row["result"] = f"within {worst:.1e}"
            except Exception as error:
                row.update(ok=False, result=f"{type(error).__name__}: {error}"[:200])
            yield row


def copy_bandwidth() -> float:
    """Bytes per second read and written by a large copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def measure_decode(bandwidth: float) -> Row:
    """The decode kernel over 64 sequences of 4k kept tokens, as a share of the copy's bandwidth."""
    pages_per_row = KEPT // PAGE_TOKENS
    num_pages = SEQUENCES * KV_HEADS * pages_per_row
    shape = (num_pages, PAGE_TOKENS, DIM)
    k_pages, v_pages = (torch.randn(shape, dtype=BF16, device=GPU) for _ in range(2))
    table = torch.randperm(num_pages, device=GPU).int().view(SEQUENCES, KV_HEADS, pages_per_row)
    lengths = torch.full((SEQUENCES, KV_HEADS), KEPT, dtype=torch.int32, device=GPU)
    q = torch.randn(SEQUENCES, KV_HEADS * GROUP, DIM, dtype=BF16, device=GPU)
    rows = PagedRows(k_pages, v_pages, table, lengths, KEPT)
    seconds = seconds_of(lambda: decode(q, rows, DIM**-0.5))
    achieved = (k_pages.nbytes + v_pages.nbytes) / seconds
    return {
        "what": f"decode kernel, {SEQUENCES} x {KEPT} kept",
        "ok": True,
        "seconds": seconds,
        "share_of_copy": achieved / bandwidth,
        "result": f"{achieved / 1e9:.0f} GB/s, {achieved / bandwidth:.0%} of a copy",
    }


def measure_retention() -> Row:
    """Window scores, selection and page write beside the layer they belong to, at 8k tokens."""
    backend, _ = get_backend("auto", GPU, BF16)
    hidden_size, inner, heads = 4096, 14336, KV_HEADS * GROUP
    x = torch.randn(PROMPT, hidden_size, dtype=BF16, device=GPU)
    sizes = [
        ((heads + 2 * KV_HEADS) * DIM, hidden_size),
        (hidden_size, heads * DIM),
        (2 * inner, hidden_size),
        (hidden_size, inner),
    ]
    weights = [torch.randn(size, dtype=BF16, device=GPU) * 0.02 for size in sizes]
    q = torch.randn(PROMPT, heads, DIM, dtype=BF16, device=GPU)
    k, v = (torch.randn(PROMPT, KV_HEADS, DIM, dtype=BF16, device=GPU) for _ in range(2))
    cu, scale = CuSeqlens.of([PROMPT], GPU), DIM**-0.5
    store = KVStore(1, KV_HEADS, 1, 8192, PAGE_TOKENS, PROMPT, DIM, BF16, GPU)

    def layer() -> None:
        torch.nn.functional.linear(x, weights[0])
        attended = backend.prefill(q, k, v, cu, cu, scale).flatten(1)
        hidden = torch.nn.functional.linear(attended, weights[1])
        gate, up = torch.nn.functional.linear(hidden, weights[2]).chunk(2, dim=-1)
        torch.nn.functional.linear(torch.nn.functional.silu(gate).mul_(up), weights[3])

    def retain() -> None:
        mass = backend.mass(q[-WINDOW:], k, scale)
        pooled = torch.max_pool1d(mass[:, :-WINDOW], 7, stride=1, padding=3)
        store.free(0)
        assert store.write(0, 0, k, v, kept_positions(pooled, BUDGET, WINDOW, 4))

    whole, extra = seconds_of(layer), seconds_of(retain)
    return {
        "what": f"score, select and write, beside a layer of {PROMPT} tokens",
        "ok": True,
        "seconds": extra,
        "layer_seconds": whole,
        "result": f"{extra * 1e3:.2f} ms, {extra / whole:.1%} of {whole * 1e3:.2f} ms",
    }


def new_sequence(slot: int, tokens: list[int]) -> NewSequence:
    """A greedy sequence under full retention."""
    spec = SamplingSpec(temperature=0.0)
    packed = np.array(tokens, dtype=np.int32).tobytes()
    return NewSequence(slot, packed, len(tokens), spec, Retention.parse(None))


def measure_step(folder: Path, bandwidth: float, graphs: str) -> Row:
    """A decode step of a model of 8B's layers at batch 64, against the bytes it must read."""
    layers = 8
    LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    worker = Worker.local(
        EngineConfig.model_validate(
            {"model": str(folder), "load_format": "dummy", "dtype": "bfloat16", "device": GPU.type,
             "max_num_seqs": SEQUENCES, "max_prefill_tokens": KEPT, "cuda_graphs": graphs,
             "attention_backend": "triton", "kv_memory_gib": 12.0}
        )
    )  # fmt: skip
    prompt = [number % 31000 for number in range(KEPT)]
    for slot in range(SEQUENCES):
        group = PrefillGroup((slot,), 0, layers)
        result = worker.execute(StepPlan(slot, new=(new_sequence(slot, prompt),), prefill=(group,)))
        assert not result.refused, "the pool is too small"
    times = []
    for step in range(30):
        items = tuple(DecodeItem(slot, KEPT + step) for slot in range(SEQUENCES))
        started = time.perf_counter()
        worker.execute(StepPlan(1000 + step, decode=items))
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[5:])
    kv_bytes = 2 * SEQUENCES * KV_HEADS * layers * KEPT * DIM * 2
    weight_bytes = worker.info.memory.weight_bytes
    floor = (weight_bytes + kv_bytes) / bandwidth
    worker.close()
    return {
        "what": f"decode step, batch {SEQUENCES}, {layers} layers, cuda_graphs={graphs}",
        "ok": True,
        "seconds": seconds,
        "floor_seconds": floor,
        "result": f"{seconds * 1e3:.2f} ms; reading all bytes takes {floor * 1e3:.2f} ms",
    }


def check_parity(folder: Path, graphs: str) -> Row:
    """Greedy tokens of a tiny random Llama, in float32, beside those of transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=96,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    model.to(GPU)
    prompts = [torch.randint(3, 199, (n,)).tolist() for n in (5, 33, 100)]
    steps = 24
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=GPU)
        out = model.generate(ids, max_new_tokens=steps, do_sample=False, pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    worker = Worker.local(
        EngineConfig.model_validate(
            {"model": str(folder), "dtype": "float32", "device": GPU.type, "max_num_seqs": 4,
             "cuda_graphs": graphs, "attention_backend": "triton", "kv_memory_gib": 0.1}
        )
    )  # fmt: skip
    slots = tuple(range(len(prompts)))
    new = tuple(new_sequence(slot, prompts[slot]) for slot in slots)
    plan = StepPlan(0, new=new, prefill=(PrefillGroup(slots, 0, 3),))
    tokens = [[s.token_id] for s in sorted(worker.execute(plan).sampled, key=lambda s: s.slot)]
    for step in range(steps - 1):
        items = tuple(DecodeItem(slot, len(prompts[slot]) + step) for slot in slots)
        for sampled in worker.execute(StepPlan(step + 1, decode=items)).sampled:
            tokens[sampled.slot].append(sampled.token_id)
        worker.check_integrity()
    worker.close()
    same = sum(
        a == b for x, y in zip(tokens, expected, strict=True) for a, b in zip(x, y, strict=True)
    )
    total = steps * len(prompts)
    return {
        "what": f"greedy parity with transformers, cuda_graphs={graphs}",
        "ok": same == total,
        "result": f"{same} of {total} tokens",
    }


@contextmanager
def traced(file: str | None) -> Iterator[None]:
    """Write a profiler trace of what runs inside, if a file is given."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    profile.export_chrome_trace(file)


def main() -> int:
    """Check, measure, write the numbers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="gpu_check.json", help="file for the numbers")
    parser.add_argument("--trace", help="file for a profiler trace of the measurements")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA GPU; on a CPU the same checks run in the tests")
        return 1
    torch.cuda.set_device(GPU)
    rows = list(check_kernels())
    bandwidth = copy_bandwidth()
    rows.append({"what": "copy", "ok": True, "result": f"{bandwidth / 1e9:.0f} GB/s"})
    steps: list[Callable[[Path], Row]] = [
        lambda _: measure_decode(bandwidth),
        lambda _: measure_retention(),
        lambda folder: check_parity(folder, "off"),
        lambda folder: check_parity(folder, "auto"),
        lambda folder: measure_step(folder, bandwidth, "off"),
        lambda folder: measure_step(folder, bandwidth, "auto"),
    ]
    with torch.inference_mode(), traced(options.trace):
        for step in steps:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(step(Path(folder)))
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:300]
                rows.append({"what": "a measurement", "ok": False, "result": text})
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name(GPU)
    Path(options.out).write_text(json.dumps({"device": device, "rows": rows}, indent=1))
    width = max(len(row["what"]) for row in rows)
    print(f"\n{device}, torch {torch.__version__}")
    for row in rows:
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {row['what']:<{width}}  {row['result']}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
