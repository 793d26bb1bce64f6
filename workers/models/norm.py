"""RMS norm, with the roundings of Hugging Face: fp32 inside, cast, then the weight."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / rms(x)` over the last dimension; x [..., E], weight [E], a new tensor as `x`.

    On CUDA one fused kernel, which multiplies by the weight before it casts.
    """
    if x.is_cuda:
        fused: torch.Tensor = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        return fused
    wide = x.float()
    # One pass and no squares in memory: on a CPU large temporaries cost more than arithmetic.
    scale: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)
