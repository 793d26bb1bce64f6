"""Attention in batched torch operations, for any device.

Queries of one kv head are handled together, so that keys and values are read once per kv head and
never repeated in memory. Work is cut into tiles whose scores fit into the cache.

Shapes: T packed tokens, N sequences, R rows (one kv head of one sequence), M queries of a row,
S keys of a row, Hq local query heads, H local kv heads, G = Hq / H query heads per kv head,
D head dim.
"""

import math
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.kv.store import KVView

from .base import CuSeqlens


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes that bound memory and were measured to be fast.

    Attributes:
        score_bytes: scores of one tile, unless it has only `min_queries`.
        min_queries: queries of one tile at least.
        max_queries: queries of one tile; more would compute more of the hidden upper triangle.
        gather_bytes: keys gathered from pages at a time (and as much for the values).
        padding_bytes: rows of different length are gathered together as long as that pads by no
            more than this; about what the fixed cost of another round would read.
    """

    score_bytes: int
    min_queries: int
    max_queries: int
    gather_bytes: int
    padding_bytes: int

    def queries(self, query_bytes: int) -> int:
        """Queries of one tile, where one query has `query_bytes` of scores."""
        return max(self.min_queries, min(self.max_queries, self.score_bytes // query_bytes))


# On a CPU, tiles that stay in a core's share of the last-level cache; on a GPU, few launches.
CPU_TILING = Tiling(
    score_bytes=4 << 20,
    min_queries=16,
    max_queries=128,
    gather_bytes=2 << 20,
    padding_bytes=1 << 20,
)
GPU_TILING = Tiling(
    score_bytes=256 << 20,
    min_queries=16,
    max_queries=2048,
    gather_bytes=256 << 20,
    padding_bytes=32 << 20,
)


class TorchAttention:
    """Torch operations only. Arguments and results are those of `AttentionBackend`.

    Scores are matrix products in the dtype of the queries (accumulated in float32), softmax is
    computed in float32. On a CPU without fast arithmetic of that dtype, tiles are computed in
    float32.

    Args:
        tiling: sizes of the pieces of work; default: those measured for the device.
    """

    name = "torch"

    def __init__(self, tiling: Tiling | None = None) -> None:
        self._tiling = tiling

    def tiling(self, device: torch.device) -> Tiling:
        """The sizes of the pieces of work on a device."""
        return self._tiling or (CPU_TILING if device.type == "cpu" else GPU_TILING)

    # -- fresh keys -------------------------------------------------------------------------

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float
    ) -> Tensor:
        """Causal attention of the last queries of each sequence over its keys."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for n in range(len(cu_q.host) - 1):
            queries = slice(cu_q.host[n], cu_q.host[n + 1])
            keys = slice(cu_k.host[n], cu_k.host[n + 1])
            self._prefill_one(q[queries], k[keys], v[keys], scale, out[queries])
        return out

    def _prefill_one(self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
        """One sequence: q and out [M, Hq, D], k and v [n, H, D]."""
        num_queries, num_query_heads, dim = q.shape
        num_keys, num_heads, _ = k.shape
        assert num_queries <= num_keys, f"{num_queries} queries of {num_keys} tokens"
        tiled = q.device.type == "cpu" and _tile_dtype(q) == torch.bfloat16
        if num_queries == num_keys and not tiled:
            q_HMD, k_HSD, v_HSD = (x.transpose(0, 1) for x in (q, k, v))
            grouped = num_query_heads != num_heads
            attended = F.scaled_dot_product_attention(
                q_HMD[None],
                k_HSD[None],
                v_HSD[None],
                is_causal=True,
                scale=scale,
                enable_gqa=grouped,
            )
            out.copy_(attended[0].transpose(0, 1))
            return
        shape = (num_queries, num_heads, num_query_heads // num_heads, dim)
        q_HMGD, out_HMGD = (x.view(shape).transpose(0, 1) for x in (q, out))
        tiling = self.tiling(q.device)
        out_HMGD.copy_(_attend(q_HMGD, k.transpose(0, 1), v.transpose(0, 1), scale, tiling))

    def mass(
        self, q_window: Tensor, k: Tensor, scale: float, query_weights: Tensor | None = None
    ) -> Tensor:
        """Attention that each key gets from the last queries, summed over them and the group.

        In float32 throughout: what is kept is decided by these numbers.
        """
        num_queries, num_query_heads, dim = q_window.shape
        num_keys, num_heads, _ = k.shape
        group = num_query_heads // num_heads
        if query_weights is None:
            query_weights = torch.ones(num_queries, device=k.device)
        weights = query_weights.float().repeat_interleave(group)
        mass = torch.zeros(num_heads, num_keys, device=k.device)
        block = self.tiling(k.device).queries(4 * group * num_keys)
        for head in range(num_heads):
            keys = k[:, head].float()
            for start in range(0, num_queries, block):
                stop = min(start + block, num_queries)
                seen = num_keys - num_queries + stop
                queries = q_window[start:stop, head * group : (head + 1) * group].float()
                scores = _scores(queries.reshape(1, -1, dim), keys[None, :seen], scale)
                _hide_later(scores, stop - start, seen - (stop - start))
                probs = torch.softmax(scores[0], dim=-1)
                mass[head, :seen] += weights[start * group : stop * group] @ probs
        return mass

    # -- pages ------------------------------------------------------------------------------

    @overload
    def decode(
        self, q: Tensor, view: KVView, scale: float, return_mass: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def decode(
        self, q: Tensor, view: KVView, scale: float, return_mass: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def decode(
        self, q: Tensor, view: KVView, scale: float, return_mass: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one query per sequence over what its rows keep, like lengths together."""
        num_sequences, num_heads = view.lengths.shape
        num_rows, dim = num_sequences * num_heads, q.shape[-1]
        dtype = _tile_dtype(q)
        q_RGD = q.reshape(num_rows, -1, dim)
        out_RGD = torch.zeros(q_RGD.shape, dtype=q.dtype, device=q.device)
        mass_RS = torch.zeros(num_rows if return_mass else 0, view.max_length, device=q.device)
        lengths = view.lengths.reshape(-1).cpu().numpy()
        for chosen in _chunks(lengths, dim * dtype.itemsize, self.tiling(q.device)):
            if lengths[chosen[0]] == 0:
                continue
            rows = torch.from_numpy(chosen).to(q.device)
            k_RSD, v_RSD = (x.to(dtype) for x in _gather(view, rows, lengths[chosen]))
            scores = _scores(q_RGD.index_select(0, rows).to(dtype), k_RSD, scale)
            _hide_padding(scores, lengths[chosen])
            if return_mass:
                probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
                width = min(probs.shape[-1], view.max_length)
                mass_RS[rows, :width] = probs[..., :width].sum(dim=1)
            else:
                probs = torch.softmax(scores, dim=-1)
            out_RGD[rows] = torch.bmm(probs.to(dtype), v_RSD).to(q.dtype)
        out = out_RGD.view(q.shape)
        return (out, mass_RS.view(num_sequences, num_heads, -1)) if return_mass else out

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, view: KVView, scale: float
    ) -> Tensor:
        """Attention of new tokens over what their rows keep, then over the new ones up to each."""
        num_heads, dim = k.shape[1:]
        group = q.shape[1] // num_heads
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q_THGD, out_THGD = (x.view(len(q), num_heads, group, dim) for x in (q, out))
        lengths = view.lengths.reshape(-1).cpu().numpy()
        num_new, starts = np.array(cu.lengths), np.array(cu.host[:-1])
        token_bytes = dim * k.element_size()
        tiling = self.tiling(q.device)
        for count in np.unique(num_new[num_new > 0]).tolist():
            sequences = np.flatnonzero(num_new == count)
            all_rows = (sequences[:, None] * num_heads + np.arange(num_heads)).reshape(-1)
            score_bytes = count * group * k.element_size()  # of one key
            scarce = max(token_bytes, score_bytes * tiling.gather_bytes // tiling.score_bytes)
            for chunk in _chunks(lengths[all_rows], scarce, tiling, extra=count):
                chosen = all_rows[chunk]
                sequence, head = np.divmod(chosen, num_heads)
                rows = torch.from_numpy(chosen).to(q.device)
                tokens = torch.from_numpy(starts[sequence][:, None] + np.arange(count))
                where = tokens.to(q.device), torch.from_numpy(head[:, None]).to(q.device)
                k_kept, v_kept = _gather(view, rows, lengths[chosen])
                out_THGD[where] = _attend(
                    q_THGD[where],
                    torch.cat([k_kept, k[where]], dim=1),
                    torch.cat([v_kept, v[where]], dim=1),
                    scale,
                    tiling,
                    lengths[chosen],
                )
        return out


def _attend(
    q_RMGD: Tensor,
    k_RSD: Tensor,
    v_RSD: Tensor,
    scale: float,
    tiling: Tiling,
    kept: NDArray[np.int32] | None = None,
) -> Tensor:
    """Causal attention of the last M of S tokens of each row, tile by tile; returns [R, M, G, D].

    With `kept` [R], the S - M tokens before the queries' own are only the first `kept[r]` in row r.
    """
    num_rows, num_queries, group, dim = q_RMGD.shape
    num_keys, dtype = k_RSD.shape[1], _tile_dtype(q_RMGD)
    out = torch.empty(q_RMGD.shape, dtype=q_RMGD.dtype, device=q_RMGD.device)
    block = tiling.queries(num_rows * group * num_keys * dtype.itemsize)
    if num_rows > 1 and num_queries > block:
        for row in range(num_rows):  # one row's tiles can leave out the keys they do not see
            one = slice(row, row + 1)
            length = None if kept is None else kept[one]
            out[one] = _attend(q_RMGD[one], k_RSD[one], v_RSD[one], scale, tiling, length)
        return out
    num_before = num_keys - num_queries
    k_RSD, v_RSD = k_RSD.to(dtype), v_RSD.to(dtype)
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        seen = num_before + stop
        queries = q_RMGD[:, start:stop].reshape(num_rows, -1, dim).to(dtype)
        scores = _scores(queries, k_RSD[:, :seen], scale)
        if kept is not None:
            _hide_padding(scores[..., :num_before], kept)
        _hide_later(scores, stop - start, num_before + start)
        tile = _matmul(torch.softmax(scores, dim=-1), v_RSD[:, :seen])
        out[:, start:stop] = tile.view(num_rows, -1, group, dim)
    return out


def _scores(q_RMD: Tensor, k_RSD: Tensor, scale: float) -> Tensor:
    """Scaled scores [R, M, S]."""
    num_rows, num_queries, _ = q_RMD.shape
    scores = q_RMD.new_empty(num_rows, num_queries, k_RSD.shape[1])
    if num_rows == 1:  # a plain matrix product is faster than a batch of one
        scores[0].addmm_(q_RMD[0], k_RSD[0].T, beta=0, alpha=scale)
    else:
        scores.baddbmm_(q_RMD, k_RSD.transpose(1, 2), beta=0, alpha=scale)
    return scores


def _matmul(probs_RMS: Tensor, v_RSD: Tensor) -> Tensor:
    if len(probs_RMS) == 1:
        return torch.mm(probs_RMS[0], v_RSD[0])[None]
    return torch.bmm(probs_RMS, v_RSD)


def _hide_padding(scores_RMS: Tensor, lengths: NDArray[np.int32]) -> None:
    """Take keys from `lengths[r]` on out of the softmax of row r."""
    first, stop = int(lengths.min()), scores_RMS.shape[-1]
    if first < stop:
        past_end = np.arange(first, stop, dtype=np.int32) >= lengths[:, None]
        mask = torch.from_numpy(past_end[:, None]).to(scores_RMS.device)
        scores_RMS[..., first:].masked_fill_(mask, -math.inf)


def _hide_later(scores: Tensor, num_queries: int, first_key: int) -> None:
    """Take keys after each query out of its softmax; query `i` is key `first_key + i`.

    `scores` are [R, num_queries * G, S], the queries of a group side by side.
    """
    num_rows, _, num_keys = scores.shape
    if num_queries == 1 and first_key + 1 == num_keys:
        return
    grouped = scores.view(num_rows, num_queries, -1, num_keys)[..., first_key:]
    shape = (num_queries, num_keys - first_key)
    later = torch.ones(shape, dtype=torch.bool, device=scores.device).triu_(1)
    grouped.masked_fill_(later[:, None], -math.inf)


def _chunks(
    lengths: NDArray[np.int32], token_bytes: int, tiling: Tiling, extra: int = 0
) -> list[NDArray[np.int64]]:
    """Group rows of similar length so that gathering a group fits, with little padding.

    Args:
        lengths: kept tokens of each row; empty rows get groups of their own.
        token_bytes: bytes of one key.
        tiling: how much may be gathered, and padded.
        extra: tokens that every row has besides.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order].astype(np.int64)
    num_filled = int(np.count_nonzero(ordered))
    groups = []
    start = 0
    while start < len(order):
        longest = int(ordered[start])
        end = num_filled if longest else len(order)
        fitting = max(1, tiling.gather_bytes // ((longest + extra) * token_bytes or 1))
        padding = np.cumsum(longest - ordered[start : min(end, start + fitting)])
        allowed = tiling.padding_bytes // token_bytes
        stop = start + max(1, int(np.searchsorted(padding, allowed, side="right")))
        groups.append(order[start:stop])
        start = stop
    return groups


def _gather(view: KVView, rows: Tensor, lengths: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    """Keys and values [R, S, D] of rows `n * H + h`, S being whole pages of the longest one.

    Past its end a row is padded with its own pages, never with another's.
    """
    used = -(-lengths // view.page_tokens)
    num_pages = int(used.max())
    table = view.page_table.flatten(0, 1)[:, :num_pages].index_select(0, rows)
    if int(used.min()) < num_pages:
        own = torch.from_numpy(np.arange(num_pages) < used[:, None]).to(table.device)
        table = torch.where(own, table, table[:, :1])
    k, v = (
        pages.flatten(1).index_select(0, table.reshape(-1)).view(len(rows), -1, pages.shape[-1])
        for pages in (view.k_pages, view.v_pages)
    )
    return k, v


def _tile_dtype(q: Tensor) -> torch.dtype:
    """The dtype that tiles are computed in: the queries' own unless that is slow here."""
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return q.dtype
    if q.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32
