"""Attention in C++ kernels for CPUs with AVX512-BF16, straight over pages and packed prompts.

Scores, softmax and sums are float32. With bfloat16 keys, the softmax weights are rounded to
bfloat16 before they meet the values, as in flash attention; masses use the unrounded weights.

A result depends on its own sequence only, to the last bit: work is cut by sequence length, and the
number of threads and the rest of the batch decide no more than who computes what.

The kernels are in `workers/native/attention_*.cpp`; without a compiler or on another CPU use the
"torch" backend, which runs everywhere.

Shapes: T packed tokens, N sequences, Hq local query heads, H local kv heads, D head dim.
"""

from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from saqqara.workers.kv.view import KVView
from saqqara.workers.native import build

from .base import CuSeqlens

_DTYPES = (torch.bfloat16, torch.float32)
_MAX_DIM = 256


class _Attend(Structure):
    """`AttendArguments` of attention_prefill.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse", "cu_q", "cu_k")),
        *((name, c_void_p) for name in ("k_pages", "v_pages", "page_table", "kept")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, c_int) for name in ("num_sequences", "num_heads", "group", "dim")),
        *((name, c_int) for name in ("page_tokens", "max_pages", "is_bf16", "num_threads")),
        ("window", c_int),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class _Decode(Structure):
    """`Arguments` of attention_decode.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "out", "mass", "weights", "lse")),
        *((name, c_void_p) for name in ("k_pages", "v_pages", "page_table", "lengths")),
        ("q_stride", c_int64),
        *((name, c_int) for name in ("num_sequences", "num_heads", "group", "dim")),
        *((name, c_int) for name in ("page_tokens", "max_pages", "max_length")),
        *((name, c_int) for name in ("is_bf16", "num_threads")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class _Mass(Structure):
    """`Arguments` of attention_mass.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "lse", "query_weights", "mass")),
        *((name, c_int64) for name in ("q_stride", "k_stride")),
        *((name, c_int64) for name in ("num_queries", "num_keys", "num_columns")),
        *((name, c_int) for name in ("num_heads", "group", "dim", "is_bf16", "num_threads")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `CpuAttention` cannot be used here, or None if it can; the first call may compile."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in _DTYPES:
        return f"it computes {_DTYPES[0]} and {_DTYPES[1]}, not {dtype}"
    return build.unavailable_reason()


class CpuAttention:
    """Native kernels. Arguments and results are those of `AttentionBackend`.

    Tensors may be bfloat16 or float32, all the same. The heads of one token must lie together (or
    they are copied); a token may have other things next to it, as in a fused qkv projection. Head
    dims go up to 256; in bfloat16 they are even. The scale is positive.

    Raises:
        NativeUnavailableError: the kernels cannot be used on this machine; with the reason.
    """

    name = "cpu"

    def __init__(self, softcap: float = 0.0) -> None:
        self.softcap = softcap
        self._attend = build.function("saqqara_attend", (POINTER(_Attend),))
        self._decode = build.function("saqqara_decode", (POINTER(_Decode),))
        self._mass = build.function("saqqara_mass", (POINTER(_Mass),))

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of the last queries of each sequence over its keys."""
        lengths = zip(cu_q.lengths, cu_k.lengths, strict=True)
        assert all(queries <= keys for queries, keys in lengths), "more queries than keys"
        lse = torch.empty(q.shape[:2])
        out = self._attend_new(q, k, v, cu_q, cu_k, None, scale, lse, window)
        return out, lse

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
        lse: Tensor | None = None,
        window: int = 0,
    ) -> Tensor:
        """Queries over the kept tokens of `view`, if there is one, and causally over k and v."""
        _check(scale, q, k, v)
        q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        arguments = self._arguments(q, k, cu_q, cu_k, scale, lse)
        arguments.window = window
        arguments.v, arguments.v_stride, arguments.out = v.data_ptr(), v.stride(0), out.data_ptr()
        if view is not None:
            arguments.k_pages = build.pointer(view.k_pages, q.dtype)
            arguments.v_pages = build.pointer(view.v_pages, q.dtype)
            arguments.page_table = build.pointer(view.page_table, torch.int32)
            arguments.kept = build.pointer(view.lengths, torch.int32)
            arguments.page_tokens = view.page_tokens
            arguments.max_pages = view.page_table.shape[-1]
        self._attend(byref(arguments))
        return out

    def decode(self, q: Tensor, view: KVView, scale: float) -> Tensor:
        """Attention of one query per sequence over what its rows keep, read once from the pages."""
        return self._attend_rows(q, view, scale)

    def decode_and_lse(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the normaliser of each query's softmax."""
        lse = torch.empty(q.shape[:2])
        return self._attend_rows(q, view, scale, lse=lse), lse

    def decode_and_mass(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the attention that every kept token got."""
        mass = torch.empty(*view.lengths.shape, view.max_length)
        return self._attend_rows(q, view, scale, mass), mass

    def _attend_rows(
        self,
        q: Tensor,
        view: KVView,
        scale: float,
        mass: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Attention of one query per sequence.

        Writes what each token got into `mass`, and the normalisers into `lse`.
        """
        _check(scale, q)
        q = _heads_together(q)
        (num_sequences, num_heads), (_, num_query_heads, dim) = view.lengths.shape, q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        arguments = _Decode(
            q=q.data_ptr(),
            out=out.data_ptr(),
            k_pages=build.pointer(view.k_pages, q.dtype),
            v_pages=build.pointer(view.v_pages, q.dtype),
            page_table=build.pointer(view.page_table, torch.int32),
            lengths=build.pointer(view.lengths, torch.int32),
            q_stride=q.stride(0),
            num_sequences=num_sequences,
            num_heads=num_heads,
            group=num_query_heads // num_heads,
            dim=dim,
            page_tokens=view.page_tokens,
            max_pages=view.page_table.shape[-1],
            max_length=view.max_length,
            is_bf16=q.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
            scale=scale,
            softcap=self.softcap,
        )
        if mass is not None:
            weights = torch.empty(num_sequences, num_query_heads, view.max_length)
            arguments.mass, arguments.weights = mass.data_ptr(), weights.data_ptr()
        if lse is not None:
            arguments.lse = lse.data_ptr()
        self._decode(byref(arguments))
        return out

    def mass(
        self,
        q_window: Tensor,
        k: Tensor,
        scale: float,
        query_weights: Tensor | None = None,
        lse: Tensor | None = None,
        num_columns: int | None = None,
    ) -> Tensor:
        """Attention that each key gets from the last queries, summed over them and the group."""
        _check(scale, q_window, k)
        q, k = _heads_together(q_window), _heads_together(k)
        (num_queries, num_query_heads, dim), (num_keys, num_heads, _) = q.shape, k.shape
        assert 0 < num_queries <= num_keys, f"{num_queries} queries of {num_keys} tokens"
        num_columns = num_keys if num_columns is None else num_columns
        assert 0 <= num_columns <= num_keys, f"{num_columns} columns of {num_keys} keys"
        if lse is None:
            lse = self._log_sum_exps(q, k, scale)
        assert lse.shape == q.shape[:2], f"log-sum-exps {lse.shape} of queries {q.shape}"
        mass = torch.empty(num_heads, num_columns)
        arguments = _Mass(
            q=q.data_ptr(),
            k=k.data_ptr(),
            lse=build.pointer(lse, torch.float32),
            mass=mass.data_ptr(),
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            num_queries=num_queries,
            num_keys=num_keys,
            num_columns=num_columns,
            num_heads=num_heads,
            group=num_query_heads // num_heads,
            dim=dim,
            is_bf16=q.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
            scale=scale,
            softcap=self.softcap,
        )
        if query_weights is not None:
            assert query_weights.shape == (num_queries,), query_weights.shape
            query_weights = query_weights.to(torch.float32).contiguous()
            arguments.query_weights = query_weights.data_ptr()
        self._mass(byref(arguments))
        return mass

    def normalisers(self, q_window: Tensor, k: Tensor, scale: float) -> Tensor:
        """The normalisers of the last queries of one sequence."""
        _check(scale, q_window, k)
        return self._log_sum_exps(_heads_together(q_window), _heads_together(k), scale)

    def _log_sum_exps(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Of the last queries [w, Hq, D] of one sequence with keys [n, H, D]: float32 [w, Hq]."""
        cu_q, cu_k = (CuSeqlens.of([len(x)], q.device) for x in (q, k))
        lse = torch.empty(q.shape[:2])
        self._attend(byref(self._arguments(q, k, cu_q, cu_k, scale, lse)))
        return lse

    def _arguments(
        self,
        q: Tensor,
        k: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        scale: float,
        lse: Tensor | None,
    ) -> _Attend:
        """Arguments without values and without pages: what makes the log-sum-exps only."""
        (_, num_query_heads, dim), num_heads = q.shape, k.shape[1]
        return _Attend(
            q=q.data_ptr(),
            k=k.data_ptr(),
            lse=None if lse is None else lse.data_ptr(),
            cu_q=build.pointer(cu_q.device, torch.int32),
            cu_k=build.pointer(cu_k.device, torch.int32),
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            num_sequences=len(cu_q.host) - 1,
            num_heads=num_heads,
            group=num_query_heads // num_heads,
            dim=dim,
            page_tokens=1,
            is_bf16=q.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
            scale=scale,
            softcap=self.softcap,
        )


def _check(scale: float, q: Tensor, *others: Tensor) -> None:
    """Assert what the kernels take for granted about the scale, the queries, keys and values."""
    dim, dtype = q.shape[-1], q.dtype
    assert scale > 0, f"the scale of the scores must be positive, not {scale}"
    assert dtype in _DTYPES, f"the cpu attention backend has no kernels for {dtype}"
    assert dim <= _MAX_DIM, f"head_dim {dim} is more than {_MAX_DIM}"
    assert dtype == torch.float32 or dim % 2 == 0, f"head_dim {dim} is odd, in {dtype}"
    assert q.is_cpu, f"the queries are on {q.device}"
    for x in others:
        assert x.is_cpu, f"keys or values are on {x.device}"
        assert x.dtype == dtype, f"queries are {dtype}, keys or values {x.dtype}"
        assert x.shape[-1] == dim, f"queries have head_dim {dim}, keys or values {x.shape[-1]}"


def _heads_together(x: Tensor) -> Tensor:
    """The tensor [T, heads, D], copied unless the numbers of one token lie side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
