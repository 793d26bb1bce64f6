"""Mixture of experts on the packed linear layers of `linear.py`; the kernels are in `experts.h`.

Shapes: T tokens, E hidden size, N experts, K experts of a token, F channels of an expert.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import function
from .linear import NORM, Matrix, NativeNorm, PackedLinear, RMSNorm, bf16, optional_bf16


class _Experts(ctypes.Structure):
    """`Experts` of experts.h."""

    _fields_ = (
        ("router", Matrix),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("shared_gate_up", Matrix),
        ("shared_down", Matrix),
        ("norm", NORM),
        *((name, c_int64) for name in ("num_experts", "per_token", "is_normalised")),
    )


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """An expert: a gated layer, E -> F, and one back to E."""

    gate_up: PackedLinear
    down: PackedLinear

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.gate_up.num_bytes + self.down.num_bytes


class NativeExperts:
    """All experts of a layer, with the norm in front of them.

    Args:
        norm: of the hidden states.
        router: bf16 [N, E]; with a shared expert [N + 1, E], the last row being its gate's.
        experts: the N of them, of one size.
        shared: the expert that all tokens go through, or None.
        per_token: K.
        is_normalised: whether the shares of a token's experts are made to sum to 1.
    """

    def __init__(
        self,
        norm: RMSNorm,
        router: Tensor,
        experts: Sequence[PackedMlp],
        shared: PackedMlp | None,
        per_token: int,
        is_normalised: bool,
    ) -> None:
        assert len(router) == len(experts) + (shared is not None), (len(router), len(experts))
        assert 1 <= per_token <= len(experts), (per_token, len(experts))
        self._router, self._norm = PackedLinear(router), NativeNorm(norm)
        self._experts, self._shared, self._per_token = experts, shared, per_token
        self._matrices = [
            (Matrix * len(experts))(*matrices)
            for matrices in (
                [expert.gate_up.matrix for expert in experts],
                [expert.down.matrix for expert in experts],
            )
        ]
        gate_up, down = (ctypes.addressof(matrices) for matrices in self._matrices)
        none = Matrix(None, None, 0, 0, 0)
        self._structure = _Experts(
            self._router.matrix,
            gate_up,
            down,
            none if shared is None else shared.gate_up.matrix,
            none if shared is None else shared.down.matrix,
            self._norm.structure,
            len(experts),
            per_token,
            is_normalised,
        )
        self.address = ctypes.addressof(self._structure)
        kinds = (*3 * (c_void_p,), c_int64, c_void_p, c_int64)
        self._run = function("saqqara_experts", kinds)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        mlps = (*self._experts, *(() if self._shared is None else (self._shared,)))
        total: int = self._router.num_bytes + sum(mlp.num_bytes for mlp in mlps)
        return total

    @property
    def num_inputs(self) -> int:
        """E."""
        hidden: int = self._router.num_inputs
        return hidden

    @property
    def activation_numbers(self) -> int:
        """Numbers of the temporaries, per token."""
        hidden, inner = self._router.num_inputs, self._experts[0].gate_up.num_outputs
        routed = self._per_token * (2 * hidden + inner)
        shared = 0 if self._shared is None else self._shared.gate_up.num_outputs + hidden
        numbers: int = hidden + 2 * self._router.num_outputs + routed + shared
        return numbers

    def __call__(
        self, hidden: Tensor, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The experts' sum for hidden [T, E], plus `residual`, bf16 [T, E]; `out` may be either."""
        out = torch.empty_like(hidden) if out is None else out
        assert out.shape == hidden.shape == (len(hidden), self.num_inputs), (
            out.shape,
            hidden.shape,
        )
        self._run(
            self.address,
            bf16(hidden),
            optional_bf16(residual),
            len(hidden),
            bf16(out),
            torch.get_num_threads(),
        )
        return out
