"""RMS norm, with the roundings of Hugging Face: fp32 inside, cast, then the weight.

Gemma's checkpoints hold `weight - 1`, and its products are fp32: such weights are kept in fp32.
"""

import torch

from .weights import WeightSource


def read_norm(source: WeightSource, name: str, offset: float) -> torch.Tensor:
    """A norm's weight [E]; with an offset (of 1, in Gemma's checkpoints) it is fp32."""
    weight = source.read(name)
    return weight.float().add_(offset) if offset else weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / rms(x)` over the last dimension; x [..., E], weight [E], a new tensor as `x`.

    An fp32 weight is multiplied before the result is cast. So does the fused kernel on CUDA.
    """
    if x.is_cuda and weight.dtype == x.dtype:
        fused: torch.Tensor = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        return fused
    wide = x.float()
    # One pass and no squares in memory: on a CPU large temporaries cost more than arithmetic.
    scale: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if weight.dtype != x.dtype:
        return (wide * scale).mul_(weight).to(x.dtype)
    return (wide * scale).to(x.dtype).mul_(weight)
