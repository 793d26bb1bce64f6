"""What `sdpa.py` is put together from: tiles of scores, and rows gathered from pages.

Shapes: R rows (one kv head of one sequence), M queries of a row, S keys of a row, G query heads
per kv head, D head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.kv.view import KVView


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


@dataclass
class Workspace:
    """Tile sizes for a device, the cap of scores, and on a CPU buffers that are used again.

    Memory that the C library hands out anew must be paged in, which costs more than the
    attention that is computed in it; GPUs have an allocator that keeps memory.
    """

    tiling: Tiling
    device: torch.device
    softcap: float = 0.0
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the same name is taken again."""
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self.device)
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            with torch.inference_mode(False):  # must outlive the caller's inference mode
                buffer = self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes].view(dtype).view(shape)

    def packed(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor itself if it is contiguous and of that dtype, else a copy under that name.

        Batched bfloat16 products of strided tensors are ten times slower on a CPU.
        """
        if tensor.dtype == dtype and tensor.is_contiguous():
            return tensor
        return self.take(name, tensor.shape, dtype).copy_(tensor)


def tile_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that tiles are computed in: the queries' own unless that is slow here."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def attend(
    q_RMGD: Tensor,
    k_RSD: Tensor,
    v_RSD: Tensor,
    scale: float,
    work: Workspace,
    kept: NDArray[np.int32] | None = None,
    window: int = 0,
) -> Tensor:
    """Causal attention of the last M of S tokens of each row, tile by tile; returns [R, M, G, D].

    With `kept` [R], the S - M tokens before the queries' own are only the first `kept[r]` in row r.
    With a `window`, and without `kept`, each query sees so many tokens up to its own at most.
    """
    assert not window or kept is None, "a window counts tokens that lie side by side"

    num_rows, num_queries, group, dim = q_RMGD.shape
    num_keys, dtype = k_RSD.shape[1], tile_dtype(q_RMGD.dtype, q_RMGD.device)
    out = torch.empty(q_RMGD.shape, dtype=q_RMGD.dtype, device=q_RMGD.device)
    block = work.tiling.queries(num_rows * group * num_keys * dtype.itemsize)
    if num_rows > 1 and num_queries > block:
        for row in range(num_rows):  # one row's tiles can leave out the keys they do not see
            one = slice(row, row + 1)
            length = None if kept is None else kept[one]
            of_row = (q_RMGD[one], k_RSD[one], v_RSD[one])
            out[one] = attend(*of_row, scale, work, length, window)
        return out
    num_before = num_keys - num_queries
    k_RSD = work.packed("tile keys", k_RSD, dtype)
    v_RSD = work.packed("tile values", v_RSD, dtype)
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        first = max(0, num_before + start + 1 - window) if window else 0
        seen = slice(first, num_before + stop)
        queries = q_RMGD[:, start:stop].reshape(num_rows, -1, dim).to(dtype)
        scores = scaled_scores(queries, k_RSD[:, seen], scale, work)
        if kept is not None:
            hide_padding(scores[..., :num_before], kept)
        hide_later(scores, stop - start, num_before + start - first)
        if window:
            hide_earlier(scores, stop - start, num_before + start - first, window)
        tile = weighted_values(softmax(scores), v_RSD[:, seen])
        out[:, start:stop] = tile.view(num_rows, -1, group, dim)
    return out


def scaled_scores(q_RMD: Tensor, k_RSD: Tensor, scale: float, work: Workspace) -> Tensor:
    """Scaled scores [R, M, S], capped where the workspace says so; they are in the workspace."""
    num_rows, num_queries, _ = q_RMD.shape
    scores = work.take("scores", (num_rows, num_queries, k_RSD.shape[1]), q_RMD.dtype)
    if num_rows == 1:  # a plain matrix product is faster than a batch of one
        scores[0].addmm_(q_RMD[0], k_RSD[0].T, beta=0, alpha=scale)
    else:
        scores.baddbmm_(q_RMD, k_RSD.transpose(1, 2), beta=0, alpha=scale)
    if work.softcap:
        # In float32 throughout: rounded in between, large scores would lose their order.
        scores.copy_(scores.float().div_(work.softcap).tanh_().mul_(work.softcap))
    return scores


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, computed in float32; on a CPU in place."""
    if scores.device.type == "cpu":
        return torch.softmax(scores, dim=-1, out=scores)
    return torch.softmax(scores, dim=-1)


def weighted_values(probs_RMS: Tensor, v_RSD: Tensor) -> Tensor:
    """Sums of values [R, M, D]."""
    if len(probs_RMS) == 1:
        return torch.mm(probs_RMS[0], v_RSD[0])[None]
    return torch.bmm(probs_RMS, v_RSD)


def hide_padding(scores_RMS: Tensor, lengths: NDArray[np.int32]) -> None:
    """Take keys from `lengths[r]` on out of the softmax of row r."""
    first, stop = int(lengths.min()), scores_RMS.shape[-1]
    if first < stop:
        past_end = np.arange(first, stop, dtype=np.int32) >= lengths[:, None]
        mask = torch.from_numpy(past_end[:, None]).to(scores_RMS.device)
        scores_RMS[..., first:].masked_fill_(mask, -math.inf)


def hide_later(scores: Tensor, num_queries: int, first_key: int) -> None:
    """Take keys after each query out of its softmax; query `i` is key `first_key + i`.

    `scores` are [R, num_queries * G, S], the queries of a group side by side.
    """
    num_rows, _, num_keys = scores.shape
    if num_queries == 1 and first_key + 1 == num_keys:
        return
    grouped = scores.view(num_rows, num_queries, -1, num_keys)[..., first_key:]
    bias = scores.new_full((num_queries, num_keys - first_key), -math.inf).triu_(1)
    grouped += bias[:, None]  # several times faster than to fill by a mask


def hide_earlier(scores: Tensor, num_queries: int, first_key: int, window: int) -> None:
    """Take keys before each query's window out of its softmax; else as `hide_later`."""
    num_rows, _, num_keys = scores.shape
    num_hidden = first_key + num_queries - window  # of the last query; the others hide fewer
    if num_hidden <= 0:
        return
    grouped = scores.view(num_rows, num_queries, -1, num_keys)[..., :num_hidden]
    bias = scores.new_full((num_queries, num_hidden), -math.inf).tril_(first_key - window)
    grouped += bias[:, None]


def group_rows(
    lengths: NDArray[np.int32], token_bytes: int, tiling: Tiling, num_new: int = 0
) -> list[NDArray[np.int64]]:
    """Group rows of similar length so that gathering a group fits, with little padding.

    Args:
        lengths: kept tokens of each row; empty rows get groups of their own.
        token_bytes: bytes of one key.
        tiling: how much may be gathered, and padded.
        num_new: tokens that every row has besides.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order].astype(np.int64)
    num_filled = int(np.count_nonzero(ordered))
    padding_tokens = tiling.padding_bytes // token_bytes
    groups = []
    start = 0
    while start < len(order):
        longest = int(ordered[start])
        fitting = max(1, tiling.gather_bytes // max(1, (longest + num_new) * token_bytes))
        end = min(start + fitting, num_filled if longest else len(order))
        padding = np.cumsum(longest - ordered[start:end])
        stop = start + max(1, int(np.searchsorted(padding, padding_tokens, side="right")))
        groups.append(order[start:stop])
        start = stop
    return groups


def gather(
    view: KVView, rows: Tensor, lengths: NDArray[np.int32], work: Workspace
) -> tuple[Tensor, Tensor]:
    """Keys and values [R, S, D] of rows `n * H + h`, S being whole pages of the longest one.

    Past its end a row is padded with its own pages, never with another's.
    """
    used = -(-lengths // view.page_tokens)
    num_pages = int(used.max())
    table = view.page_table.flatten(0, 1)[:, :num_pages].index_select(0, rows)
    if int(used.min()) < num_pages:
        own = torch.from_numpy(np.arange(num_pages) < used[:, None]).to(table.device)
        table = torch.where(own, table, table[:, :1])
    gathered = []
    for name, stored in (("keys", view.k_pages), ("values", view.v_pages)):
        pages = stored.flatten(1)
        out = work.take(name, (table.numel(), pages.shape[1]), pages.dtype)
        torch.index_select(pages, 0, table.view(-1), out=out)
        gathered.append(out.view(len(rows), -1, stored.shape[-1]))
    return gathered[0], gathered[1]
