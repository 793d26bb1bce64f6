"""Packed bf16 linear layers of a decoder layer, with what stands next to them in the same call.

A weight is packed once, when it is loaded; the packed copy serves all numbers of rows, from one
token to a whole prompt, and the original is not needed any more. Sums are fp32. The result of a
row has the same bits in every batch and with every number of threads.

One decoder layer is two calls around attention:

    q = layer.project.append(hidden, positions, k_tokens, v_tokens, refs)
    attended = ...
    layer.finish(hidden, attended, out=hidden)

With tensor parallelism sums over ranks stand between the parts of the second call, which then are
`PackedLinear` and `Mlp`.

The kernels are in `linear.cpp`. They need what `build.unavailable_reason` checks.

Shapes: T tokens, E hidden size, F intermediate size, Hq query heads, H kv heads, D head dim.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import function, pointer

# The layout of a panel in linear.cpp: pairs of inputs x 32 columns, two vectors of 16.
_PANEL_COLUMNS = 32
_GATED_COLUMNS = 16


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


_HEADS = (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64)
_SIGNATURES: dict[str, Sequence[type[ctypes._SimpleCData[int]]]] = {}


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """A norm in front of a linear layer; weight [E]."""

    weight: Tensor
    eps: float
