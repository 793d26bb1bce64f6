"""Attention in C++ kernels for CPUs with AVX512-BF16, straight over pages and packed prompts.

Scores, softmax and sums are float32. With bfloat16 keys, the softmax weights are rounded to
bfloat16 before they meet the values, as in flash attention; masses use the unrounded weights.

A result depends on its own sequence only, to the last bit: work is cut by sequence length, and the
number of threads and the rest of the batch decide no more than who computes what.

The kernels are in `workers/native/attention_*.cpp`; without a compiler or on another CPU use the
"torch" backend, which runs everywhere.

Shapes: T packed tokens, N sequences, Hq local query heads, H local kv heads, D head dim.
"""

from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Literal, overload

import torch
from torch import Tensor

from saqqara.workers.kv.store import KVView
from saqqara.workers.native import build

from .base import CuSeqlens

_DTYPES = (torch.bfloat16, torch.float32)
_MAX_DIM = 256


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `CpuAttention` cannot be used here, or None if it can; the first call may compile."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in _DTYPES:
        return f"it computes {_DTYPES[0]} and {_DTYPES[1]}, not {dtype}"
    return build.unavailable_reason()


class CpuAttention:
    """Native kernels. Arguments and results are those of `AttentionBackend`.

    Tensors may be bfloat16 or float32, all the same. The heads of one token must lie together; a
    token may have other things next to it, as in a fused qkv projection. Head dims up to 256.

    Raises:
        NativeUnavailableError: the kernels cannot be used on this machine; with the reason.
    """

    name = "cpu"

    def __init__(self) -> None:
        pointers, sizes = (c_void_p,), (c_int,)
        strides = (c_int64,)
        self._attend = build.function(
            "saqqara_attend",
            (c_int, *pointers * 10, *sizes * 6, *strides * 3, c_float, c_int),
        )
        self._decode = build.function(
            "saqqara_decode",
            (c_int, *pointers * 8, *sizes * 7, *strides, c_float, c_int),
        )
        self._mass = build.function(
            "saqqara_mass",
            (c_int, *pointers * 4, c_int64, c_int64, *sizes * 3, *strides * 2, c_float, c_int),
        )

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float
    ) -> Tensor:
        """Causal attention of the last queries of each sequence over its keys."""
        lengths = zip(cu_q.lengths, cu_k.lengths, strict=True)
        assert all(queries <= keys for queries, keys in lengths), "more queries than keys"
        return self._attend_new(q, k, v, cu_q, cu_k, None, scale)

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, view: KVView, scale: float
    ) -> Tensor:
        """Attention of new tokens over what their rows keep, then over the new ones up to each."""
        return self._attend_new(q, k, v, cu, cu, view, scale)

    def _attend_new(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        view: KVView | None,
        scale: float,
    ) -> Tensor:
        """Queries over the kept tokens of `view`, if there is one, and causally over k and v."""
        _check(q, k, v)
        assert scale > 0, f"the scale of the scores must be positive, not {scale}"
        q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
        (_, num_query_heads, dim), num_heads = q.shape, k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype)
        self._attend(
            q.dtype == torch.bfloat16,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            build.pointer(cu_q.device, torch.int32),
            build.pointer(cu_k.device, torch.int32),
            *((None,) * 4 if view is None else _view_pointers(view, q.dtype)),
            len(cu_q.host) - 1,
            num_heads,
            num_query_heads // num_heads,
            dim,
            1 if view is None else view.page_tokens,
            0 if view is None else view.page_table.shape[-1],
            q.stride(0),
            k.stride(0),
            v.stride(0),
            scale,
            torch.get_num_threads(),
        )
        return out

    @overload
    def decode(
        self, q: Tensor, view: KVView, scale: float, return_mass: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def decode(
        self, q: Tensor, view: KVView, scale: float, return_mass: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def decode(
        self, q: Tensor, view: KVView, scale: float, return_mass: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one query per sequence over what its rows keep, read once from the pages."""
        _check(q)
        assert scale > 0, f"the scale of the scores must be positive, not {scale}"
        q = _heads_together(q)
        (num_sequences, num_heads), (_, num_query_heads, dim) = view.lengths.shape, q.shape
        out = torch.empty(q.shape, dtype=q.dtype)
        mass = weights = None
        if return_mass:
            mass = torch.empty(num_sequences, num_heads, view.max_length)
            weights = torch.empty(num_sequences, num_query_heads, view.max_length)
        self._decode(
            q.dtype == torch.bfloat16,
            q.data_ptr(),
            out.data_ptr(),
            None if mass is None else mass.data_ptr(),
            None if weights is None else weights.data_ptr(),
            *_view_pointers(view, q.dtype),
            num_sequences,
            num_heads,
            num_query_heads // num_heads,
            dim,
            view.page_tokens,
            view.page_table.shape[-1],
            view.max_length,
            q.stride(0),
            scale,
            torch.get_num_threads(),
        )
        return out if mass is None else (out, mass)

    def mass(
        self, q_window: Tensor, k: Tensor, scale: float, query_weights: Tensor | None = None
    ) -> Tensor:
        """Attention that each key gets from the last queries, summed over them and the group."""
        _check(q_window, k)
        assert scale > 0, f"the scale of the scores must be positive, not {scale}"
        q, k = _heads_together(q_window), _heads_together(k)
        (num_queries, num_query_heads, dim), (num_keys, num_heads, _) = q.shape, k.shape
        assert num_queries <= num_keys, f"{num_queries} queries of {num_keys} tokens"
        if query_weights is not None:
            query_weights = query_weights.to(torch.float32).contiguous()
            assert query_weights.shape == (num_queries,), query_weights.shape
        mass = torch.empty(num_heads, num_keys)
        self._mass(
            q.dtype == torch.bfloat16,
            q.data_ptr(),
            k.data_ptr(),
            None if query_weights is None else query_weights.data_ptr(),
            mass.data_ptr(),
            num_queries,
            num_keys,
            num_heads,
            num_query_heads // num_heads,
            dim,
            q.stride(0),
            k.stride(0),
            scale,
            torch.get_num_threads(),
        )
        return mass


def _check(q: Tensor, *others: Tensor) -> None:
    """Assert what the kernels take for granted about queries, and about keys and values."""
    dim = q.shape[-1]
    assert q.dtype in _DTYPES, f"the cpu attention backend has no kernels for {q.dtype}"
    assert dim <= _MAX_DIM, f"head_dim {dim} is more than {_MAX_DIM}"
    assert q.dtype == torch.float32 or dim % 2 == 0, f"head_dim {dim} is odd, in bfloat16"
    for x in (q, *others):
        assert x.device.type == "cpu", f"the tensor is on {x.device}"
        assert x.dtype == q.dtype, f"queries are {q.dtype}, keys or values {x.dtype}"
        assert x.shape[-1] == dim, f"queries have head_dim {dim}, keys or values {x.shape[-1]}"


def _heads_together(x: Tensor) -> Tensor:
    """The tensor [T, heads, D], copied unless the numbers of one token lie side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _view_pointers(view: KVView, dtype: torch.dtype) -> tuple[int, int, int, int]:
    return (
        build.pointer(view.k_pages, dtype),
        build.pointer(view.v_pages, dtype),
        build.pointer(view.page_table, torch.int32),
        build.pointer(view.lengths, torch.int32),
    )
