"""Causal attention of whole prompts over themselves on a GPU, by the best kernel that is there.

Shapes: T packed tokens, N sequences, Hq query heads, H kv heads, D head dim.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import CuSeqlens
from .sdpa import TorchAttention

logger = logging.getLogger(__name__)

# Of q, k, v, where prompts begin, scale, window and soft-cap of scores; the last two 0 for none.
Fresh = Callable[[Tensor, Tensor, Tensor, CuSeqlens, float, int, float], Tensor]

_HALF = (torch.bfloat16, torch.float16)
_DIM_MULTIPLE = 8  # of flash attention's kernels
_MAX_DIM = 256
_PLAIN = "torch SDPA, one sequence at a time"
_OURS = "our kernel of extension"
_PROBED_TOKENS = (33, 20)
_PROBED_WINDOW = 7
_PROBE_TOLERANCE = 2**-5  # of outputs below 1 in 16 bits
# What a kernel raises that lacks a head_dim, a group, an argument or its own library.
_REFUSALS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kernel has to compute: its choice holds for all prompts of one kind."""

    device: torch.device
    dtype: torch.dtype
    num_queries: int
    num_heads: int
    head_dim: int
    windowed: bool = False
    softcap: float = 0.0


class FreshAttention:
    """Attention of packed prompts, q [T, Hq, D] over k and v [T, H, D].

    The kernel is chosen, and logged with the reason, when the first prompt comes; and once more for
    prompts longer than a window.

    Args:
        softcap: of the scores; 0: they have none.
    """

    def __init__(self, softcap: float = 0.0) -> None:
        self._softcap = softcap
        self._chosen: dict[Kind, Fresh] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, scale: float, window: int = 0
    ) -> Tensor:
        """[T, Hq, D], of the queries' dtype; `window` as for `AttentionBackend.prefill`."""
        heads = (q.shape[1], k.shape[1], q.shape[2])
        kind = Kind(q.device, q.dtype, *heads, window > 0, self._softcap)
        if kind not in self._chosen:
            name, fresh, reason = choose(kind)
            what = "prefill attention of windows" if window else "prefill attention"
            logger.info("%s: %s (%s)", what, name, reason)
            self._chosen[kind] = fresh
        return self._chosen[kind](q, k, v, cu, scale, window, self._softcap)


def choose(kind: Kind) -> tuple[str, Fresh, str]:
    """Name of the kernel to take, the kernel, and why it is this one and none before it."""
    last = (_OURS, _ours) if kind.windowed or kind.softcap else (_PLAIN, _sdpa())
    reason = _no_flash(kind)
    if reason is not None:
        return *last, reason
    passed_over: list[str] = []
    for name, make in _CANDIDATES.items():
        problem = "it does not fit this GPU" if name in _unfit(kind) else None
        if problem is None:
            try:
                fresh = make()
                problem = _problem(fresh, kind)
            except _REFUSALS as error:
                problem = _first_line(error)
        if problem is None:
            return name, fresh, "; ".join(["auto: it computes right", *passed_over])
        passed_over.append(f"not {name}: {problem}")
    return *last, "; ".join(["auto", *passed_over])


def _no_flash(kind: Kind) -> str | None:
    """Why no flash attention kernel computes this, or None if one may."""
    if kind.device.type != "cuda":
        return f"auto: flash attention is for GPUs, this is {kind.device.type}"
    if kind.dtype not in _HALF:
        return f"auto: flash attention does not compute {str(kind.dtype).removeprefix('torch.')}"
    if kind.head_dim % _DIM_MULTIPLE or kind.head_dim > _MAX_DIM:
        return f"auto: flash attention has no kernel for head_dim {kind.head_dim}"
    capability = torch.cuda.get_device_capability(kind.device)
    if capability < (8, 0):
        return f"auto: flash attention needs compute capability 8.0, this is {capability}"
    return None


def _unfit(kind: Kind) -> tuple[str, ...]:
    """Kernels that would run into instructions which this GPU has not."""
    if kind.device.type == "cuda" and torch.cuda.get_device_capability(kind.device)[0] != 9:
        return ("flash-attn 3",)
    return ()


