"""The native mass kernel: how much attention each key gets from the last queries of its sequence.

Masses are float32 sums of unrounded weights, with bfloat16 keys, too; sums in another order and
exponentials with a relative error of 2e-7 leave 1e-5 of room.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.attention.cpu import CpuAttention, unavailable_reason
from saqqara.workers.attention.reference import ReferenceAttention

CPU = torch.device("cpu")
ORACLE = ReferenceAttention()
REASON = unavailable_reason(CPU, torch.bfloat16)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")

# (query heads, kv heads): GQA like SmolLM2's and others, multi-head, multi-query.
HEADS = [(9, 3), (8, 2), (5, 1), (4, 4), (7, 1)]
DIMS = [64, 128, 16, 50, 80, 256]  # usual ones, and ends of vectors (16 words)

heads = pytest.mark.parametrize(("num_query_heads", "num_heads"), HEADS, ids=str)
dims = pytest.mark.parametrize("dim", DIMS)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"]
)


@pytest.fixture(scope="module")
def backend() -> CpuAttention:
    return CpuAttention()


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_mass_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@heads
@dtypes
@pytest.mark.parametrize(("window", "num_keys"), [(1, 1), (8, 8), (32, 700), (64, 288), (5, 257)])
def test_mass(
    backend: CpuAttention,
    num_query_heads: int,
    num_heads: int,
    dtype: torch.dtype,
    window: int,
    num_keys: int,
) -> None:
    """Sums to the number of queries; ends of blocks of 16, 32 and 48 keys and of 8 or 16 rows."""
    q = randn(window, num_query_heads, 64, dtype=dtype, seed=1)
    k = randn(num_keys, num_heads, 64, dtype=dtype, seed=2)
    mass = backend.mass(q, k, 0.125)
    assert_mass_close(mass, ORACLE.mass(q.float(), k.float(), 0.125))
    total = torch.full((num_heads,), window * num_query_heads / num_heads)
    torch.testing.assert_close(mass.sum(dim=1), total, rtol=1e-5, atol=0)
    weights = torch.linspace(0, 1, window)
    weighted = backend.mass(q, k, 0.125, weights)
    assert_mass_close(weighted, ORACLE.mass(q.float(), k.float(), 0.125, weights))


def softmax_mass(
    q: Tensor, k: Tensor, scale: float, query_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """By the definition: mass [H, n] and log-sum-exps [w, Hq] in float64, one query at a time."""
    (num_queries, num_query_heads, _), (num_keys, num_heads, _) = q.shape, k.shape
    mass = torch.zeros(num_heads, num_keys, dtype=torch.float64)
    lse = torch.zeros(num_queries, num_query_heads, dtype=torch.float64)
    for i in range(num_queries):
        seen = num_keys - num_queries + i + 1
        for head in range(num_query_heads):
            kv_head = head * num_heads // num_query_heads
            exponentials = (scale * k[:seen, kv_head].double() @ q[i, head].double()).exp()
            mass[kv_head, :seen] += query_weights[i] * exponentials / exponentials.sum()
            lse[i, head] = exponentials.sum().log()
    return mass, lse


@pytest.mark.parametrize("seed", range(12))
def test_mass_with_the_log_sum_exps_of_prefill(backend: CpuAttention, seed: int) -> None:
    """Random shapes, several sequences in one prefill, each with a window and columns of its own.

    A log-sum-exp of about 8 is right to 5e-7 in float32, and so is every weight that it gives.
    """
    rng = np.random.default_rng(seed)
    num_query_heads, num_heads = HEADS[seed % len(HEADS)]
    dim, dtype = int(rng.choice(DIMS[:5])), (torch.bfloat16, torch.float32)[seed % 2]
    num_tokens = rng.integers(1, 180, size=3).tolist()
    cu = CuSeqlens.of(num_tokens, CPU)
    q, k = (
        randn(cu.host[-1], count, dim, dtype=dtype, seed=10 * seed + i)
        for i, count in enumerate((num_query_heads, num_heads))
    )
    scale = dim**-0.5
    _, lse = backend.prefill(q, k, k, cu, cu, scale)
    for n, start, stop in zip(num_tokens, cu.host[:-1], cu.host[1:], strict=True):
        window = int(rng.integers(1, n + 1))
        num_columns = int(rng.integers(0, n + 1))
        weights = torch.from_numpy(rng.uniform(0, 2, size=window)).float()
        last, keys = slice(stop - window, stop), k[start:stop]
        expected, expected_lse = softmax_mass(q[last], keys, scale, weights)
        torch.testing.assert_close(lse[last], expected_lse.float(), rtol=0, atol=1e-5)
        mass = backend.mass(q[last], keys, scale, weights, lse=lse[last])
        assert_mass_close(mass, expected.float())
        assert_mass_close(backend.mass(q[last], keys, scale, weights), expected.float())
        fewer = backend.mass(q[last], keys, scale, weights, lse=lse[last], num_columns=num_columns)
        assert fewer.shape == (num_heads, num_columns)
        assert_mass_close(fewer, expected[:, :num_columns].float())
        oracle = ORACLE.mass(q[last].float(), keys.float(), scale, weights, lse=lse[last])
        assert_mass_close(mass, oracle)


@dtypes
def test_mass_of_hidden_keys_is_zero(backend: CpuAttention, dtype: torch.dtype) -> None:
    """A key that a query must not see may score so high that its exponential is infinite."""
    q, k = torch.ones(3, 1, 64, dtype=dtype), torch.zeros(60, 1, 64, dtype=dtype)
    k[-1] = 3.125  # scores 200; only the last query sees it, and then nothing else
    mass = backend.mass(q, k, 1.0)
    expected = torch.zeros(1, 59)
    expected[0, :58] += 1 / 58
    expected[0, :59] += 1 / 59
    assert_mass_close(mass[:, :59], expected)
    # The log-sum-exp, 200, is right to 1e-5 in float32.
    assert mass[0, 59].item() == pytest.approx(1, abs=5e-5)


@dims
@dtypes
def test_mass_with_any_head_dim(backend: CpuAttention, dim: int, dtype: torch.dtype) -> None:
    q, k = randn(20, 6, dim, dtype=dtype), randn(150, 2, dim, dtype=dtype, seed=1)
    assert_mass_close(backend.mass(q, k, 0.1), ORACLE.mass(q.float(), k.float(), 0.1))
