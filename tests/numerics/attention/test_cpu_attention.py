"""The native attention kernels against the oracle, which computes in fp32 on the same numbers.

Bounds. float32: sums in another order, and exponentials with a relative error of 2e-7, move
averages of values of size 1 by about 1e-6; 1e-5 leaves room. bfloat16: scores and sums are float32,
so only two roundings to 8 significant bits count, of the weights and of the result, each by at most
2^-9 of the largest value. Masses are float32 sums of unrounded weights with either dtype.

What the kernels promise among themselves (batches, threads, strides) is exact.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.attention.cpu import CpuAttention, unavailable_reason
from saqqara.workers.attention.reference import ReferenceAttention
from saqqara.workers.kv.store import KVStore
from saqqara.workers.kv.view import KVView

CPU = torch.device("cpu")
ORACLE = ReferenceAttention()
REASON = unavailable_reason(CPU, torch.bfloat16)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")

# (query heads, kv heads): GQA like SmolLM2's, groups past the 3 heads that decode takes at once,
# multi-head, multi-query.
HEADS = [(9, 3), (8, 2), (5, 1), (4, 4), (7, 1)]
# Head dims: usual ones, and ends of vectors (16 words) and blocks (8, 32 and 64 dims).
DIMS = [64, 128, 16, 50, 80, 256]

heads = pytest.mark.parametrize(("num_query_heads", "num_heads"), HEADS, ids=str)
dims = pytest.mark.parametrize("dim", DIMS)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"]
)


@pytest.fixture(scope="module")
def backend() -> CpuAttention:
    return CpuAttention()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the test's end restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_view(
    lengths: Sequence[Sequence[int]], dim: int, dtype: torch.dtype, page_tokens: int = 16
) -> KVView:
    """Rows [N, H] of these lengths in shuffled pages; NaN everywhere past their ends."""
    longest = max(max(row) for row in lengths)
    num_pages = sum(-(-length // page_tokens) for row in lengths for length in row) + 5
    store = KVStore(
        num_layers=1,
        num_heads=len(lengths[0]),
        num_slots=len(lengths),
        num_pages=num_pages,
        page_tokens=page_tokens,
        max_row_tokens=max(longest, 1),
        head_dim=dim,
        dtype=dtype,
        device=CPU,
    )
    store.pool.allocate(num_pages)
    store.pool.release(np.random.default_rng(0).permutation(num_pages).astype(np.int32))
    for slot, row in enumerate(lengths):
        k, v = (randn(longest, len(row), dim, dtype=dtype, seed=2 * slot + i) for i in (0, 1))
        assert store.write(slot, 0, k, v, [torch.arange(length) for length in row])
    view = store.view(np.arange(len(lengths)), 0)
    owned = torch.zeros(num_pages, page_tokens, dtype=torch.bool)
    for slot, row in enumerate(lengths):
        for head, length in enumerate(row):
            for t in range(length):
                owned[view.page_table[slot, head, t // page_tokens], t % page_tokens] = True
    view.k_pages[~owned] = torch.nan
    view.v_pages[~owned] = torch.nan
    return view


def exact(view: KVView) -> KVView:
    """The same numbers for the oracle, in float32."""
    return KVView(
        view.k_pages.float(),
        view.v_pages.float(),
        view.page_table,
        view.lengths,
        view.max_length,
        view.page_tokens,
    )


def assert_close(actual: Tensor, expected: Tensor, largest_value: float) -> None:
    rounding = 2 * 2.0**-9 if actual.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(
        actual.float(), expected, rtol=0, atol=1e-5 + rounding * largest_value
    )


def assert_mass_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def check_prefill(
    backend: CpuAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_queries: Sequence[int],
    num_keys: Sequence[int],
    scale: float,
) -> Tensor:
    cu_q, cu_k = CuSeqlens.of(num_queries, CPU), CuSeqlens.of(num_keys, CPU)
    out, lse = backend.prefill(q, k, v, cu_q, cu_k, scale)
    expected, expected_lse = ORACLE.prefill(q.float(), k.float(), v.float(), cu_q, cu_k, scale)
    assert out.dtype == q.dtype
    assert_close(out, expected, v.abs().max().item())
    assert_close(lse, expected_lse, 0.0)
    assert torch.equal(backend.prefill(q, k, v, cu_q, cu_k, scale)[0], out)
    return out


@heads
@dtypes
def test_prefill(
    backend: CpuAttention, num_query_heads: int, num_heads: int, dtype: torch.dtype
) -> None:
    """Ends of tiles: 16, 32 or 48 rows of (token, head), 8 or 16 and 128 keys."""
    num_keys = [1, 0, 5, 16, 33, 130]
    q, k, v = (
        randn(sum(num_keys), count, 64, dtype=dtype, seed=i)
        for i, count in enumerate((num_query_heads, num_heads, num_heads))
    )
    check_prefill(backend, q, k, v, num_keys, num_keys, 0.125)
    num_queries = [1, 0, 2, 16, 7, 20]
    total = sum(num_queries)
    check_prefill(backend, q[:total], k, v, num_queries, num_keys, 0.125)


@dims
@dtypes
def test_prefill_with_any_head_dim(backend: CpuAttention, dim: int, dtype: torch.dtype) -> None:
    q, k, v = (randn(40, count, dim, dtype=dtype, seed=i) for i, count in enumerate((4, 2, 2)))
    check_prefill(backend, q, k, v, [40], [40], dim**-0.5)


def test_float32_head_dims_may_be_odd(backend: CpuAttention) -> None:
    q, k, v = (randn(20, n, 33, dtype=torch.float32, seed=i) for i, n in enumerate((2, 1, 1)))
    check_prefill(backend, q, k, v, [20], [20], 0.2)
    view = make_view([[20]], 33, torch.float32)
    assert_close(backend.decode(q[:1], view, 0.2), ORACLE.decode(q[:1], view, 0.2), 1.0)


@dtypes
def test_scores_of_any_size(backend: CpuAttention, dtype: torch.dtype) -> None:
    """Maxima that grow, or fall by hundreds, from one tile of keys to the next."""
    q, k, v = (randn(300, 1, 64, dtype=dtype, seed=i) for i in range(3))
    ramp = torch.linspace(0, 30, 300)[:, None, None].to(dtype)
    for factor in (ramp, ramp.flip(0), torch.tensor(1e-3, dtype=dtype)):
        # Scores of thousands are right to 1e-7 of their size, and so are their exponentials only
        # to 1e-3 in float32: the oracle's too.
        cu = CuSeqlens.of([300], CPU)
        out = backend.prefill(q, k * factor, v, cu, cu, 1.0)[0]
        expected = ORACLE.prefill(q.float(), (k * factor).float(), v.float(), cu, cu, 1.0)[0]
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-2)


@heads
@dtypes
@pytest.mark.parametrize("page_tokens", [16, 32, 5])
def test_decode(
    backend: CpuAttention,
    num_query_heads: int,
    num_heads: int,
    dtype: torch.dtype,
    page_tokens: int,
) -> None:
    """Rows of any length, down to none, that differ between heads; ends of pages and parts."""
    ends = [0, 1, 15, 16, 17, 511, 512, 513, 1100]
    lengths = [
        [ends[(n + 3 * head) % len(ends)] for head in range(num_heads)] for n in range(len(ends))
    ]
    view = make_view(lengths, 64, dtype, page_tokens)
    q = randn(len(lengths), num_query_heads, 64, dtype=dtype, seed=9)
    out, mass = backend.decode_and_mass(q, view, 0.125)
    expected, expected_mass = ORACLE.decode_and_mass(q.float(), exact(view), 0.125)
    assert out.dtype == dtype
    assert_close(out, expected, view.v_pages.nan_to_num().abs().max().item())
    assert_mass_close(mass, expected_mass)
    assert torch.equal(backend.decode(q, view, 0.125), out)
    same, lse = backend.decode_and_lse(q, view, 0.125)
    assert torch.equal(same, out)
    # Scores of up to about 10, summed up in float32 in another order.
    expected_lse = ORACLE.decode_and_lse(q.float(), exact(view), 0.125)[1]
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)
    empty = view.lengths.repeat_interleave(num_query_heads // num_heads, dim=1) == 0
    assert not out[empty].any()


@dims
@dtypes
def test_decode_with_any_head_dim(backend: CpuAttention, dim: int, dtype: torch.dtype) -> None:
    view = make_view([[37, 300], [16, 3]], dim, dtype)
    q = randn(2, 6, dim, dtype=dtype, seed=9)
    out, mass = backend.decode_and_mass(q, view, dim**-0.5)
    expected, expected_mass = ORACLE.decode_and_mass(q.float(), exact(view), dim**-0.5)
    assert_close(out, expected, view.v_pages.nan_to_num().abs().max().item())
    assert_mass_close(mass, expected_mass)


@heads
@dtypes
@pytest.mark.parametrize("page_tokens", [16, 5])
def test_extend(
    backend: CpuAttention,
    num_query_heads: int,
    num_heads: int,
    dtype: torch.dtype,
    page_tokens: int,
) -> None:
    """New tokens after long, short and empty rows; a sequence without new tokens."""
    kept = [[200 + head for head in range(num_heads)], [0] * num_heads, [7] * num_heads]
    kept.append([16 * (head % 2) for head in range(num_heads)])
    num_new = [3, 20, 0, 50]
    view = make_view(kept, 64, dtype, page_tokens)
    q, k, v = (
        randn(sum(num_new), count, 64, dtype=dtype, seed=20 + i)
        for i, count in enumerate((num_query_heads, num_heads, num_heads))
    )
    cu = CuSeqlens.of(num_new, CPU)
    out = backend.extend(q, k, v, cu, view, 0.125)
    expected = ORACLE.extend(q.float(), k.float(), v.float(), cu, exact(view), 0.125)
    assert_close(out, expected, 5.0)


@dtypes
def test_a_sequence_does_not_feel_its_batch(
    backend: CpuAttention, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Alone or in company, with one thread or three, in the same bits."""
    num_tokens = [70, 300, 1, 129]
    q, k, v = (
        randn(sum(num_tokens), count, 64, dtype=dtype, seed=i) for i, count in enumerate((6, 2, 2))
    )
    view = make_view([[n, 2 * n] for n in num_tokens], 64, dtype)
    cu = CuSeqlens.of(num_tokens, CPU)
    decode_q = q[: len(num_tokens)]
    threads(3)
    prefilled = backend.prefill(q, k, v, cu, cu, 0.125)[0]
    extended = backend.extend(q, k, v, cu, view, 0.125)
    decoded, mass = backend.decode_and_mass(decode_q, view, 0.125)
    window_mass = backend.mass(q[-40:], k, 0.125)
    _, lse = backend.prefill(q, k, v, cu, cu, 0.125)
    threads(1)
    assert torch.equal(backend.mass(q[-40:], k, 0.125), window_mass)
    for n, count in enumerate(num_tokens):
        own = slice(cu.host[n], cu.host[n + 1])
        cu_n = CuSeqlens.of([count], CPU)
        view_n = KVView(
            view.k_pages,
            view.v_pages,
            view.page_table[n : n + 1],
            view.lengths[n : n + 1],
            view.max_length,
            view.page_tokens,
        )
        alone, lse_n = backend.prefill(q[own], k[own], v[own], cu_n, cu_n, 0.125)
        assert torch.equal(alone, prefilled[own])
        assert torch.equal(lse_n, lse[own])
        alone = backend.extend(q[own], k[own], v[own], cu_n, view_n, 0.125)
        assert torch.equal(alone, extended[own])
        alone, mass_n = backend.decode_and_mass(decode_q[n : n + 1], view_n, 0.125)
        assert torch.equal(alone[0], decoded[n])
        assert torch.equal(mass_n[0], mass[n])


