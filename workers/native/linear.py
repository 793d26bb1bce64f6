"""Packed bf16 linear layers of a decoder layer, with what stands next to them in the same call.

A weight is packed once, when it is loaded; the packed copy serves every number of rows, from one
token to whole prompts, so the original can go. Sums are fp32. A row's result has the same bits in
every batch and with every number of threads.

A decoder layer is two calls around attention, here for decoding:

    project(hidden, positions, q, k_tokens, v_tokens, refs)
    attended = ...
    finish(hidden, attended, out=hidden)

With tensor parallelism, sums over the ranks stand between the parts of `Finish`; then these parts,
a `PackedLinear` and an `Mlp`, are called.

The kernels are in `linear.cpp`; `build.unavailable_reason` says whether they can be used.

Shapes: T tokens, E hidden size, F intermediate size, Hq query heads, H kv heads, D head dim.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .build import function, pointer

# A panel in linear.cpp: so many columns, in so many vectors; a gated layer has 16 gates and 16 ups.
_PANEL_COLUMNS = 32
_PANEL_VECTORS = 2


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("gated", c_int64),
    )


class _Projection(ctypes.Structure):
    _fields_ = (
        ("qkv", _Matrix),
        ("norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("query_heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("eps", c_float),
    )


class _Mlp(ctypes.Structure):
    _fields_ = (
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("norm", c_void_p),
        ("eps", c_float),
    )


_LAYER = c_void_p  # one of the structures
_TENSOR = c_void_p
_COUNT = c_int64

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack": (_LAYER, _TENSOR, _TENSOR, _COUNT),
    "rows": (_LAYER, _TENSOR, _COUNT, _TENSOR, _COUNT),
    "linear": (
        *(_LAYER, _TENSOR, c_float),  # matrix, norm, eps
        *(_TENSOR, _COUNT, _TENSOR, _TENSOR),  # x, rows, residual, y
        *(_COUNT, _COUNT),  # wide, threads
    ),
    "rotate": (_LAYER, _TENSOR, _COUNT, *5 * (_TENSOR,), _COUNT),
    "project": (_LAYER, _TENSOR, _COUNT, *5 * (_TENSOR,), _COUNT),
    "mlp": (_LAYER, _TENSOR, _TENSOR, _COUNT, _TENSOR, _COUNT),
    "finish": (_LAYER, _LAYER, _TENSOR, _TENSOR, _COUNT, _TENSOR, _COUNT),
}


@functools.cache
def _kernel(name: str) -> Callable[..., None]:
    return function(f"saqqara_{name}", _SIGNATURES[name])


def _bf16(tensor: Tensor) -> int:
    return pointer(tensor, torch.bfloat16)


def _optional_bf16(tensor: Tensor | None) -> int | None:
    return None if tensor is None else _bf16(tensor)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """The norm in front of a layer; weight [E]."""

    weight: Tensor
    eps: float


class PackedLinear:
    """A linear layer, with the norm in front of it or the gate behind it.

    Args:
        weight: bf16 [out, in]; if gated, [2 F, in]: all gate rows, then all up rows. Not kept.
        bias: [out], [2 F] if gated, or None.
        norm: applied to the input first, or None.
        gated: the output is `silu(gate) * up`, [T, F].

    Raises:
        NativeUnavailableError: this machine cannot run the kernels; with the reason.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: RMSNorm | None = None,
        gated: bool = False,
    ) -> None:
        columns, self.num_inputs = weight.shape
        assert columns % 2 == 0 or not gated, f"{columns} gate and up rows"
        self.num_outputs = columns // 2 if gated else columns
        self.norm = norm
        per_panel = _PANEL_COLUMNS // (_PANEL_VECTORS if gated else 1)
        num_panels = -(-self.num_outputs // per_panel)
        pairs = -(-self.num_inputs // 2)
        self._panels = torch.empty(num_panels, pairs, _PANEL_COLUMNS, 2, dtype=torch.bfloat16)
        self._bias = None
        if bias is not None:
            # In the order of the panels' columns, padded with zeros.
            parts = bias.float().view(2 if gated else 1, self.num_outputs)
            padding = num_panels * per_panel - self.num_outputs
            parts = torch.nn.functional.pad(parts, (0, padding))
            parts = parts.view(-1, num_panels, per_panel).transpose(0, 1)
            self._bias = parts.contiguous()
        self.matrix = _Matrix(
            _bf16(self._panels),
            None if self._bias is None else self._bias.data_ptr(),
            self.num_inputs,
            self.num_outputs,
            gated,
        )
        self._address = ctypes.addressof(self.matrix)
        self._norm = None if norm is None else _bf16(norm.weight)
        self._eps = 0.0 if norm is None else norm.eps
        self._run = _kernel("linear")
        _kernel("pack")(
            self._address,
            _bf16(weight.contiguous()),
            _bf16(self._panels),
            torch.get_num_threads(),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        return self._panels.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(
        self, x: Tensor, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The layer's output for x [T, in], plus `residual`; bf16 [T, out].

        `out` receives the result; it may be `residual`. A gated layer takes no residual.
        """
        assert residual is None or not self.matrix.gated, "a gated layer takes no residual"
        if out is None:
            out = x.new_empty(x.shape[0], self.num_outputs)
        self._apply(x, residual, out, _bf16(out), wide=False)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """The output in fp32, [T, out], without rounding to bf16; not for a gated layer."""
        assert not self.matrix.gated, "a gated layer has no logits"
        out = x.new_empty(x.shape[0], self.num_outputs, dtype=torch.float32)
        self._apply(x, None, out, pointer(out, torch.float32), wide=True)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, bf16 [T, in], for int64 ids [T]: the embedding of a tied head.

        Raises:
            IndexError: an id is no row's.
        """
        assert not self.matrix.gated, "the rows of a gated layer are not numbered"
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_outputs:
            raise IndexError(f"ids {ids.tolist()!s:.200} of a weight of {self.num_outputs} rows")
        out = torch.empty(len(ids), self.num_inputs, dtype=torch.bfloat16)
        _kernel("rows")(
            self._address,
            pointer(ids, torch.int64),
            len(ids),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _apply(
        self, x: Tensor, residual: Tensor | None, out: Tensor, address: int, wide: bool
    ) -> None:
        rows = x.shape[0]
        assert x.shape == (rows, self.num_inputs), (x.shape, self.num_inputs)
        assert out.shape == (rows, self.num_outputs), (out.shape, self.num_outputs)
        assert residual is None or residual.shape == out.shape, (residual.shape, out.shape)
        self._run(
            self._address,
            self._norm,
            self._eps,
            _bf16(x),
            rows,
            _optional_bf16(residual),
            address,
            wide,
            torch.get_num_threads(),
        )


class Projection:
    """From hidden states to rotated queries and keys, and values, stored where they belong.

    Args:
        qkv: the fused layer with its norm; outputs are Hq query, H key and H value heads.
        num_query_heads: Hq.
        num_kv_heads: H.
        cos: fp32 [positions, D/2], as in `RotaryTable`.
        sin: as `cos`.
        query_norm: bf16 [D], the weight of a norm of each query head (Qwen3), or None.
        key_norm: the same for keys; both or none.
    """

    def __init__(
        self,
        qkv: PackedLinear,
        num_query_heads: int,
        num_kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
    ) -> None:
        assert qkv.norm is not None, "the projection starts with a norm"
        num_heads = num_query_heads + 2 * num_kv_heads
        assert qkv.num_outputs == num_heads * 2 * cos.shape[-1], (qkv.num_outputs, cos.shape)
        assert (query_norm is None) == (key_norm is None), "norms of queries and keys come together"
        self.qkv = qkv
        self._tensors = (cos, sin, query_norm, key_norm)  # keeps what the structure points to
        self._projection = _Projection(
            qkv.matrix,
            _bf16(qkv.norm.weight),
            _optional_bf16(query_norm),
            _optional_bf16(key_norm),
            pointer(cos, torch.float32),
            pointer(sin, torch.float32),
            num_query_heads,
            num_kv_heads,
            2 * cos.shape[-1],
            qkv.norm.eps,
        )
        self._address = ctypes.addressof(self._projection)
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
            self._address,
            _bf16(x),
            rows,
            pointer(positions, torch.int64),
            None if refs is None else pointer(refs, torch.int64),
            _bf16(q),
            _bf16(k),
            _bf16(v),
            torch.get_num_threads(),
        )


class Mlp:
    """Norm, gate and up, `silu(gate) * up`, down.

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
        self._mlp = _Mlp(gate_up.matrix, down.matrix, _bf16(gate_up.norm.weight), gate_up.norm.eps)
        self.address = ctypes.addressof(self._mlp)
        self._run = _kernel("mlp")

    def __call__(
        self, hidden: Tensor, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The MLP of hidden [T, E], plus `residual`, bf16 [T, E]; `out` may be either of them."""
        if out is None:
            out = torch.empty_like(hidden)
        assert out.shape == (hidden.shape[0], self.down.num_outputs), out.shape
        self._run(
            self.address,
            _bf16(hidden),
            _optional_bf16(residual),
            hidden.shape[0],
            _bf16(out),
            torch.get_num_threads(),
        )
        return out


class Finish:
    """From the output of attention to the hidden states after the layer.

    Args:
        output: the output projection, Hq D -> E.
        mlp: what follows.
    """

    def __init__(self, output: PackedLinear, mlp: Mlp) -> None:
        assert output.num_outputs == mlp.gate_up.num_inputs, output.num_outputs
        self.output = output
        self.mlp = mlp
        self._output = ctypes.addressof(output.matrix)
        self._run = _kernel("finish")

    def __call__(self, hidden: Tensor, attended: Tensor, out: Tensor | None = None) -> Tensor:
        """`x + mlp(x)` for `x = hidden + output(attended)`.

        Args:
            hidden: before the layer, bf16 [T, E].
            attended: bf16 [T, Hq, D].
            out: receives the result; may be `hidden`.
        """
        if out is None:
            out = torch.empty_like(hidden)
        assert attended.numel() == hidden.shape[0] * self.output.num_inputs, attended.shape
        self._run(
            self._output,
            self.mlp.address,
            _bf16(attended),
            _bf16(hidden),
            hidden.shape[0],
            _bf16(out),
            torch.get_num_threads(),
        )
        return out
