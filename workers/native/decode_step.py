"""A decode step of all layers of one rank in one call of native code.

Python sees hidden states go in and come out; the layers in between are one parallel region. Each
layer computes what `decoder_layer.py` and the cpu attention backend compute, to the last bit.

Shapes: T tokens, one of each sequence; L layers, E hidden size, Hq query heads, H kv heads,
P pages, D head dim.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import function, pointer
from .linear import bf16, optional_bf16
from .step_layers import Seconds, StepLayers


class _Step(ctypes.Structure):
    """`Step` of decode_step.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("layers", "hidden", "positions", "slots", "refs")),
        *((name, c_void_p) for name in ("lengths", "page_table", "k_pages", "v_pages")),
        *((name, c_void_p) for name in ("queries", "lse", "seconds")),
        *((name, c_int64) for name in ("num_layers", "rows", "page_tokens", "max_pages")),
        ("threads", c_int64),
        *((name, c_float) for name in ("scale", "softcap")),
    )


@dataclass(frozen=True, slots=True)
class Pages:
    """Where keys and values are kept.

    Attributes:
        k_pages: bf16 [P, page_tokens, D].
        v_pages: the same of values.
        page_table: int32 [slots, L, H, pages of the longest row].
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The sequences of a step: one token of each.

    Attributes:
        positions: of the tokens, int64 [T].
        slots: of the sequences, int64 [T].
        refs: where new keys and values go, int64 [L, T, H], in tokens of the flat pool.
        lengths: of the rows, the new tokens counted, int32 [L, T, H].
    """

    positions: Tensor
    slots: Tensor
    refs: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Notes:
    """What is wanted of a step besides the hidden states, each of it None if it is not.

    Attributes:
        queries: receives the rotated queries, bf16 [L, T, Hq, D].
        lse: receives the normalisers of their softmax, float32 [L, T, Hq].
    """

    queries: Tensor | None = None
    lse: Tensor | None = None


_NO_NOTES = Notes()


class DecodeStep:
    """All layers of one rank.

    Args:
        layers: they.
        pages: where their keys and values are.
    """

    def __init__(self, layers: StepLayers, pages: Pages) -> None:
        table, dim = pages.page_table, pages.k_pages.shape[-1]
        assert table.shape[1:3] == (len(layers), layers.num_kv_heads), (table.shape, len(layers))
        assert dim == layers.head_dim, (dim, layers.head_dim)
        self._kept = (layers, pages)  # what the addresses point to
        self._step = _Step(
            layers=layers.address(),
            page_table=pointer(table, torch.int32),
            k_pages=bf16(pages.k_pages),
            v_pages=bf16(pages.v_pages),
            num_layers=len(layers),
            page_tokens=pages.k_pages.shape[1],
            max_pages=table.shape[-1],
            scale=layers.scale,
            softcap=layers.softcap,
        )
        self._shape = (len(layers), layers.num_kv_heads)
        self._num_query_heads, self._head_dim = layers.num_query_heads, dim
        self._address = ctypes.addressof(self._step)
        self._run = function("saqqara_decode_step", (c_void_p,))

    def __call__(
        self, hidden: Tensor, rows: Rows, notes: Notes = _NO_NOTES, *, timed: bool = False
    ) -> tuple[float, ...]:
        """Feed one token of each sequence through all layers.

        Args:
            hidden: before the first layer, bf16 [T, E]; receives those after the last.
            rows: the sequences.
            notes: what else is wanted.
            timed: whether the parts are timed.

        Returns:
            Seconds of each of `PARTS`, summed over the layers; nothing unless `timed`.
        """
        (num_layers, num_heads), num_rows = self._shape, len(hidden)
        assert rows.positions.shape == rows.slots.shape == (num_rows,), rows.positions.shape
        shape = (num_layers, num_rows, num_heads)
        assert rows.refs.shape == rows.lengths.shape == shape, (rows.refs.shape, shape)
        seconds = Seconds()
        step = self._step
        step.hidden = bf16(hidden)
        step.positions = pointer(rows.positions, torch.int64)
        step.slots = pointer(rows.slots, torch.int64)
        step.refs = pointer(rows.refs, torch.int64)
        step.lengths = pointer(rows.lengths, torch.int32)
        step.queries, step.lse = self._places(notes, num_rows)
        step.seconds = ctypes.addressof(seconds) if timed else None
        step.rows = num_rows
        step.threads = torch.get_num_threads()
        self._run(self._address)
        return tuple(seconds) if timed else ()

    def _places(self, notes: Notes, num_rows: int) -> tuple[int | None, int | None]:
        """Addresses of the notes."""
        queries, lse = notes.queries, notes.lse
        shape = (self._shape[0], num_rows, self._num_query_heads)
        assert queries is None or queries.shape == (*shape, self._head_dim), queries.shape
        assert lse is None or lse.shape == shape, (lse.shape, shape)
        return optional_bf16(queries), None if lse is None else pointer(lse, torch.float32)