def _flash_3() -> Fresh:
    return _flash(importlib.import_module("flash_attn_interface").flash_attn_varlen_func)


def _flash_2() -> Fresh:
    return _flash(importlib.import_module("flash_attn").flash_attn_varlen_func)


def _flash(function: Callable[..., Any]) -> Fresh:
    def fresh(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: CuSeqlens,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        bounds = (cu.device, cu.device, cu.max_len, cu.max_len)
        more: dict[str, Any] = {"window_size": (window - 1, 0)} if window else {}
        more |= {"softcap": softcap} if softcap else {}
        out = function(q, k, v, *bounds, softmax_scale=scale, causal=True, **more)
        first: Tensor = out[0] if isinstance(out, tuple) else out  # some versions add normalisers
        return first

    return fresh


def _cudnn() -> Fresh:
    """Torch's SDPA in cuDNN's kernels, one sequence at a time."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def fresh(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: CuSeqlens,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        if window or softcap:
            raise ValueError("it has neither windows nor capped scores")
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        is_grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for start, stop in zip(cu.host, cu.host[1:], strict=False):
                one_q, one_k, one_v = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
                attended = scaled_dot_product_attention(
                    one_q, one_k, one_v, is_causal=True, scale=scale, enable_gqa=is_grouped
                )
                out[start:stop] = attended[0].transpose(0, 1)
        return out

    return fresh


def _torch_varlen() -> Fresh:
    """Torch's own packed attention.

    Raises:
        ImportError: this torch has none that is causal and scaled.
    """
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise ImportError("this torch has no torch.nn.attention.varlen")
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        raise ImportError("this torch's varlen_attn is not causal or not scaled")
    # Before torch 2.12 there is no such flag, and groups of query heads need none.
    grouped = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    call: Callable[..., Any] = varlen_attn

    def fresh(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: CuSeqlens,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        if softcap:
            raise ValueError("it has no capped scores")
        bounds = (cu.device, cu.device, cu.max_len, cu.max_len)
        causal = (window - 1, 0)  # so many before, or all: -1; nothing after
        out: Tensor = call(q, k, v, *bounds, scale=scale, window_size=causal, **grouped)
        return out

    return fresh


_CANDIDATES: dict[str, Callable[[], Fresh]] = {  # in the order in which they are tried
    "flash-attn 3": _flash_3,
    "flash-attn 2": _flash_2,
    "cuDNN SDPA": _cudnn,
    "torch varlen": _torch_varlen,
}


def _problem(fresh: Fresh, kind: Kind) -> str | None:
    """What is wrong with what a kernel computes for two short prompts, or None if nothing is.

    Raises what the kernel does.
    """
    generator = torch.Generator().manual_seed(0)
    num_tokens, dim = sum(_PROBED_TOKENS), kind.head_dim

    def tensor(num_heads: int) -> Tensor:
        numbers = torch.randn(num_tokens, num_heads, dim, generator=generator)
        return numbers.to(kind.device, kind.dtype)

    q, k, v = tensor(kind.num_queries), tensor(kind.num_heads), tensor(kind.num_heads)
    cu, scale = CuSeqlens.of(_PROBED_TOKENS, kind.device), dim**-0.5
    how = (cu, scale, _PROBED_WINDOW if kind.windowed else 0, kind.softcap)
    expected = _sdpa()(q.float(), k.float(), v.float(), *how)
    deviation = float((fresh(q, k, v, *how).float() - expected).abs().max())
    if deviation <= _PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
        return None
    return f"its outputs are {deviation:.2g} off"


def _first_line(error: BaseException) -> str:
    """The error in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _sdpa() -> Fresh:
    backend = functools.cache(lambda softcap: TorchAttention(softcap=softcap))

    def fresh(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: CuSeqlens,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        return backend(softcap).prefill(q, k, v, cu, cu, scale, window)[0]

    return fresh


def _ours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: CuSeqlens,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    from saqqara.workers.kernels.attend import attend

    bounds = (cu.device, cu.device, cu.max_len)
    return attend(q, k, v, *bounds, scale, window=window, softcap=softcap)
