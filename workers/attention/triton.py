"""Attention in Triton kernels for GPUs: paged decode, extension and masses; flash for prompts.

Scores, softmax and sums are float32. The softmax weights are rounded to the dtype of the values
before they meet them, as in flash attention; masses use the unrounded weights.

A decoded row depends on that row only, to the last bit: how it is cut is decided by its length.

Shapes: T packed tokens, N sequences, Hq local query heads, H local kv heads, D head dim.
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saqqara.workers.kv.view import KVView

from .base import CuSeqlens
from .fresh import FreshAttention

if TYPE_CHECKING:
    from saqqara.workers.kernels.decode import PagedRows

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `TritonAttention` cannot be used here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"it computes bfloat16, float16 and float32, not {dtype}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    return None


class TritonAttention:
    """Triton kernels. Arguments and results are those of `AttentionBackend`.

    Head dims go up to 256. With TRITON_INTERPRET=1 the kernels run on any device, slowly: that is
    how they are tested without a GPU.
    """

    name = "triton"

    def __init__(self, softcap: float = 0.0) -> None:
        self.softcap = softcap
        from saqqara.workers.kernels import attend, decode, mass

        self._attend, self._decode, self._mass = attend, decode, mass
        self._fresh = FreshAttention(softcap)

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Causal attention of the last queries of each sequence over its keys.

        No normalisers: `mass` makes those of the few queries that it is asked for.
        """
        window = 0 if cu_k.max_len <= window else window
        if cu_q.host == cu_k.host:
            return self._fresh(q, k, v, cu_k, scale, window), None
        lengths = zip(cu_q.lengths, cu_k.lengths, strict=True)
        assert all(queries <= keys for queries, keys in lengths), "more queries than keys"
        if cu_q.lengths == (1,) * len(cu_q.lengths):
            return self._decode_rows(q, rows_of_prompts(k, v, cu_k, window), scale)[0], None
        bounds = (cu_q.device, cu_k.device, cu_q.max_len)
        return self._attend.attend(
            q, k, v, *bounds, scale, window=window, softcap=self.softcap
        ), None

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, view: KVView, scale: float
    ) -> Tensor:
        """Attention of new tokens over what their rows keep, then over the new ones up to each."""
        rows = None if view.max_length == 0 else self._rows(view)
        bounds = (cu.device, cu.device, cu.max_len)
        return self._attend.attend(q, k, v, *bounds, scale, rows, softcap=self.softcap)

    def decode(self, q: Tensor, view: KVView, scale: float) -> Tensor:
        """Attention of one query per sequence over what its rows keep, read once from the pages."""
        return self._decode_rows(q, self._rows(view), scale)[0]

    def decode_and_lse(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the normaliser of each query's softmax."""
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        return self._decode_rows(q, self._rows(view), scale, lse=lse)[0], lse

    def decode_and_mass(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the attention that every kept token got."""
        out, mass = self._decode_rows(q, self._rows(view), scale, return_mass=True)
        assert mass is not None, "asked for"
        return out, mass

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
        bounds = _bounds_of_one(q_window, k)
        weighing = (query_weights, lse, self.softcap)
        return self._mass.mass(q_window, k, *bounds, scale, *weighing)[:, :num_columns]

    def normalisers(self, q_window: Tensor, k: Tensor, scale: float) -> Tensor:
        """The normalisers of the last queries of one sequence."""
        bounds = _bounds_of_one(q_window, k)
        return self._mass.log_sum_exps(q_window, k, *bounds, scale, self.softcap)

    def _decode_rows(
        self, q: Tensor, rows: "PagedRows", scale: float, **wanted: Any
    ) -> tuple[Tensor, Tensor | None]:
        return self._decode.decode(q, rows, scale, softcap=self.softcap, **wanted)

    def _rows(self, view: KVView) -> "PagedRows":
        return self._decode.PagedRows(
            view.k_pages, view.v_pages, view.page_table, view.lengths, view.max_length
        )


def rows_of_prompts(k: Tensor, v: Tensor, cu: CuSeqlens, window: int = 0) -> "PagedRows":
    """Fresh keys and values as rows in pages of one token, so that they are cut by their length.

    One query to a prompt would otherwise leave all of its keys to one program. With a window rows
    are the last so many tokens at most.
    """
    from saqqara.workers.kernels.decode import PagedRows

    num_heads, dim = k.shape[1:]
    longest, lengths_N, starts_N = cu.max_len, cu.device.diff(), cu.device[:-1]
    if window:
        longest, lengths_N = min(longest, window), lengths_N.clamp(max=window)
        starts_N = cu.device[1:] - lengths_N
    places = torch.arange(longest, dtype=torch.int32, device=k.device)
    tokens_NS = (starts_N[:, None] + places).clamp_(max=cu.host[-1] - 1)
    heads_H = torch.arange(num_heads, dtype=torch.int32, device=k.device)
    table_NHS = tokens_NS[:, None] * num_heads + heads_H[:, None]
    lengths_NH = lengths_N[:, None].expand(-1, num_heads)
    k_pages, v_pages = (x.reshape(-1, 1, dim) for x in (k, v))
    return PagedRows(k_pages, v_pages, table_NHS, lengths_NH, longest)


def _bounds_of_one(q_window: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Where the last queries and the keys of one sequence start, and how many they are."""
    num_queries, num_keys = len(q_window), len(k)
    assert num_queries <= num_keys, f"{num_queries} queries of {num_keys} tokens"
    ends = torch.arange(2, dtype=torch.int32, device=k.device)
    return ends * num_queries, ends * num_keys, num_queries, num_keys