@dtypes
def test_heads_of_a_fused_projection(backend: CpuAttention, dtype: torch.dtype) -> None:
    """Queries, keys and values may be parts of one tensor [T, Hq + 2 H, D]."""
    fused = randn(90, 6 + 2 * 2, 64, dtype=dtype)
    q, k, v = fused[:, :6], fused[:, 6:8], fused[:, 8:]
    own = q.contiguous(), k.contiguous(), v.contiguous()
    cu = CuSeqlens.of([90], CPU)
    view = make_view([[40, 50]] * 90, 64, dtype)
    one_view = make_view([[40, 50]], 64, dtype)
    calls: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda q, k, v: backend.prefill(q, k, v, cu, cu, 0.125)[0],
        lambda q, k, v: backend.extend(q, k, v, cu, one_view, 0.125),
        lambda q, k, v: backend.decode(q, view, 0.125),
        lambda q, k, v: backend.mass(q[-8:], k, 0.125),
        # Heads that do not lie together.
        lambda q, k, v: backend.mass(q.transpose(0, 1).contiguous().transpose(0, 1), k, 0.125),
    ]
    for call in calls:
        assert torch.equal(call(q, k, v), call(*own))


def test_no_sequences(backend: CpuAttention) -> None:
    nothing = randn(0, 2, 64, dtype=torch.bfloat16)
    for lengths in ([], [0, 0]):
        cu = CuSeqlens.of(lengths, CPU)
        assert backend.prefill(nothing, nothing, nothing, cu, cu, 0.125)[0].shape == nothing.shape


def test_says_what_it_cannot_do(backend: CpuAttention) -> None:
    assert unavailable_reason(torch.device("cuda"), torch.bfloat16) == "the device is cuda"
    assert "not torch.float16" in str(unavailable_reason(CPU, torch.float16))
    assert unavailable_reason(CPU, torch.float32) is None
    wide = randn(2, 2, 258, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="head_dim 258"):
        backend.mass(wide, wide, 0.1)
