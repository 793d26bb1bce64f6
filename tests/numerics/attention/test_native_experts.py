"""The native experts against plain loops over tokens, in fp32 on the same bf16 numbers.

What the kernels promise among themselves (batches, threads, in place) is exact.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from saqqara.workers.models.norm import rms_norm
from saqqara.workers.native.build import unavailable_reason
from saqqara.workers.native.experts import NativeExperts, PackedMlp
from saqqara.workers.native.linear import PackedLinear, RMSNorm

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"no native kernels: {unavailable_reason()}"
)
HIDDEN, INNER, SHARED_INNER = 72, 40, 88


def randn(*shape: int, seed: int = 0) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (numbers * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).bfloat16()


class Weights:
    """Of all experts, and the same packed."""

    def __init__(self, num_experts: int, per_token: int, normalised: bool, shared: bool) -> None:
        self.norm = RMSNorm(randn(HIDDEN, seed=1), 1e-5)
        self.router = randn(num_experts + shared, HIDDEN, seed=2) * 4
        sizes = [INNER] * num_experts + [SHARED_INNER] * shared
        self.gate_up = [randn(2 * size, HIDDEN, seed=10 + i) for i, size in enumerate(sizes)]
        self.down = [randn(HIDDEN, size, seed=50 + i) for i, size in enumerate(sizes)]
        self.per_token, self.normalised = per_token, normalised
        self.num_experts, self.shared = num_experts, shared
        mlps = [
            PackedMlp(PackedLinear(gate_up, gated="silu"), PackedLinear(down))
            for gate_up, down in zip(self.gate_up, self.down, strict=True)
        ]
        self.packed = NativeExperts(
            self.norm,
            self.router,
            mlps[:num_experts],
            mlps[-1] if shared else None,
            per_token,
            normalised,
        )

    def mlp(self, number: int, x: Tensor) -> Tensor:
        gate, up = (self.gate_up[number].float() @ x).chunk(2)
        inner = (silu(gate) * up).bfloat16().float()
        return self.down[number].float() @ inner

    def slow(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """A token and an expert at a time."""
        out = []
        for x, before in zip(
            rms_norm(hidden, self.norm.weight, self.norm.eps), residual, strict=True
        ):
            logits = self.router.float() @ x.float()
            shares = logits[: self.num_experts].softmax(0)
            chosen = sorted(range(self.num_experts), key=lambda n: -float(shares[n]))
            chosen = chosen[: self.per_token]
            whole = sum(float(shares[n]) for n in chosen) if self.normalised else 1.0
            total = before.float()
            for n in chosen:
                total = total + shares[n] / whole * self.mlp(n, x.float())
            if self.shared:
                total = total + logits[-1].sigmoid() * self.mlp(self.num_experts, x.float())
            out.append(total)
        return torch.stack(out)


@pytest.mark.parametrize(
    ("num_experts", "per_token", "normalised", "shared"),
    [(5, 2, True, False), (7, 3, False, True), (40, 8, True, False), (1, 1, True, True)],
)
@pytest.mark.parametrize("rows", [1, 17, 130])
def test_experts_are_what_loops_say(
    rows: int, num_experts: int, per_token: int, normalised: bool, shared: bool
) -> None:
    weights = Weights(num_experts, per_token, normalised, shared)
    hidden, residual = randn(rows, HIDDEN, seed=3) * 8, randn(rows, HIDDEN, seed=4)
    expected = weights.slow(hidden, residual)
    found = weights.packed(hidden, residual=residual)
    # Products of experts are rounded to bf16 before they are added, and so is the sum.
    torch.testing.assert_close(found.float(), expected, rtol=2.0**-7, atol=2.0**-6)
    assert weights.packed(hidden, out=hidden, residual=residual) is hidden
    assert torch.equal(hidden, found)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_every_batch(num_threads: int) -> None:
    packed = Weights(7, 3, normalised=True, shared=True).packed
    hidden = randn(300, HIDDEN, seed=3) * 8
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([packed(row[None]) for row in hidden])
        torch.set_num_threads(num_threads)
        for rows in (1, 2, 14, 33, 113, 300):
            assert torch.equal(packed(hidden[:rows]), alone[:rows]), rows
    finally:
        torch.set_num_threads(before)


def test_no_rows() -> None:
    assert Weights(3, 1, True, False).packed(randn(0, HIDDEN)).shape == (0, HIDDEN)
