"""The gated activation of an MLP.

Shapes: T packed tokens, F intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """One block of a token's numbers; rounded after the activation and after the product."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    within = f < F
    dtype = out.dtype.element_ty
    gate_F = tl.load(gate_up + token * 2 * F + f, mask=within, other=0.0).to(tl.float32)
    up_F = tl.load(gate_up + token * 2 * F + F + f, mask=within, other=0.0).to(tl.float32)
    activated_F = (gate_F / (1.0 + tl.exp(-gate_F))).to(dtype)
    tl.store(out + token * F + f, (activated_F.to(tl.float32) * up_F).to(dtype), mask=within)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate_up: [T, 2 F], contiguous, the gates first.

    Returns:
        [T, F].
    """
    assert gate_up.is_contiguous()
    num_tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens and size:
        _silu_mul_kernel[num_tokens, -(-size // _BLOCK)](gate_up, out, F=size, BLOCK_F=_BLOCK)
    return out
