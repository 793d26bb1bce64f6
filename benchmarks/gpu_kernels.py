"""Correctness and bandwidth of the kernels, for `gpu_check.py`."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from gpu_report import Bench, Row, failure, is_usable, judged
from torch.nn.functional import linear, silu

from saqqara.compression.selecting import kept_positions
from saqqara.evaluation.speed.kernel_checks import CHECKS, Case
from saqqara.workers.attention.base import CuSeqlens, get_backend
from saqqara.workers.kernels.decode import PagedRows, decode
from saqqara.workers.kv.store import KVStore

PAGE_TOKENS = 16
BANDWIDTH_TARGET, BANDWIDTH_STRETCH = 0.75, 0.85
RETENTION_TARGET = 0.05
_POOLED_TOKENS = 7
_SINKS = 4


@dataclass(frozen=True)
class DecodeSizes:
    """What the decode kernel reads: rows of `kept` tokens of 8B's heads."""

    num_sequences: int = 64
    kept: int = 4096
    num_heads: int = 8
    group: int = 4
    dim: int = 128
    copy_bytes: int = 1 << 30


@dataclass(frozen=True)
class LayerSizes:
    """One layer of 8B, and what is kept of a prompt in it."""

    prompt: int = 8192
    window: int = 32
    budget: int = 1024
    hidden: int = 4096
    inner: int = 14336
    num_heads: int = 8
    group: int = 4
    dim: int = 128


@dataclass
class _Tally:
    """What came of one kernel in one dtype."""

    deviations: list[float] = field(default_factory=list)
    error: str | None = None

    def row(self, what: str) -> Row:
        if self.error is not None:
            return Row(what, self.error, state="wrong")
        if not self.deviations:
            return Row(what, "it did not get its turn", state="skipped")
        worst = max(self.deviations)
        result = f"within {worst:.1e} of the oracle, {len(self.deviations)} random cases"
        return Row(what, result, {"deviation": worst, "cases": len(self.deviations)})


def check_kernels(bench: Bench, dtypes: tuple[torch.dtype, ...], num_seeds: int) -> Iterator[Row]:
    """Every kernel against the float32 oracle.

    Each case compiles its kernels anew: every kernel has its first case before any has its second,
    and no round begins after half of the time.
    """
    tallies = {(name, dtype): _Tally() for dtype in dtypes for name in CHECKS}
    _check_in_rounds(bench, tallies, num_seeds)
    for (name, dtype), tally in tallies.items():
        yield tally.row(f"kernel: {name}, {str(dtype).removeprefix('torch.')}")


def _check_in_rounds(
    bench: Bench, tallies: dict[tuple[str, torch.dtype], _Tally], num_seeds: int
) -> None:
    half = bench.deadline.seconds_left / 2
    for seed in range(num_seeds):
        if seed > 0 and bench.deadline.seconds_left < half:
            return
        for (name, dtype), tally in tallies.items():
            if tally.error is not None or bench.deadline.seconds_left == 0:
                continue
            try:
                tally.deviations.append(CHECKS[name](bench.device, dtype, seed))
            except Exception as error:
                sizes = Case(torch.device("cpu"), dtype, seed).sizes
                tally.error = f"seed {seed}, {sizes}: {failure(name, error).result}"
                if not is_usable(bench.device):
                    return  # what came after would be blamed for it
        bench.say(f"round {seed + 1} of {num_seeds}")


