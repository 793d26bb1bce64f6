"""Each attention kernel against its limit on this machine, and the torch backend beside it.

    python benchmarks/kernels.py --json results/kernels.json

Decode is bound by reading keys and values once: GB/s against a plain read of memory. Prefill and
the rest are bound by arithmetic: GFLOP/s (the causal half counted) against a large bf16 matrix
product. Shapes are SmolLM2-135M's (9 query heads, 3 kv heads, head dim 64), bf16.

The kernels, the torch backend and the limits take turns, so that whatever else the machine does
meets all of them. A figure is the median over the rounds, with the lower quartile of the time
beside it. Rounds in which a core was taken from the process do not count, as long as others are
left; `clean` says how many those are. Keys and values of decode rotate through enough layers to
come from memory, not cache.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness.limits import Call, make_limits, measure
from torch import Tensor

from saqqara.configs.json_text import json_text
from saqqara.workers.attention.base import AttentionBackend, CuSeqlens
from saqqara.workers.attention.cpu import CpuAttention
from saqqara.workers.attention.sdpa import TorchAttention
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.kv.store import KVStore
from saqqara.workers.kv.view import KVView

QUERY_HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
SCALE = HEAD_DIM**-0.5
PAGE_TOKENS = 16
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
KV_BYTES = 128 << 20  # that decode rotates through, at least


@dataclass(frozen=True)
class Case:
    """One kernel on one workload.

    Attributes:
        name: kernel and workload.
        unit: "GB/s" or "GFLOP/s"; also which limit counts.
        work: bytes or FLOPs of one call.
        call: runs it with a backend.
    """

    name: str
    unit: str
    work: float
    call: Callable[[AttentionBackend], object]


def randn(*shape: int) -> Tensor:
    """Random numbers of the dtype of the kernels."""
    return torch.randn(shape).to(DTYPE)


def make_views(lengths: Sequence[int], num_layers: int, churned: bool) -> list[KVView]:
    """Rows of these lengths in every layer; `churned`: in random pages, not in runs."""
    num_pages = num_layers * KV_HEADS * sum(-(-length // PAGE_TOKENS) for length in lengths)
    store = KVStore(
        num_layers=num_layers,
        num_heads=KV_HEADS,
        num_slots=len(lengths),
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        max_row_tokens=max(lengths),
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        device=CPU,
    )
    if churned:
        store.pool.allocate(num_pages)
        store.pool.release(np.random.default_rng(0).permutation(num_pages).astype(np.int32))
    for layer, (slot, length) in itertools.product(range(num_layers), enumerate(lengths)):
        k, v = randn(length, KV_HEADS, HEAD_DIM), randn(length, KV_HEADS, HEAD_DIM)
        assert store.write(slot, layer, k, v)
    return [store.view(np.arange(len(lengths)), layer) for layer in range(num_layers)]


def decode_case(label: str, lengths: Sequence[int], churned: bool = False) -> Case:
    """One new token of each sequence."""
    kv_bytes = (
        sum(lengths)
        * KV_HEADS
        * HEAD_DIM
        * 2  # keys and values
        * DTYPE.itemsize
    )
    views = itertools.cycle(make_views(lengths, -(-KV_BYTES // kv_bytes), churned))
    q = randn(len(lengths), QUERY_HEADS, HEAD_DIM)
    return Case(
        f"decode {label}", "GB/s", kv_bytes, lambda backend: backend.decode(q, next(views), SCALE)
    )


def prefill_case(num_sequences: int, length: int) -> Case:
    """Whole prompts of one length."""
    cu = CuSeqlens.of([length] * num_sequences, CPU)
    q, k, v = (randn(cu.host[-1], n, HEAD_DIM) for n in (QUERY_HEADS, KV_HEADS, KV_HEADS))
    flops = (
        4  # multiply and add, for scores and for values
        * HEAD_DIM
        * QUERY_HEADS
        * num_sequences
        * length**2
        / 2  # causal
    )
    return Case(
        f"prefill {num_sequences} x {length}",
        "GFLOP/s",
        flops,
        lambda backend: backend.prefill(q, k, v, cu, cu, SCALE)[0],
    )


def extend_case(num_sequences: int, num_new: int, kept: int) -> Case:
    """New tokens after kept ones."""
    cu = CuSeqlens.of([num_new] * num_sequences, CPU)
    view = make_views([kept] * num_sequences, 1, churned=False)[0]
    q, k, v = (randn(cu.host[-1], n, HEAD_DIM) for n in (QUERY_HEADS, KV_HEADS, KV_HEADS))
    flops = 4 * HEAD_DIM * QUERY_HEADS * num_sequences * num_new * (kept + num_new / 2)
    return Case(
        f"extend {num_sequences} x {num_new} over {kept}",
        "GFLOP/s",
        flops,
        lambda backend: backend.extend(q, k, v, cu, view, SCALE),
    )


def mass_case(window: int, length: int, context: bool = False) -> Case:
    """Attention of the last queries on every key, or on those before, as after prefill.

    Only the scores that are seen are counted, once.
    """
    q, k = randn(window, QUERY_HEADS, HEAD_DIM), randn(length, KV_HEADS, HEAD_DIM)
    cu_q, cu_k = CuSeqlens.of([window], CPU), CuSeqlens.of([length], CPU)
    _, lse = CpuAttention().prefill(q, k, k, cu_q, cu_k, SCALE)
    num_columns = length - window if context else length
    seen = window * num_columns if context else window * (length - window / 2)
    return Case(
        f"mass of {window} on {num_columns}",
        "GFLOP/s",
        2 * HEAD_DIM * QUERY_HEADS * seen,
        lambda backend: backend.mass(q, k, SCALE, lse=lse, num_columns=num_columns),
    )


def make_cases() -> Iterator[Case]:
    """All kernels on small, usual and long workloads."""
    yield decode_case("16 x 2048", [2048] * 16)
    yield decode_case("16 x 2048, churned pages", [2048] * 16, churned=True)
    yield decode_case("16 x 200 to 2000", [200 + 120 * n for n in range(16)])
    yield decode_case("16 x 256", [256] * 16)
    yield decode_case("1 x 8192", [8192])
    yield prefill_case(16, 512)
    yield prefill_case(1, 512)
    yield prefill_case(1, 2048)
    yield prefill_case(1, 6144)
    yield extend_case(16, 32, 512)
    yield mass_case(32, 2048)
    yield mass_case(64, 6144)
    yield mass_case(2048, 2048)
    yield mass_case(1229, 6144, context=True)


def run(case: Case, backends: Sequence[AttentionBackend], rounds: int) -> dict[str, object]:
    """Measure one case: times, rates and the share of the limit, by backend."""
    limit_work, limit = make_limits()[case.unit]
    calls: dict[str, Call] = {backend.name: partial(case.call, backend) for backend in backends}
    times = measure({"limit": limit} | calls, rounds)
    bound = times.pop("limit").rates(limit_work)
    rates = {name: taken.rates(case.work) for name, taken in times.items()}
    for rate in rates.values():
        rate["share_of_limit"] = rate["median_rate"] / bound["median_rate"]
    return {
        "case": case.name,
        "unit": case.unit,
        "work": case.work,
        "limit": bound,
        "backends": rates,
    }


def print_row(result: dict[str, object]) -> None:
    """One line of the table."""
    limit, backends = result["limit"], result["backends"]
    assert isinstance(limit, dict)
    assert isinstance(backends, dict)
    cells = "".join(
        f"{b['median_ms']:9.2f} ({b['quartile_ms']:.2f})".rjust(20)
        + f"{b['clean']:4.0f}{b['median_rate']:7.1f} {b['share_of_limit']:5.0%}"
        for b in backends.values()
    )
    print(f"{result['case']:30}{limit['median_rate']:7.1f} {result['unit']:8}{cells}", flush=True)


def main() -> None:
    """Print the table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backends: list[AttentionBackend] = [CpuAttention(), TorchAttention()]
    print(f"{options.threads} threads; ms: median (lower quartile); clean; rate; share of limit")
    columns = "".join(f"{f'{b.name}: ms':>19}{'clean  rate share':>18}" for b in backends)
    print(f"{'':30}{'limit':>7} {'':8}{columns}")
    results = []
    with torch.inference_mode():
        for case in make_cases():
            if options.only in case.name:
                results.append(run(case, backends, options.rounds))
                print_row(results[-1])
    if options.json is not None:
        report = {
            "query_heads": QUERY_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "dtype": str(DTYPE),
            "page_tokens": PAGE_TOKENS,
            "threads": options.threads,
            "rounds": options.rounds,
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json_text(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
