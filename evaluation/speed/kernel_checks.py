"""Checks of every Triton kernel against the float32 oracle, over random shapes.

Plain functions of (device, dtype, seed): tests call them in Triton's interpreter, `gpu_check` on a
GPU. Each returns the largest deviation and raises AssertionError where it is too large. Pages start
out full of NaN, so whatever reads past a row's end shows.

Shapes: N sequences, H kv heads, G query heads per kv head, D head dim, P pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.attention.reference import ReferenceAttention
from saqqara.workers.attention.triton import TritonAttention
from saqqara.workers.kernels import attend, decode, mass, pages
from saqqara.workers.kv.view import KVView

Check = Callable[[torch.device, torch.dtype, int], float]

_CPU = torch.device("cpu")
_ORACLE = ReferenceAttention()

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


def check_decode(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Rows of any length, cut into parts or not, with the attention on every token."""
    case = Case(device, dtype, seed)
    view = case.view(case.lengths(4, most=150))
    q, scale = case.queries(4), case.sizes.scale
    expected, expected_mass = _ORACLE.decode_and_mass(_plain(q), _plain_view(view), scale)
    rows = _rows(view)
    whole, no_mass = decode.decode(q, rows, scale)
    assert no_mass is None
    cut, mass_NHT = decode.decode(q, rows, scale, return_mass=True, split_tokens=64)
    assert mass_NHT is not None
    _close(mass_NHT, expected_mass, MASS_TOLERANCE)
    _, expected_lse = _ORACLE.decode_and_lse(_plain(q), _plain_view(view), scale)
    for split_tokens in (64, 512):
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=device)
        decode.decode(q, rows, scale, lse=lse, split_tokens=split_tokens)
        _close(lse.exp(), expected_lse.exp(), MASS_TOLERANCE)
    return max(_close(out, expected, TOLERANCES[dtype]) for out in (whole, cut))


