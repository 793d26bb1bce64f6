"""Causal attention of whole prompts over themselves on a GPU, by the best kernel that is there.

Shapes: T packed tokens, N sequences, Hq query heads, H kv heads, D head dim.
"""

import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import CuSeqlens
from .sdpa import TorchAttention

logger = logging.getLogger(__name__)

Fresh = Callable[[Tensor, Tensor, Tensor, CuSeqlens, float], Tensor]

_HALF = (torch.bfloat16, torch.float16)
_DIM_MULTIPLE = 8  # of flash attention's kernels
_MAX_DIM = 256


class FreshAttention:
    """Attention of packed prompts, q [T, Hq, D] over k and v [T, H, D].

    The kernel is chosen, and logged with the reason, when the first prompt comes.
    """

    def __init__(self) -> None:
        self._chosen: dict[tuple[str, torch.dtype, int], Fresh] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, scale: float) -> Tensor:
        """[T, Hq, D], of the queries' dtype."""
        kind = (q.device.type, q.dtype, q.shape[-1])
        if kind not in self._chosen:
            name, fresh, reason = choose(q.device, q.dtype, q.shape[-1])
            logger.info("prefill attention: %s (%s)", name, reason)
            self._chosen[kind] = fresh
        return self._chosen[kind](q, k, v, cu, scale)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, Fresh, str]:
    """Name of the kernel to take, the kernel, and why it is this one."""
    reason = _no_flash(device, dtype, head_dim)
    if reason is not None:
        return "torch SDPA, one sequence at a time", _sdpa(), reason
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return "flash-attn", _flash(flash_attn_varlen_func), "auto: it is installed"
    varlen = _torch_varlen()
    if varlen is None:
        reason = "auto: neither flash-attn nor torch.nn.attention.varlen is there"
    elif (problem := _problem(varlen, device, dtype, head_dim)) is not None:
        reason = f"auto: flash-attn is not installed, torch's varlen kernel fails ({problem})"
    else:
        return "torch varlen", varlen, "auto: flash-attn is not installed"
    return "torch SDPA, one sequence at a time", _sdpa(), reason


def _no_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no flash attention kernel computes this, or None if one does."""
    if device.type != "cuda":
        return f"auto: flash attention is for GPUs, this is {device.type}"
    if dtype not in _HALF:
        return f"auto: flash attention does not compute {str(dtype).removeprefix('torch.')}"
    if head_dim % _DIM_MULTIPLE or head_dim > _MAX_DIM:
        return f"auto: flash attention has no kernel for head_dim {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"auto: flash attention needs compute capability 8.0, this is {capability}"
    return None


def _flash(function: Callable[..., Any]) -> Fresh:
    def fresh(q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, scale: float) -> Tensor:
        bounds = (cu.device, cu.device, cu.max_len, cu.max_len)
        out: Tensor = function(q, k, v, *bounds, softmax_scale=scale, causal=True)
        return out

    return fresh


def _torch_varlen() -> Fresh | None:
    """Torch's own packed attention, or None where this torch has none that is causal and scaled."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None
    # Before torch 2.12 there is no such flag, and groups of query heads need none.
    grouped = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    causal = {"window_size": (-1, 0)}  # everything before, nothing after
    call: Callable[..., Any] = varlen_attn

    def fresh(q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, scale: float) -> Tensor:
        bounds = (cu.device, cu.device, cu.max_len, cu.max_len)
        out: Tensor = call(q, k, v, *bounds, scale=scale, **causal, **grouped)
        return out

    return fresh


def _problem(fresh: Fresh, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kernel cannot attend with a group of two query heads here, or None if it can."""
    q = torch.zeros(2, 2, head_dim, dtype=dtype, device=device)
    try:
        fresh(q, q[:, :1].contiguous(), q[:, :1].contiguous(), CuSeqlens.of([2], device), 1.0)
    except (RuntimeError, TypeError) as error:
        return str(error).split("\n", 1)[0]
    return None


def _sdpa() -> Fresh:
    torch_attention = TorchAttention()

    def fresh(q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, scale: float) -> Tensor:
        return torch_attention.prefill(q, k, v, cu, cu, scale)[0]

    return fresh
