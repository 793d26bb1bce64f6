"""Random cases for the checks of Triton kernels, and how what comes out is compared.

Pages start out full of NaN, so whatever reads past a row's end shows.

Shapes: N sequences, H kv heads, G query heads per kv head, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.kernels import decode
from saqqara.workers.kv.view import KVView

CPU = torch.device("cpu")

# Of outputs near 1: sums in another order; with 16 bits also the rounding of the softmax weights
# and of the output itself (2**-11 and 2**-8 of it).
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Masses come out in float32, from products that are exact in it, as the oracle's do.
MASS_TOLERANCE = 5e-5


@dataclass(frozen=True)
class Sizes:
    """One random case."""

    num_heads: int
    group: int
    dim: int
    page_tokens: int

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.dim**-0.5)


# Seeds that stand for heads as they are served: each number of query heads of a kv head.
SERVED = {1000 + group: Sizes(2, group, dim=128, page_tokens=16) for group in (1, 4, 8)}


class Case:
    """Random shapes and tensors of one seed.

    Args:
        device: where the kernels run.
        dtype: of queries, keys and values.
        seed: decides everything; sizes are random but for those of `SERVED`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.numbers = np.random.default_rng(seed)
        self._tensors = torch.Generator().manual_seed(seed)
        self.sizes = SERVED.get(seed) or Sizes(
            num_heads=int(self.numbers.choice([1, 2, 3])),
            group=int(self.numbers.choice([1, 2, 3, 4, 7])),
            dim=int(self.numbers.choice([16, 40, 64, 80, 128])),
            page_tokens=int(self.numbers.choice([16, 24, 32, 64])),
        )

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers on the device, in the dtype."""
        numbers = torch.randn(*shape, generator=self._tensors)
        return numbers.to(self.dtype).to(self.device)

    def queries(self, count: int) -> Tensor:
        """[count, H G, D], strided as in a fused projection."""
        heads, s = self.sizes.num_heads, self.sizes
        return self.randn(count, heads * s.group + 2 * heads, s.dim)[:, : heads * s.group]

    def keys(self, count: int) -> Tensor:
        """[count, H, D]."""
        return self.randn(count, self.sizes.num_heads, self.sizes.dim)

    def lengths(self, count: int, most: int) -> NDArray[np.int32]:
        """Row lengths [count, H]: around page boundaries, some 0, one `most`."""
        page = self.sizes.page_tokens
        edges = np.array([0, 1, page - 1, page, page + 1, most])
        shape = (count, self.sizes.num_heads)
        lengths = np.where(
            self.numbers.random(shape) < 0.5,
            self.numbers.choice(edges, shape),
            self.numbers.integers(0, most + 1, shape),
        )
        lengths[0, 0] = most
        return lengths.astype(np.int32)

    def view(self, lengths: NDArray[np.int32]) -> KVView:
        """Random rows in scattered pages; everything outside the rows is NaN."""
        s, (count, num_heads) = self.sizes, lengths.shape
        most = int(lengths.max())
        width = max(1, -(-most // s.page_tokens))
        num_pages = count * num_heads * width + 3
        order = self.numbers.permutation(num_pages)[: count * num_heads * width]
        table = order.reshape(count, num_heads, width).astype(np.int32)
        shape = (num_pages, s.page_tokens, s.dim)
        k_pages, v_pages = self.randn(*shape), self.randn(*shape)
        outside = np.ones(shape[:2], dtype=bool)
        for n, h in np.ndindex(count, num_heads):
            for t in range(lengths[n, h]):
                outside[table[n, h, t // s.page_tokens], t % s.page_tokens] = False
        for stored in (k_pages, v_pages):
            stored[torch.from_numpy(outside).to(self.device)] = float("nan")
        table_NHW = torch.from_numpy(table).to(self.device)
        lengths_NH = torch.from_numpy(lengths).to(self.device)
        return KVView(k_pages, v_pages, table_NHW, lengths_NH, most, s.page_tokens)

    def cu(self, lengths: Sequence[int]) -> CuSeqlens:
        """Offsets of packed sequences on the device."""
        return CuSeqlens.of(lengths, self.device)


def paged(view: KVView) -> decode.PagedRows:
    """The same rows for the kernels."""
    return decode.PagedRows(
        view.k_pages, view.v_pages, view.page_table, view.lengths, view.max_length
    )


def plain(x: Tensor) -> Tensor:
    """The same numbers for the oracle: float32, on the CPU."""
    return x.float().to(CPU)


def plain_view(view: KVView) -> KVView:
    """The same rows for the oracle."""
    return replace(
        view,
        k_pages=plain(view.k_pages),
        v_pages=plain(view.v_pages),
        page_table=view.page_table.to(CPU),
        lengths=view.lengths.to(CPU),
    )


def on_cpu(cu: CuSeqlens) -> CuSeqlens:
    """The same offsets for the oracle."""
    return CuSeqlens.of(cu.lengths, CPU)


def close(got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest deviation, relative where numbers are above 1."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if got.numel() == 0:
        return 0.0
    numbers = plain(got)
    deviation = (numbers - expected).abs() / expected.abs().clamp(min=1.0)
    worst = float(deviation.max())
    assert worst <= tolerance, _difference(numbers, expected, ~(deviation <= tolerance), deviation)
    return worst


def same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN included."""
    alike = got.view(torch.uint8) == expected.view(torch.uint8)
    if not alike.all():
        out = ~alike.view(*got.shape, got.element_size()).all(dim=-1).to(CPU)
        numbers, wanted = plain(got), plain(expected)
        raise AssertionError(_difference(numbers, wanted, out, (numbers - wanted).abs()))


def _difference(got: Tensor, expected: Tensor, out: Tensor, deviation: Tensor) -> str:
    """Where numbers are out, how many, and the first and the worst of them."""
    first = tuple(out.nonzero()[0].tolist())
    worst = float(deviation.nan_to_num(nan=float("inf"))[out].max())
    return (
        f"{int(out.sum())} of {out.numel()} numbers of {list(got.shape)} deviate, by up to "
        f"{worst:.2e}; the first at {first}: {float(got[first]):.6g}, "
        f"not {float(expected[first]):.6g}"
    )