def check_decode_append(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """New tokens that are stored and attended to in one go, of slots in any order, and padding."""
    case = Case(device, dtype, seed)
    view = case.view(case.lengths(5, most=140) + 1)
    slots = torch.tensor([3, -1, 0, 4, -1], dtype=torch.int64, device=device)
    q, k, v = case.queries(5), case.keys(5), case.keys(5)
    k_before, v_before = view.k_pages.clone(), view.v_pages.clone()
    rows = replace(_rows(view), slots=slots)
    out, _ = decode.decode(q, rows, case.sizes.scale, new=(k, v), split_tokens=64)
    cut_k, cut_v = view.k_pages.clone(), view.v_pages.clone()
    for entry, slot in enumerate(slots.tolist()):
        for head in range(case.sizes.num_heads if slot >= 0 else 0):
            last = int(view.lengths[slot, head]) - 1
            page = int(view.page_table[slot, head, last // view.page_tokens])
            k_before[page, last % view.page_tokens] = k[entry, head]
            v_before[page, last % view.page_tokens] = v[entry, head]
    _same(cut_k, k_before)
    _same(cut_v, v_before)
    real = slots >= 0
    assert (out[~real] == 0).all(), "padding attends to something"
    chosen = slots[real]
    held = replace(view, page_table=view.page_table[chosen], lengths=view.lengths[chosen])
    expected = _ORACLE.decode(_plain(q[real]), _plain_view(held), case.sizes.scale)
    return _close(out[real], expected, TOLERANCES[dtype])


def check_extend(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """New tokens over kept rows, causal among themselves."""
    case = Case(device, dtype, seed)
    view = case.view(case.lengths(4, most=100))
    cu = case.cu([1, int(case.numbers.integers(2, 40)), 3, 17])
    q, k, v = case.queries(cu.host[-1]), case.keys(cu.host[-1]), case.keys(cu.host[-1])
    out = TritonAttention().extend(q, k, v, cu, view, case.sizes.scale)
    plain = (_plain(q), _plain(k), _plain(v), CuSeqlens.of(cu.lengths, _CPU), _plain_view(view))
    return _close(out, _ORACLE.extend(*plain, case.sizes.scale), TOLERANCES[dtype])


def check_prefill(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Whole prompts, by the kernel that is chosen here, and only their last queries, by ours."""
    case = Case(device, dtype, seed)
    cu = case.cu([1, 33, int(case.numbers.integers(2, 70)), 16])
    last, ends = case.cu([1, 1, 2, 9]), case.cu([1] * 4)  # the ends are cut by their keys
    q, k, v = case.queries(cu.host[-1]), case.keys(cu.host[-1]), case.keys(cu.host[-1])
    worst, backend, scale = 0.0, TritonAttention(), case.sizes.scale
    for cu_q in (cu, last, ends):
        bounds = zip(cu.host[1:], cu_q.lengths, strict=True)
        queries = torch.cat([q[end - count : end] for end, count in bounds])
        out = backend.prefill(queries, k, v, cu_q, cu, scale)[0]
        plain = (_plain(queries), _plain(k), _plain(v), _on_cpu(cu_q), _on_cpu(cu))
        expected = _ORACLE.prefill(*plain, scale)[0]
        worst = max(worst, _close(out, expected, TOLERANCES[dtype]))
    packed = attend.attend(q, k, v, cu.device, cu.device, cu.max_len, scale)
    plain = (_plain(q), _plain(k), _plain(v), _on_cpu(cu), _on_cpu(cu))
    expected = _ORACLE.prefill(*plain, scale)[0]
    return max(worst, _close(packed, expected, TOLERANCES[dtype]))


def check_mass(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """What the last queries, and what all, weighted, pay to each key; several sequences at once."""
    case = Case(device, dtype, seed)
    cu_k = case.cu([90, 1, int(case.numbers.integers(20, 70))])
    k, scale, worst = case.keys(cu_k.host[-1]), case.sizes.scale, 0.0
    for counts in ([8, 1, 20], list(cu_k.lengths)):
        cu_q = case.cu(counts)
        q = case.queries(cu_q.host[-1])
        weights = case.randn(cu_q.host[-1]).float().abs()
        bounds = (cu_q.device, cu_k.device, cu_q.max_len, cu_k.max_len)
        got = mass.mass(q, k, *bounds, scale, weights)
        for n in range(3):
            queries = slice(*cu_q.host[n : n + 2])
            keys = slice(*cu_k.host[n : n + 2])
            plain = (_plain(q[queries]), _plain(k[keys]), scale, _plain(weights[queries]))
            worst = max(worst, _close(got[:, keys], _ORACLE.mass(*plain), MASS_TOLERANCE))
        lse = TritonAttention().normalisers(q[: counts[0]], k[:90], scale)
        expected_lse = _ORACLE.normalisers(_plain(q[: counts[0]]), _plain(k[:90]), scale)
        _close(lse.exp(), expected_lse.exp(), MASS_TOLERANCE)
        one = TritonAttention().mass(q[: counts[0]], k[:90], scale)
        alone = _ORACLE.mass(_plain(q[: counts[0]]), _plain(k[:90]), scale)
        worst = max(worst, _close(one, alone, MASS_TOLERANCE))
    return worst


def check_long_mass(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Few queries over so many keys that these are cut into parts."""
    case = Case(device, dtype, seed)
    num_keys = 1024 + int(case.numbers.integers(1, 200))
    q, k = case.queries(4), case.keys(num_keys)
    got = TritonAttention().mass(q, k, case.sizes.scale)
    expected = _ORACLE.mass(_plain(q), _plain(k), case.sizes.scale)
    return _close(got, expected, MASS_TOLERANCE)


def check_fill(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Selected tokens go to pages, the rest of a last page repeats its last token; exact.

    They belong to sequences that begin at different tokens.
    """
    case = Case(device, dtype, seed)
    size, num_tokens = case.sizes.page_tokens, 50
    k, v = case.keys(num_tokens), case.keys(num_tokens)
    stored = [torch.full((12, size, case.sizes.dim), float("nan")).to(k) for _ in range(2)]
    expected = [x.clone() for x in stored]
    indices: list[int] = []
    jobs = []
    for page in case.numbers.permutation(12)[:7].tolist():
        head, count = int(case.numbers.integers(case.sizes.num_heads)), None
        count = int(case.numbers.integers(1, min(size, num_tokens) + 1))
        start = int(case.numbers.integers(num_tokens - count + 1))
        chosen = sorted(case.numbers.choice(num_tokens - start, count, replace=False).tolist())
        jobs.append((page, head, len(indices), count, start))
        indices += chosen
        for t in range(size):
            token = start + chosen[min(t, count - 1)]
            expected[0][page, t], expected[1][page, t] = k[token, head], v[token, head]
    numbers = (torch.tensor(x, dtype=torch.int64, device=device) for x in (jobs, indices))
    pages.fill_pages(k, v, *stored, *numbers)
    for got, wanted in zip(stored, expected, strict=True):
        _same(got, wanted)
    return 0.0


def check_append(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """New tokens go where they are told; exact."""
    case = Case(device, dtype, seed)
    k, v = case.keys(6), case.keys(6)
    places = case.numbers.permutation(100)[: 6 * case.sizes.num_heads]
    refs = torch.from_numpy(places.reshape(6, -1)).to(device)
    k_stored, v_stored = case.randn(100, case.sizes.dim), case.randn(100, case.sizes.dim)
    k_expected = k_stored.index_copy(0, refs.view(-1), k.flatten(0, 1))
    v_expected = v_stored.index_copy(0, refs.view(-1), v.flatten(0, 1))
    pages.append_tokens(k, v, k_stored, v_stored, refs)
    _same(k_stored, k_expected)
    _same(v_stored, v_expected)
    return 0.0


def check_compact(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Kept tokens move to the front of their rows, in place, others' pages stay as they are."""
    case = Case(device, dtype, seed)
    size = case.sizes.page_tokens
    view = case.view(case.lengths(3, most=200))
    stored = (view.k_pages, view.v_pages)
    expected = [x.clone() for x in stored]
    entries, starts, counts, indices = [], [], [], list[int]()
    for n, h in np.ndindex(*view.lengths.shape):
        length, table = int(view.lengths[n, h]), view.page_table[n, h].tolist()
        keep = int(case.numbers.integers(0, length + 1))
        chosen = np.sort(case.numbers.choice(length, keep, replace=False)).tolist()
        if keep > 2 and case.numbers.random() < 0.3:
            chosen = list(range(keep))  # nothing moves
        entries.append((n * view.lengths.shape[1] + h) * view.page_table.shape[-1])
        starts.append(len(indices))
        counts.append(keep)
        indices += chosen
        for old, new in zip(stored, expected, strict=True):
            for t in range(-(-keep // size) * size):
                source = chosen[min(t, keep - 1)]
                moved = old[table[source // size], source % size]
                new[table[t // size], t % size] = moved
    numbers = (
        torch.tensor(x, dtype=torch.int64, device=device)
        for x in (entries, indices, starts, counts)
    )
    pages.compact_tokens(*stored, view.page_table.contiguous().view(-1), *numbers)
    for got, wanted in zip(stored, expected, strict=True):
        _same(got, wanted)
    return 0.0


CHECKS: dict[str, Check] = {
    "decode": check_decode,
    "decode and append": check_decode_append,
    "extend": check_extend,
    "prefill": check_prefill,
    "mass": check_mass,
    "mass of long prompts": check_long_mass,
    "fill pages": check_fill,
    "append": check_append,
    "compact": check_compact,
}


def _rows(view: KVView) -> decode.PagedRows:
    return decode.PagedRows(
        view.k_pages, view.v_pages, view.page_table, view.lengths, view.max_length
    )


def _plain(x: Tensor) -> Tensor:
    return x.float().to(_CPU)


def _plain_view(view: KVView) -> KVView:
    return replace(
        view,
        k_pages=_plain(view.k_pages),
        v_pages=_plain(view.v_pages),
        page_table=view.page_table.to(_CPU),
        lengths=view.lengths.to(_CPU),
    )


def _on_cpu(cu: CuSeqlens) -> CuSeqlens:
    return CuSeqlens.of(cu.lengths, _CPU)


def _close(got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest deviation, relative where numbers are above 1."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if got.numel() == 0:
        return 0.0
    plain = _plain(got)
    deviation = (plain - expected).abs() / expected.abs().clamp(min=1.0)
    worst = float(deviation.max())
    assert worst <= tolerance, _difference(plain, expected, ~(deviation <= tolerance), deviation)
    return worst


def _same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN included."""
    same = got.view(torch.uint8) == expected.view(torch.uint8)
    if not same.all():
        out = ~same.view(*got.shape, got.element_size()).all(dim=-1).to(_CPU)
        plain, wanted = _plain(got), _plain(expected)
        raise AssertionError(_difference(plain, wanted, out, (plain - wanted).abs()))


def _difference(got: Tensor, expected: Tensor, out: Tensor, deviation: Tensor) -> str:
    """Where numbers are out, how many, and the first and the worst of them."""
    first = tuple(out.nonzero()[0].tolist())
    worst = float(deviation.nan_to_num(nan=float("inf"))[out].max())
    return (
        f"{int(out.sum())} of {out.numel()} numbers of {list(got.shape)} deviate, by up to "
        f"{worst:.2e}; the first at {first}: {float(got[first]):.6g}, "
        f"not {float(expected[first]):.6g}"
    )
