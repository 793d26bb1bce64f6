"""Attention backends against the oracle, and the oracle against the textbook formula.

The oracle computes every query and head on its own, in float32, gathering pages token by token.

Tolerances. float32: results are averages of values of size 1 over at most a few hundred keys, so
sums in another order differ by some 1e-7 each; 1e-5 leaves room for the exponentials of scores.
bfloat16: scores, weights and the output are rounded to 8 bits (2^-9 = 2e-3 relative each, and a
score of 4 may be off by 8e-3), so values of size 1 may be off by 2e-2. float16 tiles are computed
in float32 on a CPU; only the output is rounded, by 2^-11.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saqqara.workers.attention.base import CuSeqlens, get_backend
from saqqara.workers.attention.reference import ReferenceAttention
from saqqara.workers.attention.sdpa import TorchAttention
from saqqara.workers.attention.tiles import CPU_TILING, Tiling
from saqqara.workers.kv.store import KVStore
from saqqara.workers.kv.view import KVView

CPU = torch.device("cpu")
HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5
ORACLE = ReferenceAttention()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Tiles so small that every loop over tiles, rows and chunks goes round more than once.
TINY_TILES = Tiling(
    score_bytes=1 << 10, min_queries=2, max_queries=4, gather_bytes=4 << 10, padding_bytes=512
)

heads = pytest.mark.parametrize(
    ("num_query_heads", "num_kv_heads"), [(6, 2), (4, 4), (4, 1), (7, 1)], ids=str
)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
tilings = pytest.mark.parametrize("tiling", [CPU_TILING, TINY_TILES], ids=["default", "tiny"])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        actual.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def make_view(
    lengths: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    page_tokens: int = 16,
    head_dim: int = HEAD_DIM,
) -> KVView:
    """Rows [N, H] of these lengths in shuffled pages of a pool that has seen NaNs."""
    num_sequences, num_heads = len(lengths), len(lengths[0])
    longest = max(max(row) for row in lengths)
    num_pages = sum(-(-length // page_tokens) for row in lengths for length in row) + 5
    store = KVStore(
        num_layers=1,
        num_heads=num_heads,
        num_slots=num_sequences,
        num_pages=num_pages,
        page_tokens=page_tokens,
        max_row_tokens=max(longest, 1),
        head_dim=head_dim,
        dtype=dtype,
        device=CPU,
    )
    store.pool.k_pages.fill_(float("nan"))
    store.pool.v_pages.fill_(float("nan"))
    store.pool.allocate(num_pages)
    store.pool.release(np.random.default_rng(0).permutation(num_pages).astype(np.int32))
    rng = np.random.default_rng(1)
    store.table.pages[:] = rng.integers(0, num_pages, store.table.pages.shape)
    for slot, row in enumerate(lengths):
        k, v = (randn(longest, num_heads, head_dim, dtype=dtype, seed=2 * slot + i) for i in (0, 1))
        assert store.write(slot, 0, k, v, [torch.arange(length) for length in row])
    store.check_integrity()
    return store.view(np.arange(num_sequences), 0)


def test_reference_is_the_textbook_formula() -> None:
    """softmax(q k^T / sqrt(D) + causal mask) v, written with one matrix per head."""
    n, num_heads = 9, 3
    q, k, v = (randn(n, num_heads, HEAD_DIM, seed=i) for i in range(3))
    cu = CuSeqlens.of([n], CPU)
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    scores += torch.full((n, n), float("-inf")).triu(1)
    weights = scores.softmax(dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, v)
    assert_close(ORACLE.prefill(q, k, v, cu, cu, SCALE)[0], expected, torch.float32)
    last = CuSeqlens.of([4], CPU)
    assert_close(ORACLE.prefill(q[5:], k, v, last, cu, SCALE)[0], expected[5:], torch.float32)
    assert_close(ORACLE.mass(q, k, SCALE), weights.sum(dim=1), torch.float32)
    assert_close(ORACLE.mass(q[7:], k, SCALE), weights[:, 7:].sum(dim=1), torch.float32)
    _, lse = ORACLE.prefill(q, k, v, cu, cu, SCALE)
    assert_close(lse, scores.logsumexp(dim=-1).T, torch.float32)
    assert_close(ORACLE.normalisers(q[7:], k, SCALE), lse[7:], torch.float32)
    part = ORACLE.mass(q[7:], k, SCALE, lse=lse[7:], num_columns=5)
    assert_close(part, weights[:, 7:, :5].sum(dim=1), torch.float32)
    # Decoding or extending over keys in pages is the same attention.
    view = make_view([[n] * num_heads], page_tokens=4)
    k, v = (randn(n, num_heads, HEAD_DIM, seed=i) for i in range(2))
    scores = torch.einsum("qhd,khd->hqk", q[-1:], k) / HEAD_DIM**0.5
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)
    out, mass = ORACLE.decode_and_mass(q[-1:], view, SCALE)
    assert_close(out, expected, torch.float32)
    assert_close(mass[0], scores.softmax(dim=-1)[:, 0], torch.float32)
    out, lse = ORACLE.decode_and_lse(q[-1:], view, SCALE)
    assert_close(out, expected, torch.float32)
    assert_close(lse, scores.logsumexp(dim=-1).T, torch.float32)
    new = randn(2, num_heads, HEAD_DIM, seed=8)
    extended = ORACLE.extend(q[:2], new, new, CuSeqlens.of([2], CPU), view, SCALE)
    whole = CuSeqlens.of([n + 2], CPU)
    keys, values = torch.cat([k, new]), torch.cat([v, new])
    expected = ORACLE.prefill(q[:2], keys, values, CuSeqlens.of([2], CPU), whole, SCALE)[0]
    assert_close(extended, expected, torch.float32)


@heads
@dtypes
@tilings
def test_prefill(
    num_query_heads: int, num_kv_heads: int, dtype: torch.dtype, tiling: Tiling
) -> None:
    lengths = [1, 2, 16, 17, 39]
    cu = CuSeqlens.of(lengths, CPU)
    q = randn(cu.host[-1], num_query_heads, HEAD_DIM, dtype=dtype, seed=1)
    k, v = (randn(cu.host[-1], num_kv_heads, HEAD_DIM, dtype=dtype, seed=2 + i) for i in range(2))
    backend = TorchAttention(tiling)
    out = backend.prefill(q, k, v, cu, cu, SCALE)[0]
    assert out.dtype == dtype
    assert_close(out, ORACLE.prefill(q, k, v, cu, cu, SCALE)[0], dtype)
    # Only the last queries of each sequence, down to a single one.
    num_queries = [1, 1, 16, 5, 20]
    chosen = torch.cat(
        [torch.arange(end - m, end) for end, m in zip(cu.host[1:], num_queries, strict=True)]
    )
    cu_q = CuSeqlens.of(num_queries, CPU)
    assert_close(
        backend.prefill(q[chosen], k, v, cu_q, cu, SCALE)[0],
        ORACLE.prefill(q[chosen], k, v, cu_q, cu, SCALE)[0],
        dtype,
    )


@heads
@dtypes
@tilings
def test_decode(
    num_query_heads: int, num_kv_heads: int, dtype: torch.dtype, tiling: Tiling
) -> None:
    """Rows of very different lengths, at and around page boundaries, and some empty ones."""
    lengths = np.array([1, 15, 16, 17, 160, 0, 32, 33, 5, 64])
    ragged = [np.roll(lengths, 3 * head) for head in range(num_kv_heads)]
    view = make_view(np.stack(ragged, axis=1).tolist(), dtype)
    q = randn(len(lengths), num_query_heads, HEAD_DIM, dtype=dtype, seed=50)
    backend = TorchAttention(tiling)
    expected, expected_mass = ORACLE.decode_and_mass(q, view, SCALE)
    out = backend.decode(q, view, SCALE)
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    empty = view.lengths == 0
    assert empty.any()
    assert (out.view(len(lengths), num_kv_heads, -1)[empty] == 0).all()
    out, mass = backend.decode_and_mass(q, view, SCALE)
    assert_close(out, expected, dtype)
    assert mass.shape == (len(lengths), num_kv_heads, 160)
    assert mass.dtype == torch.float32
    assert_close(mass, expected_mass, dtype)
    out, lse = backend.decode_and_lse(q, view, SCALE)
    assert torch.equal(out, backend.decode(q, view, SCALE))
    assert_close(lse, ORACLE.decode_and_lse(q, view, SCALE)[1], dtype)


def test_decode_does_not_depend_on_the_batch() -> None:
    """A sequence gets the same output alone as among others (to float32 rounding)."""
    lengths = [[7, 9], [300, 20], [64, 65], [1, 1], [0, 4]]
    view = make_view(lengths)
    q = randn(len(lengths), 6, HEAD_DIM)
    together = TorchAttention().decode(q, view, SCALE)
    for n in range(len(lengths)):
        alone = KVView(
            view.k_pages,
            view.v_pages,
            view.page_table[n : n + 1],
            view.lengths[n : n + 1],
            view.max_length,
            view.page_tokens,
        )
        out = TorchAttention().decode(q[n : n + 1], alone, SCALE)
        assert_close(out, together[n : n + 1], torch.float32)


def test_decode_of_nothing() -> None:
    view = make_view([[0, 0]])
    out, mass = TorchAttention().decode_and_mass(randn(1, 4, HEAD_DIM), view, SCALE)
    assert torch.equal(out, torch.zeros(1, 4, HEAD_DIM))
    assert mass.shape == (1, 2, 0)


@heads
@dtypes
@tilings
def test_extend(
    num_query_heads: int, num_kv_heads: int, dtype: torch.dtype, tiling: Tiling
) -> None:
    """New tokens over rows of different lengths, also empty ones; some counts occur twice."""
    lengths = np.array([16, 1, 0, 33, 100, 17])
    ragged = [np.roll(lengths, 2 * head) for head in range(num_kv_heads)]
    view = make_view(np.stack(ragged, axis=1).tolist(), dtype)
    cu = CuSeqlens.of([1, 7, 7, 20, 1, 2], CPU)
    q = randn(cu.host[-1], num_query_heads, HEAD_DIM, dtype=dtype, seed=60)
    k, v = (randn(cu.host[-1], num_kv_heads, HEAD_DIM, dtype=dtype, seed=61 + i) for i in range(2))
    out = TorchAttention(tiling).extend(q, k, v, cu, view, SCALE)
    assert out.dtype == dtype
    assert_close(out, ORACLE.extend(q, k, v, cu, view, SCALE), dtype)


def test_extending_by_one_token_is_decoding() -> None:
    """The same rows, once with the new token in its page and once handed over."""
    store = KVStore(1, 2, 3, 64, 4, 64, HEAD_DIM, torch.float32, CPU)
    for slot, length in enumerate((3, 4, 30)):
        prompt = randn(length, 2, HEAD_DIM, seed=slot)
        store.write(slot, 0, prompt, -prompt)
    plan = store.begin_append(np.arange(3), np.ones(3, dtype=np.int64))
    assert plan is not None
    q, k, v = randn(3, 6, HEAD_DIM, seed=5), randn(3, 2, HEAD_DIM, seed=6), randn(3, 2, HEAD_DIM)
    store.append(plan, 0, k, v)
    backend = TorchAttention()
    decoded = backend.decode(q, store.decode_view(plan, 0), SCALE)
    cu = CuSeqlens.of([1, 1, 1], CPU)
    extended = backend.extend(q, k, v, cu, store.extend_view(plan, 0), SCALE)
    assert_close(decoded, extended, torch.float32)


@heads
@dtypes
@tilings
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 40), (8, 33), (40, 40)])
def test_mass(
    num_query_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    tiling: Tiling,
    num_queries: int,
    num_keys: int,
) -> None:
    """In float32 for every dtype, so the tolerance is float32's (sums of up to 280 weights)."""
    q = randn(num_queries, num_query_heads, HEAD_DIM, dtype=dtype, seed=1)
    k = randn(num_keys, num_kv_heads, HEAD_DIM, dtype=dtype, seed=2)
    backend = TorchAttention(tiling)
    mass = backend.mass(q, k, SCALE)
    assert mass.dtype == torch.float32
    assert_close(mass, ORACLE.mass(q, k, SCALE), torch.float32)
    every_query = torch.full((num_kv_heads,), num_queries * num_query_heads / num_kv_heads)
    assert_close(mass.sum(dim=1), every_query, torch.float32)
    weights = torch.linspace(1, 1.2, num_queries)
    weighted = backend.mass(q, k, SCALE, query_weights=weights)
    assert_close(weighted, ORACLE.mass(q, k, SCALE, query_weights=weights), torch.float32)
    fewer = backend.mass(q, k, SCALE, query_weights=weights, num_columns=num_keys // 2)
    assert torch.equal(fewer, weighted[:, : num_keys // 2])
    lse = backend.normalisers(q, k, SCALE)
    assert_close(lse, ORACLE.normalisers(q, k, SCALE), torch.float32)


def test_queries_may_be_slices_of_a_fused_projection() -> None:
    """The decoder hands over views of one q-k-v tensor, which are not contiguous."""
    fused = randn(12, 10, HEAD_DIM)
    q, k, v = torch.split(fused, [6, 2, 2], dim=1)
    cu, view = CuSeqlens.of([7, 5], CPU), make_view([[9, 4], [3, 20]])
    backend = TorchAttention()
    out = backend.prefill(q, k, v, cu, cu, SCALE)[0]
    assert_close(out, ORACLE.prefill(q, k, v, cu, cu, SCALE)[0], torch.float32)
    out = backend.extend(q, k, v, cu, view, SCALE)
    assert_close(out, ORACLE.extend(q, k, v, cu, view, SCALE), torch.float32)
    out = backend.decode(q[:2], view, SCALE)
    assert_close(out, ORACLE.decode(q[:2], view, SCALE), torch.float32)
    mass = backend.mass(q[:4], k, SCALE)
    assert_close(mass, ORACLE.mass(q[:4], k, SCALE), torch.float32)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


def test_memory_is_bounded_by_the_tiles() -> None:
    """Scores of 600 queries on 2,000 keys would take 22 MB; no tensor is larger than its tile."""
    tiling = Tiling(
        score_bytes=1 << 18, min_queries=4, max_queries=64, gather_bytes=1 << 18, padding_bytes=0
    )
    backend = TorchAttention(tiling)
    view = make_view([[1000, 1400]])
    cu_q, cu_k = CuSeqlens.of([600], CPU), CuSeqlens.of([2000], CPU)
    for dtype in (torch.float32, torch.bfloat16):
        q = randn(600, 6, HEAD_DIM, dtype=dtype)
        k = randn(2000, 2, HEAD_DIM, dtype=dtype)
        k_view = KVView(
            view.k_pages.to(dtype),
            view.v_pages.to(dtype),
            view.page_table,
            view.lengths,
            view.max_length,
            view.page_tokens,
        )
        with LargestTensor() as largest:
            backend.prefill(q, k, k, cu_q, cu_k, SCALE)[0]
            backend.mass(q, k, SCALE)
            backend.extend(q, k[:600], k[:600], cu_q, k_view, SCALE)
        inputs = max(q.nbytes, view.k_pages.nbytes)
        assert largest.num_bytes <= max(tiling.score_bytes, inputs)


def test_backends_are_found_by_name() -> None:
    for name, kind in (("reference", ReferenceAttention), ("torch", TorchAttention)):
        backend, reason = get_backend(name, CPU, torch.float32)
        assert isinstance(backend, kind)
        assert backend.name == name
        assert name in reason
    backend, reason = get_backend("auto", CPU, torch.bfloat16)
    assert reason.startswith("auto")
    with pytest.raises(ValueError, match=r"attention_backend: no backend 'flesh'; known: .*torch"):
        get_backend("flesh", CPU, torch.float32)


def test_backends_are_imported_when_asked_for() -> None:
    code = (
        "import sys, saqqara.workers.attention.base;"
        "assert not {m for m in sys.modules if m.startswith('saqqara.workers.attention.')}"
        " - {'saqqara.workers.attention.base'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cu_seqlens() -> None:
    cu = CuSeqlens.of([3, 0, 5], CPU)
    assert (cu.host, cu.max_len, cu.lengths) == ((0, 3, 3, 8), 5, (3, 0, 5))
    assert cu.device.tolist() == [0, 3, 3, 8]
    assert cu.device.dtype == torch.int32
