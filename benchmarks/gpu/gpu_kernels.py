"""Correctness and bandwidth of the kernels, for `gpu_check.py`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from gpu_report import Bench, Row, failure, judged
from torch import Tensor
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
    """What the decode kernel reads: rows of `kept` tokens, or of any length up to that."""

    num_sequences: int
    kept: int
    num_heads: int = 8
    group: int = 4
    dim: int = 128
    is_ragged: bool = False

    def lengths(self) -> Tensor:
        """Int32 [sequences, heads]; ragged ones are many short and few long."""
        shape = (self.num_sequences, self.num_heads)
        if not self.is_ragged:
            return torch.full(shape, self.kept, dtype=torch.int32)
        share = torch.rand(shape, generator=torch.Generator().manual_seed(0)) ** 3
        return (share * (self.kept - 1)).int() + 1


ROWS_OF_8B = (
    DecodeSizes(512, 128),
    DecodeSizes(256, 512),
    DecodeSizes(64, 4096),
    DecodeSizes(64, 16384, is_ragged=True),
    DecodeSizes(16, 4096, num_heads=40, group=1),
)


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


def check_kernel(
    bench: Bench, name: str, dtype: torch.dtype, seeds: Sequence[int]
) -> Iterator[Row]:
    """One kernel against the float32 oracle, each case in code of its own, while there is time."""
    what = f"kernel: {name}, {str(dtype).removeprefix('torch.')}"
    deviations: list[float] = []
    for seed in seeds:
        if bench.deadline.seconds_left == 0:
            break
        try:
            deviations.append(CHECKS[name](bench.device, dtype, seed))
        except Exception as error:
            sizes = Case(torch.device("cpu"), dtype, seed).sizes
            yield Row(what, f"{sizes}: {failure(name, error).result}", state="wrong")
            return
    if not deviations:
        yield Row(what, "it did not get its turn", state="skipped")
        return
    numbers = {"deviation": max(deviations), "cases": len(deviations)}
    result = f"within {max(deviations):.1e} of the oracle, {len(deviations)} of {len(seeds)} cases"
    yield Row(what, result, numbers)


def measure_decode(
    bench: Bench, all_sizes: Sequence[DecodeSizes], copy_bytes: int
) -> Iterator[Row]:
    """The decode kernel over scattered pages, as a share of the bandwidth of a copy."""
    bandwidth = bench.copy_bandwidth(copy_bytes)
    yield Row("copy on the device", f"{bandwidth / 1e9:.0f} GB/s", {"bytes_per_second": bandwidth})
    for sizes in all_sizes:
        yield _measured_decode(bench, sizes, bandwidth)


def _measured_decode(bench: Bench, sizes: DecodeSizes, bandwidth: float) -> Row:
    device, dtype = bench.device, bench.dtype
    lengths_NH = sizes.lengths().to(device)
    width, num_rows = -(-int(lengths_NH.max()) // PAGE_TOKENS), lengths_NH.numel()
    num_pages = num_rows * width
    shape = (num_pages, PAGE_TOKENS, sizes.dim)
    k_pages, v_pages = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    table = torch.randperm(num_pages, device=device).int().view(*lengths_NH.shape, width)
    q_shape = (sizes.num_sequences, sizes.num_heads * sizes.group, sizes.dim)
    q = torch.randn(q_shape, dtype=dtype, device=device)
    rows = PagedRows(k_pages, v_pages, table, lengths_NH, int(lengths_NH.max()))
    seconds = bench.seconds_of(lambda: decode(q, rows, sizes.dim**-0.5))
    num_bytes = 2 * int(lengths_NH.sum()) * sizes.dim * dtype.itemsize
    share = num_bytes / seconds / bandwidth
    return Row(
        f"decode kernel, {sizes.num_sequences} sequences x {sizes.num_heads} heads, group "
        f"{sizes.group}, {'up to ' if sizes.is_ragged else ''}{sizes.kept} kept",
        f"{share:.0%} of a copy's bandwidth ({num_bytes / seconds / 1e9:.0f} GB/s, "
        f"{seconds * 1e6:.0f} us); target {BANDWIDTH_TARGET:.0%}, stretch {BANDWIDTH_STRETCH:.0%}",
        {
            "seconds": seconds,
            "bytes_per_second": num_bytes / seconds,
            "share_of_copy": share,
        },
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
