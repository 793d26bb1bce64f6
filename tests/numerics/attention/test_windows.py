"""Sliding windows and capped scores: the oracle against the formula, the backends against it.

Tolerances as in `test_attention.py`.
"""

import math
import os

import pytest
import torch
from torch import Tensor

from saqqara.workers.attention.base import AttentionBackend, CuSeqlens, get_backend
from saqqara.workers.attention.cpu import CpuAttention, unavailable_reason
from saqqara.workers.attention.reference import ReferenceAttention
from saqqara.workers.attention.sdpa import TorchAttention
from saqqara.workers.attention.tiles import CPU_TILING, Tiling
from saqqara.workers.kv.store import KVStore
from saqqara.workers.kv.view import KVView

CPU = torch.device("cpu")
DIM = 16
SCALE = 0.4
CAP = 1.5  # scores of size 1.6 feel it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TINY_TILES = Tiling(
    score_bytes=1 << 10, min_queries=2, max_queries=4, gather_bytes=4 << 10, padding_bytes=512
)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def backends(dtype: torch.dtype, softcap: float) -> list[AttentionBackend]:
    """Every backend that runs here and computes this."""
    found: list[AttentionBackend] = [
        TorchAttention(CPU_TILING, softcap),
        TorchAttention(TINY_TILES, softcap),
    ]
    if unavailable_reason(CPU, dtype) is None:
        found.append(CpuAttention(softcap))
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.append(get_backend("triton", CPU, dtype, softcap)[0])
    return found


def rows_of(k: Tensor, v: Tensor) -> KVView:
    """One sequence's keys and values [n, H, D] in pages."""
    n, num_heads, dim = k.shape
    store = KVStore(1, num_heads, 1, 64, 4, n, dim, k.dtype, CPU)
    assert store.write(0, 0, k, v)
    return store.view(torch.zeros(1, dtype=torch.int64).numpy(), 0)


def formula(q: Tensor, k: Tensor, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Scores with their mask, and softmax of them, [H, n, n], one query head per kv head."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(len(q))
    ago = position[:, None] - position
    hidden = (ago < 0) | ((ago >= window) if window else torch.zeros_like(ago, dtype=torch.bool))
    scores = scores.masked_fill(hidden, -math.inf)
    return scores, scores.softmax(dim=-1)


@pytest.mark.parametrize(("window", "softcap"), [(0, CAP), (1, 0.0), (4, CAP), (9, 0.0)])
def test_reference_is_the_formula(window: int, softcap: float) -> None:
    n = 9
    q, k, v = (randn(n, 3, DIM, seed=i) for i in range(3))
    oracle, cu = ReferenceAttention(softcap), CuSeqlens.of([n], CPU)
    scores, weights = formula(q, k, window, softcap)
    expected = torch.einsum("hqk,khd->qhd", weights, v)
    out, lse = oracle.prefill(q, k, v, cu, cu, SCALE, window)
    assert_close(out, expected)
    assert_close(lse, scores.logsumexp(dim=-1).T)
    last = CuSeqlens.of([4], CPU)
    assert_close(oracle.prefill(q[5:], k, v, last, cu, SCALE, window)[0], expected[5:])
    if window:
        return
    assert_close(oracle.mass(q[6:], k, SCALE), weights[:, 6:].sum(dim=1))
    assert_close(oracle.normalisers(q[6:], k, SCALE), lse[6:])
    assert_close(oracle.mass(q[6:], k, SCALE, lse=lse[6:]), weights[:, 6:].sum(dim=1))
    decoded, mass = oracle.decode_and_mass(q[-1:], rows_of(k, v), SCALE)
    assert_close(decoded, expected[-1:])
    assert_close(mass[0], weights[:, -1])
    assert_close(oracle.decode_and_lse(q[-1:], rows_of(k, v), SCALE)[1], lse[-1:])
    new = (q[7:], k[7:], v[7:])
    assert_close(oracle.extend(*new, CuSeqlens.of([2], CPU), rows_of(k[:7], v[:7]), SCALE), out[7:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("window", "softcap", "num_queries", "num_heads", "dim"),
    [(1, 0.0, 6, 2, DIM), (5, CAP, 3, 3, DIM), (32, 0.0, 5, 1, 50), (500, CAP, 6, 2, DIM)],
)
def test_prefill(
    dtype: torch.dtype, window: int, softcap: float, num_queries: int, num_heads: int, dim: int
) -> None:
    """Prompts shorter and longer than the window and a tile, whole and their last queries."""
    lengths, num_last = [1, 2, 16, 17, 39, 190], [1, 1, 16, 5, 20, 1]
    cu, cu_q = CuSeqlens.of(lengths, CPU), CuSeqlens.of(num_last, CPU)
    q = randn(cu.host[-1], num_queries, dim, dtype=dtype, seed=1) * (DIM / dim) ** 0.5
    k, v = (randn(cu.host[-1], num_heads, dim, dtype=dtype, seed=2 + i) for i in range(2))
    ends = zip(cu.host[1:], num_last, strict=True)
    chosen = torch.cat([torch.arange(end - m, end) for end, m in ends])
    oracle = ReferenceAttention(softcap)
    expected, lse = oracle.prefill(q, k, v, cu, cu, SCALE, window)
    for backend in backends(dtype, softcap):
        out, normalisers = backend.prefill(q, k, v, cu, cu, SCALE, window)
        assert_close(out, expected, dtype)
        if normalisers is not None:
            assert_close(normalisers, lse, dtype)
        out, _ = backend.prefill(q[chosen], k, v, cu_q, cu, SCALE, window)
        assert_close(out, expected[chosen], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_capped_scores_everywhere_else(dtype: torch.dtype) -> None:
    """Decoding, extending, masses and normalisers of sequences with capped scores."""
    n, oracle = 39, ReferenceAttention(CAP)
    q = randn(n, 6, DIM, dtype=dtype, seed=1)
    k, v = (randn(n, 2, DIM, dtype=dtype, seed=2 + i) for i in range(2))
    view, before, new = rows_of(k, v), rows_of(k[:30], v[:30]), (q[30:], k[30:], v[30:])
    cu = CuSeqlens.of([9], CPU)
    for backend in backends(dtype, CAP):
        assert backend.softcap == CAP
        assert_close(backend.decode(q[-1:], view, SCALE), oracle.decode(q[-1:], view, SCALE), dtype)
        for name in ("decode_and_mass", "decode_and_lse"):
            found, wanted = (getattr(x, name)(q[-1:], view, SCALE) for x in (backend, oracle))
            assert_close(found[0], wanted[0], dtype)
            assert_close(found[1], wanted[1], dtype)
        extended = backend.extend(*new, cu, before, SCALE)
        assert_close(extended, oracle.extend(*new, cu, before, SCALE), dtype)
        lse = oracle.normalisers(q[30:], k, SCALE)
        assert_close(backend.normalisers(q[30:], k, SCALE), lse)
        assert_close(backend.mass(q[30:], k, SCALE), oracle.mass(q[30:], k, SCALE))
        assert_close(backend.mass(q[30:], k, SCALE, lse=lse), oracle.mass(q[30:], k, SCALE))
