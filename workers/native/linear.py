"""Packed bf16 linear layers, with the norm in front of them or the gate behind them.

A weight is packed once, when it is loaded; the packed copy serves every number of rows, from one
token to whole prompts, so the original can go. Sums are fp32. A row's result has the same bits in
every batch and with every number of threads.

The kernels are in `linear.cpp`; `build.unavailable_reason` says whether they can be used. A whole
decoder layer in two calls is `decoder_layer.py`.

Shapes: T tokens, E hidden size, F intermediate size.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .build import function, pointer

# A panel in linear.cpp: so many columns, in so many vectors; a gated layer has 16 gates and 16 ups.
_PANEL_COLUMNS = 32
_PANEL_VECTORS = 2
Gate = Literal["silu", "gelu_tanh"]
_GATES: dict[Gate | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}  # `Gate` in linear_product.h


class Matrix(ctypes.Structure):
    """A packed weight, as the kernels take it."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("gated", c_int64),
    )


_MATRIX = c_void_p  # its address
_TENSOR = c_void_p
_COUNT = c_int64

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack": (_MATRIX, _TENSOR, _TENSOR, _COUNT),
    "rows": (_MATRIX, _TENSOR, _COUNT, _TENSOR, _COUNT),
    "linear": (
        *(_MATRIX, c_void_p),  # matrix, norm
        *(_TENSOR, _COUNT, _TENSOR, _TENSOR),  # x, rows, residual, y
        *(_COUNT, _COUNT),  # wide, threads
    ),
}


@functools.cache
def _kernel(name: str) -> Callable[..., None]:
    return function(f"saqqara_{name}", _SIGNATURES[name])


def bf16(tensor: Tensor) -> int:
    """Address of a bf16 tensor."""
    return pointer(tensor, torch.bfloat16)


def optional_bf16(tensor: Tensor | None) -> int | None:
    """The same, or None for no tensor."""
    return None if tensor is None else bf16(tensor)


class _Norm(ctypes.Structure):
    """`Norm` of linear_product.h."""

    _fields_ = (("weight", c_void_p), ("is_wide", c_int64), ("eps", c_float))


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """A norm; weight [E] in bf16, or in fp32 where nothing is rounded before it (see `norm.py`)."""

    weight: Tensor
    eps: float


class NativeNorm:
    """A norm as the kernels take it, or none.

    Attributes:
        structure: `Norm` of linear_product.h; it points to what this object keeps.
    """

    def __init__(self, norm: RMSNorm | None) -> None:
        self._weight = None if norm is None else norm.weight.float().contiguous()
        self.structure = _Norm(None, False, 0.0)
        if norm is not None and self._weight is not None:
            is_wide = norm.weight.dtype == torch.float32
            self.structure = _Norm(pointer(self._weight, torch.float32), is_wide, norm.eps)


NORM: type[ctypes.Structure] = _Norm


class PackedLinear:
    """A linear layer, with the norm in front of it or the gate behind it.

    Args:
        weight: bf16 [out, in]; if gated, [2 F, in]: all gate rows, then all up rows. Not kept.
        bias: [out], [2 F] if gated, or None.
        norm: applied to the input first, or None.
        gated: what opens the gate, if there is one: the output is `gated(gate) * up`, [T, F].

    Raises:
        NativeUnavailableError: this machine cannot run the kernels; with the reason.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: RMSNorm | None = None,
        gated: Gate | None = None,
    ) -> None:
        columns, self.num_inputs = weight.shape
        assert columns % 2 == 0 or gated is None, f"{columns} gate and up rows"
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
        self.matrix = Matrix(
            bf16(self._panels),
            None if self._bias is None else self._bias.data_ptr(),
            self.num_inputs,
            self.num_outputs,
            _GATES[gated],
        )
        self._address = ctypes.addressof(self.matrix)
        self.native_norm = NativeNorm(norm)
        self._norm = ctypes.addressof(self.native_norm.structure)
        self._run = _kernel("linear")
        _kernel("pack")(
            self._address,
            bf16(weight.contiguous()),
            bf16(self._panels),
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
        self._apply(x, residual, out, bf16(out), wide=False)
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
            bf16(x),
            rows,
            optional_bf16(residual),
            address,
            wide,
            torch.get_num_threads(),
        )