def measure_decode(bench: Bench, sizes: DecodeSizes) -> Iterator[Row]:
    """The decode kernel over scattered pages, as a share of the bandwidth of a copy."""
    bandwidth = bench.copy_bandwidth(sizes.copy_bytes)
    yield Row("copy on the device", f"{bandwidth / 1e9:.0f} GB/s", {"bytes_per_second": bandwidth})
    device, dtype = bench.device, bench.dtype
    pages_per_row = -(-sizes.kept // PAGE_TOKENS)
    rows_shape = (sizes.num_sequences, sizes.num_heads)
    num_pages = sizes.num_sequences * sizes.num_heads * pages_per_row
    shape = (num_pages, PAGE_TOKENS, sizes.dim)
    k_pages, v_pages = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    table = torch.randperm(num_pages, device=device).int().view(*rows_shape, pages_per_row)
    lengths = torch.full(rows_shape, sizes.kept, dtype=torch.int32, device=device)
    q_shape = (sizes.num_sequences, sizes.num_heads * sizes.group, sizes.dim)
    q = torch.randn(q_shape, dtype=dtype, device=device)
    rows = PagedRows(k_pages, v_pages, table, lengths, sizes.kept)
    seconds = bench.seconds_of(lambda: decode(q, rows, sizes.dim**-0.5))
    achieved = (k_pages.nbytes + v_pages.nbytes) / seconds
    share = achieved / bandwidth
    yield Row(
        f"decode kernel, {sizes.num_sequences} sequences x {sizes.kept} kept",
        f"{share:.0%} of a copy's bandwidth ({achieved / 1e9:.0f} GB/s); "
        f"target {BANDWIDTH_TARGET:.0%}, stretch {BANDWIDTH_STRETCH:.0%}",
        {"seconds": seconds, "bytes_per_second": achieved, "share_of_copy": share},
        judged(share >= BANDWIDTH_TARGET),
    )


def measure_retention(bench: Bench, sizes: LayerSizes) -> Iterator[Row]:
    """Window scores, selection and page write beside the layer that they belong to."""
    device, dtype, dim, num_heads = bench.device, bench.dtype, sizes.dim, sizes.num_heads
    backend, _ = get_backend("triton", device, dtype)
    num_queries = num_heads * sizes.group
    x = torch.randn(sizes.prompt, sizes.hidden, dtype=dtype, device=device)
    shapes = [
        ((num_queries + 2 * num_heads) * dim, sizes.hidden),
        (sizes.hidden, num_queries * dim),
        (2 * sizes.inner, sizes.hidden),
        (sizes.hidden, sizes.inner),
    ]
    qkv_weight, output, gate_up, down = (
        torch.randn(shape, dtype=dtype, device=device) * 0.02 for shape in shapes
    )
    q = torch.randn(sizes.prompt, num_queries, dim, dtype=dtype, device=device)
    k, v = (torch.randn(sizes.prompt, num_heads, dim, dtype=dtype, device=device) for _ in "kv")
    cu, scale = CuSeqlens.of([sizes.prompt], device), dim**-0.5
    num_pages = num_heads * (-(-sizes.budget // PAGE_TOKENS) + 1)
    store = KVStore(
        1, num_heads, 1, num_pages, PAGE_TOKENS, sizes.prompt, dim, dtype, device, kernels=True
    )

    def layer() -> None:
        linear(x, qkv_weight)
        hidden = linear(backend.prefill(q, k, v, cu, cu, scale)[0].flatten(1), output)
        gate, up = linear(hidden, gate_up).chunk(2, dim=-1)
        linear(silu(gate).mul_(up), down)

    def retain() -> None:
        mass = backend.mass(q[-sizes.window :], k, scale)[:, : -sizes.window]
        pooled = torch.max_pool1d(mass, _POOLED_TOKENS, stride=1, padding=_POOLED_TOKENS // 2)
        store.free(0)
        chosen = kept_positions(pooled, sizes.budget, sizes.window, _SINKS)
        assert store.write(0, 0, k, v, chosen), "the pool is too small"

    whole, extra = bench.seconds_of(layer), bench.seconds_of(retain)
    share = extra / whole
    yield Row(
        f"score, select and write, beside a layer of {sizes.prompt} tokens",
        f"{share:.1%} of the layer ({extra * 1e3:.2f} ms of {whole * 1e3:.2f} ms); "
        f"target under {RETENTION_TARGET:.0%}",
        {"seconds": extra, "layer_seconds": whole, "share_of_layer": share},
        judged(share < RETENTION_TARGET),
    )
