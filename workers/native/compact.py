"""Rows of pages cut in one call: what each stores is scored, chosen from and moved to its front.

The kernel is in `compact.cpp`; `build.unavailable_reason` says whether it can be used. What a row
keeps has the same bits in every company and with every number of threads.

Shapes: R rows, N sequences, w queries, Hq local query heads, D head dim.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .build import function, pointer

Ints = NDArray[np.int64]

MAX_KERNEL_SIZE = 64  # tokens that are pooled one by one; torch has a faster way for more


class ScoreKind(IntEnum):
    """How tokens are scored."""

    RECENCY = 0  # the later the better
    NORMS = 1  # minus the norm of the key
    WINDOW = 2  # attention of the last queries, pooled
    SUMS = 3  # attention of all queries so far, at hand as sums


@dataclass(frozen=True, slots=True)
class Scoring:
    """How the tokens of all rows are scored.

    Attributes:
        kind: by what.
        divisor: of the attention, which comes as a sum.
        scale: factor of attention scores.
        softcap: their cap; 0: they have none.
        window: last tokens that are not pooled, with kind WINDOW.
        kernel_size: tokens that are pooled, at most `MAX_KERNEL_SIZE`.
        pooling: "max" or "avg".
        queries: the places of all remembered queries, [places, Hq, D], as the keys.
        places: where the last queries of each sequence lie, oldest first, int64 [N, w].
        sums: the sums of all rows, float32; they are moved with their tokens.
    """

    kind: ScoreKind
    divisor: float = 1.0
    scale: float = 1.0
    softcap: float = 0.0
    window: int = 0
    kernel_size: int = 1
    pooling: str = "max"
    queries: Tensor | None = None
    places: Tensor | None = None
    sums: Tensor | None = None


@dataclass(frozen=True, slots=True)
class CutRows:
    """Rows to be cut, int64 [R] each, in the order that the kernel has them in.

    Attributes:
        first_entry: where the entries of each begin in the flat page table.
        length: tokens that it stores.
        keep: tokens that stay; of them the first `sinks` and the last `recent` are certain.
        sinks: at most `keep`.
        recent: at most `keep - sinks`.
        sequence: whose queries score it, from 0 to N.
        first_query: the number, counted in all of `queries`, at which its head's queries would
            begin at place 0.
        first_sum: the number, counted in all of `sums`, of its first token's sum.
    """

    first_entry: Ints
    length: Ints
    keep: Ints
    sinks: Ints
    recent: Ints
    sequence: Ints
    first_query: Ints
    first_sum: Ints

    def table(self) -> Ints:
        """All of it, [R, 8]."""
        return np.stack([getattr(self, name) for name in self.__slots__], axis=1)


class _Compact(ctypes.Structure):
    """`Arguments` of compact.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("k_pages", "v_pages", "page_table", "rows")),
        *((name, c_void_p) for name in ("queries", "places", "sums")),
        *((name, c_int64) for name in ("num_rows", "page_tokens", "dim")),
        *((name, c_int64) for name in ("num_queries", "group", "query_stride")),
        *((name, c_int64) for name in ("window", "kernel_size")),
        *((name, c_float) for name in ("divisor", "scale", "softcap")),
        *((name, c_int) for name in ("kind", "is_max", "is_bf16", "num_threads")),
    )


@functools.cache
def _kernel() -> Callable[..., None]:
    return function("saqqara_compact", (POINTER(_Compact),))


def compact(
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: CutRows,
    group: int,
    scoring: Scoring,
) -> None:
    """Cut rows in place; which pages are whose stays as it is.

    Args:
        k_pages: [P, page_tokens, D], bfloat16 or float32.
        v_pages: as `k_pages`.
        page_table: int32, all rows' entries; no page of the rows may be shared.
        rows: which.
        group: query heads of one kv head.
        scoring: by what.
    """
    dtype, (_, page_tokens, dim) = k_pages.dtype, k_pages.shape
    table = torch.from_numpy(rows.table())
    assert dtype in (torch.bfloat16, torch.float32), f"no kernel for {dtype}"
    assert scoring.kernel_size <= MAX_KERNEL_SIZE, scoring.kernel_size
    arguments = _Compact(
        k_pages=pointer(k_pages, dtype),
        v_pages=pointer(v_pages, dtype),
        page_table=pointer(page_table, torch.int32),
        rows=pointer(table, torch.int64),
        num_rows=len(table),
        page_tokens=page_tokens,
        dim=dim,
        group=group,
        window=scoring.window,
        kernel_size=scoring.kernel_size,
        divisor=scoring.divisor,
        scale=scoring.scale,
        softcap=scoring.softcap,
        kind=scoring.kind,
        is_max=scoring.pooling == "max",
        is_bf16=dtype == torch.bfloat16,
        num_threads=torch.get_num_threads(),
    )
    if scoring.kind == ScoreKind.WINDOW:
        assert scoring.queries is not None, "attention needs queries"
        assert scoring.places is not None, "attention needs queries"
        arguments.queries = pointer(scoring.queries, dtype)
        arguments.query_stride = scoring.queries.shape[-2] * dim
        arguments.places = pointer(scoring.places, torch.int64)
        arguments.num_queries = scoring.places.shape[1]
    if scoring.kind == ScoreKind.SUMS:
        assert scoring.sums is not None, "nothing is known of the attention so far"
        arguments.sums = pointer(scoring.sums, torch.float32)
    _kernel()(byref(arguments))
