"""The layers of one rank as the calls see them that go through several at once."""

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p

import torch

from .build import function
from .decoder_layer import Finish, Projection

MAX_HEAD_DIM = 256  # `kMaxDim` in attention_tiles.h
PARTS = ("project", "attention", "finish")  # of a layer, whose seconds can be had

Seconds = c_double * len(PARTS)


class _Layer(ctypes.Structure):
    """`StepLayer` of step_layers.h."""

    _fields_ = (("projection", c_void_p), ("finish", c_void_p))


class StepLayers:
    """Layers of one shape, without tensor parallelism.

    Args:
        layers: the two ends of each, around attention.
        scale: factor of attention scores, positive.
        softcap: their cap; 0: they have none.

    Attributes:
        num_query_heads: Hq.
        num_kv_heads: H.
        head_dim: D.
        hidden_size: E.
        scale: as given.
        softcap: as given.

    Raises:
        NativeUnavailableError: this machine cannot run the kernels; with the reason.
    """

    def __init__(
        self, layers: Sequence[tuple[Projection, Finish]], scale: float, softcap: float = 0.0
    ) -> None:
        assert scale > 0, f"the scale of the scores must be positive, not {scale}"
        first = layers[0][0]
        self.num_query_heads, self.num_kv_heads = first.num_query_heads, first.num_kv_heads
        self.head_dim, self.hidden_size = first.head_dim, first.qkv.num_inputs
        self.scale, self.softcap = scale, softcap
        assert self.head_dim <= MAX_HEAD_DIM, f"head_dim {self.head_dim} is more than allowed"
        for projection, _ in layers:
            assert projection.num_kv_heads == self.num_kv_heads, projection.num_kv_heads
            assert projection.head_dim == self.head_dim, projection.head_dim
        self._kept = layers  # what the addresses point to
        self._layers = (_Layer * len(layers))(
            *(_Layer(projection.address, finish.address) for projection, finish in layers)
        )
        self._rows = function("saqqara_step_rows", (c_int64,), c_int64)

    def __len__(self) -> int:
        return len(self._layers)

    def address(self, first: int = 0) -> int:
        """Where the layers from `first` on are described."""
        return ctypes.addressof(self._layers) + first * ctypes.sizeof(_Layer)

    def max_rows(self) -> int:
        """Up to so many tokens one call is faster than a call per part of a layer."""
        rows: int = self._rows(torch.get_num_threads())
        return rows
