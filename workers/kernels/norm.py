"""RMS norms, alone or of a sum that is kept, with the roundings of Hugging Face.

The sum is rounded to the dtype before it is normalised, the normalised numbers are rounded before
they meet the weight, and so is the product; everything between is float32.

Shapes: T packed tokens, E hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import padded


@triton.jit
def normalised(x, weight, mean_square, eps):
    """`weight * x / rms`, rounded twice; `x` is float32, `weight` in the dtype of the result."""
    dtype = weight.dtype
    rounded = (x * tl.rsqrt(mean_square + eps)).to(dtype)
    return (rounded.to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, total, out, x_stride, residual_stride, total_stride, eps,
    E: tl.constexpr, BLOCK_E: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    of_token = e < E
    wide_E = tl.load(x + token * x_stride + e, mask=of_token, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        more_E = tl.load(residual + token * residual_stride + e, mask=of_token, other=0.0)
        total_E = (wide_E + more_E.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + token * total_stride + e, total_E, mask=of_token)
        wide_E = total_E.to(tl.float32)
    weight_E = tl.load(weight + e, mask=of_token, other=0.0)
    normed_E = normalised(wide_E, weight_E, tl.sum(wide_E * wide_E, axis=0) / E, eps)
    tl.store(out + token * E + e, normed_E, mask=of_token)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / rms(x)` over the last dimension.

    Args:
        x: [T, E], the numbers of a token side by side.
        weight: [E], of the same dtype.
        eps: added to the mean square.

    Returns:
        [T, E], contiguous.
    """
    return _launch(x, None, weight, eps, x)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, total: Tensor) -> Tensor:
    """`rms_norm(x + residual)`; the sum is kept.

    Args:
        x: [T, E], the numbers of a token side by side.
        residual: like x.
        weight: [E], of the same dtype.
        eps: added to the mean square.
        total: [T, E], receives the sum; it may be `x` or `residual`.

    Returns:
        [T, E], contiguous.
    """
    return _launch(x, residual, weight, eps, total)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, total: Tensor
) -> Tensor:
    num_tokens, size = x.shape
    added = x if residual is None else residual
    for each in (x, added, weight, total):
        assert each.stride(-1) == 1, "the numbers of a token must lie together"
        assert each.dtype == x.dtype, f"{x.dtype} and {each.dtype} are not added"
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    block = padded(size, 1)
    _rms_norm_kernel[(num_tokens,)](
        x, added, weight, total, out, x.stride(0), added.stride(0), total.stride(0), eps,
        E=size, BLOCK_E=block, HAS_RESIDUAL=residual is not None,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out
