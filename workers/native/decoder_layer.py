"""A decoder layer in two calls around attention, on the packed linear layers of `linear.py`.

Here for decoding:

    project(hidden, positions, q, k_tokens, v_tokens, refs)
    attended = ...
    finish(hidden, attended, out=hidden)

`decode_step.py` takes all layers in one call. With tensor parallelism, sums over the ranks stand
between the parts of `Finish`; then these parts, a `PackedLinear` and an `Mlp`, are called.

Shapes: T tokens, E hidden size, F intermediate size, Hq query heads, H kv heads, D head dim.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .build import function, pointer
from .experts import NativeExperts
from .linear import NORM, Matrix, NativeNorm, PackedLinear, RMSNorm, bf16, optional_bf16


class _Projection(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("norm", NORM),
        ("query_norm", NORM),
        ("key_norm", NORM),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("query_heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
    )


class _Mlp(ctypes.Structure):
    _fields_ = (
        ("gate_up", Matrix),
        ("down", Matrix),
        ("norm", NORM),
    )


class _Finish(ctypes.Structure):
    _fields_ = (
        ("output", c_void_p),
        ("mlp", c_void_p),
        ("experts", c_void_p),
        ("after_attention", NORM),
        ("after_mlp", NORM),
    )


_LAYER = c_void_p  # the address of one of the structures
_TENSOR = c_void_p
_COUNT = c_int64

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rotate": (_LAYER, _TENSOR, _COUNT, *5 * (_TENSOR,), _COUNT),
    "project": (_LAYER, _TENSOR, _COUNT, *5 * (_TENSOR,), _COUNT),
    "mlp": (_LAYER, _TENSOR, _TENSOR, _COUNT, _TENSOR, _COUNT),
    "finish": (_LAYER, _TENSOR, _TENSOR, _COUNT, _TENSOR, _COUNT),
}


@functools.cache
def _kernel(name: str) -> Callable[..., None]:
    return function(f"saqqara_{name}", _SIGNATURES[name])


class Projection:
    """From hidden states to rotated queries and keys, and values, stored where they belong.

    Args:
        qkv: the fused layer with its norm; outputs are Hq query, H key and H value heads.
        num_query_heads: Hq.
        num_kv_heads: H.
        cos: fp32 [positions, D/2], as in `RotaryTable`.
        sin: as `cos`.
        query_norm: a norm of each query head (Qwen3), weight [D], or None.
        key_norm: the same for keys; both or none.
    """

    def __init__(
        self,
        qkv: PackedLinear,
        num_query_heads: int,
        num_kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        assert qkv.norm is not None, "the projection starts with a norm"
        num_heads = num_query_heads + 2 * num_kv_heads
        assert qkv.num_outputs == num_heads * 2 * cos.shape[-1], (qkv.num_outputs, cos.shape)
        assert (query_norm is None) == (key_norm is None), "norms of queries and keys come together"
        self.qkv = qkv
        norms = NativeNorm(query_norm), NativeNorm(key_norm)
        self._kept = (cos, sin, *norms)  # what the structure points to
        self._projection = _Projection(
            qkv.matrix,
            qkv.native_norm.structure,
            *(norm.structure for norm in norms),
            pointer(cos, torch.float32),
            pointer(sin, torch.float32),
            num_query_heads,
            num_kv_heads,
            2 * cos.shape[-1],
        )
        self.num_query_heads = num_query_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = 2 * cos.shape[-1]
        self.address = ctypes.addressof(self._projection)
        self._project = _kernel("project")
        self._rotate = _kernel("rotate")

    def __call__(
        self,
        hidden: Tensor,
        positions: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        refs: Tensor | None = None,
    ) -> None:
        """Norm, q/k/v, rotation, storage.

        Args:
            hidden: bf16 [T, E].
            positions: int64 [T], all within the tables.
            q: receives the queries, bf16 [T, Hq, D].
            k: receives the keys: bf16 [T, H, D], or with `refs` the pages as tokens [P', D].
            v: the same for values.
            refs: int64 [T, H], the rows of `k` and `v` that token and head go to
                (`AppendPlan.refs[layer]`).
        """
        self._run(self._project, hidden, positions, q, k, v, refs)

    def rope_append(
        self,
        qkv: Tensor,
        positions: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        refs: Tensor | None = None,
    ) -> None:
        """The second half of the call: from qkv bf16 [T, (Hq + 2 H) D]; see there."""
        self._run(self._rotate, qkv, positions, q, k, v, refs)

    def _run(
        self,
        kernel: Callable[..., None],
        x: Tensor,
        positions: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        refs: Tensor | None,
    ) -> None:
        rows = x.shape[0]
        assert positions.shape == (rows,), (positions.shape, rows)
        assert q.shape[0] == rows, (q.shape, rows)
        assert refs is not None or k.shape[0] == v.shape[0] == rows, (k.shape, v.shape, rows)
        kernel(
            self.address,
            bf16(x),
            rows,
            pointer(positions, torch.int64),
            None if refs is None else pointer(refs, torch.int64),
            bf16(q),
            bf16(k),
            bf16(v),
            torch.get_num_threads(),
        )


class Mlp:
    """Norm, gate and up, the gate's activation times up, down.

    Args:
        gate_up: gated, with its norm; E -> F.
        down: F -> E.
    """

    def __init__(self, gate_up: PackedLinear, down: PackedLinear) -> None:
        assert gate_up.norm is not None, "the MLP starts with a norm"
        assert gate_up.matrix.gated, "gate and up are packed as one gated layer"
        assert gate_up.num_outputs == down.num_inputs, (gate_up.num_outputs, down.num_inputs)
        self.gate_up = gate_up
        self.down = down
        self.num_inputs = gate_up.num_inputs
        self._mlp = _Mlp(gate_up.matrix, down.matrix, gate_up.native_norm.structure)
        self.address = ctypes.addressof(self._mlp)
        self._run = _kernel("mlp")

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.gate_up.num_bytes + self.down.num_bytes

    @property
    def activation_numbers(self) -> int:
        """Numbers of the temporaries, per token: normed and activated."""
        return self.gate_up.num_inputs + self.gate_up.num_outputs

    def __call__(
        self, hidden: Tensor, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The MLP of hidden [T, E], plus `residual`, bf16 [T, E]; `out` may be either of them."""
        if out is None:
            out = torch.empty_like(hidden)
        assert out.shape == (hidden.shape[0], self.down.num_outputs), out.shape
        self._run(
            self.address,
            bf16(hidden),
            optional_bf16(residual),
            hidden.shape[0],
            bf16(out),
            torch.get_num_threads(),
        )
        return out


class Finish:
    """From the output of attention to the hidden states after the layer.

    Args:
        output: the output projection, Hq D -> E.
        mlp: what follows, an MLP or experts; no norm stands behind experts.
        after_attention: norm of the projection's result before it is added, or None.
        after_mlp: the same of the MLP's.
    """

    def __init__(
        self,
        output: PackedLinear,
        mlp: Mlp | NativeExperts,
        after_attention: RMSNorm | None = None,
        after_mlp: RMSNorm | None = None,
    ) -> None:
        assert output.num_outputs == mlp.num_inputs, (output.num_outputs, mlp.num_inputs)
        has_experts = isinstance(mlp, NativeExperts)
        assert not has_experts or after_attention is after_mlp is None, "a norm behind experts"
        self.output = output
        self.mlp = mlp
        norms = NativeNorm(after_attention), NativeNorm(after_mlp)
        self._norms = norms  # what the structure points to
        self._finish = _Finish(
            ctypes.addressof(output.matrix),
            None if has_experts else mlp.address,
            mlp.address if has_experts else None,
            *(norm.structure for norm in norms),
        )
        self.address = ctypes.addressof(self._finish)
        self._run = _kernel("finish")

    def __call__(self, hidden: Tensor, attended: Tensor, out: Tensor | None = None) -> Tensor:
        """`x + mlp(x)` for `x = hidden + output(attended)`, each through its norm if it has one.

        Args:
            hidden: before the layer, bf16 [T, E].
            attended: bf16 [T, Hq, D].
            out: receives the result; may be `hidden`.
        """
        if out is None:
            out = torch.empty_like(hidden)
        assert attended.numel() == hidden.shape[0] * self.output.num_inputs, attended.shape
        self._run(
            self.address,
            bf16(attended),
            bf16(hidden),
            hidden.shape[0],
            bf16(out),
            torch.get_num_threads(),
        )
        return out
