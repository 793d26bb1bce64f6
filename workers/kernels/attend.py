"""Several new tokens per sequence over kept pages and over fresh keys, causal among the fresh ones.

A program takes a block of queries of one kv head, all query heads of the group in one tile. It goes
over the row's kept tokens, which every query sees, and then over the fresh ones up to the query's
own; both parts add to one running softmax.

Shapes: T packed tokens, N sequences, H kv heads, G query heads per kv head, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import PagedRows
from .launch import LOG2_E, block_side, check, dense, padded
from .softcap import capped


@triton.jit
def _add_block(q_MD, k_ND, v_ND, seen, best, total, acc, scale, cap, HAS_CAP: tl.constexpr):
    """Let queries attend to a block of keys; every query must have seen a key by then."""
    s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
    s_MN = capped(s_MN, cap, HAS_CAP)
    s_MN = tl.where(seen, s_MN, float("-inf"))
    higher = tl.maximum(best, tl.max(s_MN, axis=1))
    rescale = tl.exp2(best - higher)
    weights = tl.exp2(s_MN - higher[:, None])
    total = total * rescale + tl.sum(weights, axis=1)
    weighted = tl.dot(weights.to(v_ND.dtype), v_ND, input_precision="ieee")
    return higher, total, acc * rescale[:, None] + weighted


@triton.jit(
    do_not_specialize=[
        *("table_stride_n", "table_stride_h", "length_stride_n", "length_stride_h", "window"),
    ],
    do_not_specialize_on_alignment=["page_table", "lengths"],
)
def _attend_kernel(
    q, k, v, out, cu_q, cu_k, k_pages, v_pages, page_table, lengths,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    table_stride_n, table_stride_h, length_stride_n, length_stride_h, scale, window, cap,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One block of queries, (token, query head of the group) side by side.

    The windows of adjacent queries begin side by side, and a block has no more queries than keys:
    so each query sees a key of the first block.
    """
    block, head, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_q, stop_q = tl.load(cu_q + n), tl.load(cu_q + n + 1)
    first_k, stop_k = tl.load(cu_k + n), tl.load(cu_k + n + 1)
    num_q, num_k = stop_q - first_q, stop_k - first_k
    if block * BLOCK_M >= num_q * G:
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_N)
    i = m // G
    of_dim = d < D
    tile = (m < num_q * G)[:, None] & of_dim[None, :]
    tokens, heads = (first_q + i).to(tl.int64), head * G + m % G
    q_MD = tl.load(
        q + tokens[:, None] * q_stride_t + heads[:, None] * q_stride_h + d[None, :],
        mask=tile, other=0.0,
    )  # fmt: skip
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_PAGES:
        kept = tl.load(lengths + n * length_stride_n + head * length_stride_h)
        table_row = page_table + n.to(tl.int64) * table_stride_n + head * table_stride_h
        for first in range(0, kept, BLOCK_N):
            t = first + j
            valid = t < kept
            pages = tl.load(table_row + t // PAGE, mask=valid, other=0).to(tl.int64)
            refs = (pages * PAGE + t % PAGE)[:, None] * D + d[None, :]
            within = valid[:, None] & of_dim[None, :]
            k_ND = tl.load(k_pages + refs, mask=within, other=0.0)
            v_ND = tl.load(v_pages + refs, mask=within, other=0.0)
            best, total, acc = _add_block(
                q_MD, k_ND, v_ND, valid[None, :], best, total, acc, scale, cap, HAS_CAP
            )  # fmt: skip

    before = num_k - num_q
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, num_q - 1)
    own = before + tl.minimum(i, num_q - 1)
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(before + block * BLOCK_M // G + 1 - window, 0)
    for first in range(start, before + last + 1, BLOCK_N):
        t = first + j
        within = (t < num_k)[:, None] & of_dim[None, :]
        places = (first_k + t).to(tl.int64)[:, None]
        k_ND = tl.load(k + places * k_stride_t + head * k_stride_h + d[None, :], within, other=0.0)
        v_ND = tl.load(v + places * v_stride_t + head * v_stride_h + d[None, :], within, other=0.0)
        seen = t[None, :] <= own[:, None]
        if HAS_WINDOW:
            seen = seen & (t[None, :] > own[:, None] - window)
        best, total, acc = _add_block(
            q_MD, k_ND, v_ND, seen, best, total, acc, scale, cap, HAS_CAP
        )  # fmt: skip

    acc = acc / total[:, None]
    places = (tokens * H * G + heads)[:, None] * D + d[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=tile)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    scale: float,
    rows: PagedRows | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of the last tokens of each sequence over kept rows and fresh keys.

    Args:
        q: [Tq, H G, D]; of each sequence the queries of its last fresh tokens.
        k: fresh keys, [Tk, H, D].
        v: fresh values, [Tk, H, D].
        cu_q: int32 [N + 1], where each sequence starts in `q`.
        cu_k: the same for `k` and `v`.
        max_q: the most queries of a sequence.
        scale: factor of the scores.
        rows: what is kept of each sequence from before, without the fresh tokens; None: nothing.
        window: without `rows`, a query sees so many of the keys up to its own, at most; 0: all.
        softcap: of the scores; 0: they have none.

    Returns:
        [Tq, H G, D].
    """
    q, k, v = dense(q), dense(k), dense(v)
    check(q, k, v)
    assert not window or rows is None, "a window counts tokens that lie side by side"
    (_, num_query_heads, dim), num_heads = q.shape, k.shape[1]
    group, num_sequences = num_query_heads // num_heads, len(cu_q) - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if max_q == 0 or num_sequences == 0:
        return out
    pages = (k, v, cu_q, cu_q) if rows is None else (
        rows.k_pages, rows.v_pages, rows.page_table, rows.lengths
    )  # fmt: skip
    strides = (0, 0, 0, 0) if rows is None else (
        *rows.page_table.stride()[:2], *rows.lengths.stride()
    )  # fmt: skip
    side = block_side(q.dtype)
    block = min(side, padded(max_q * group))
    _attend_kernel[-(-max_q * group // block), num_heads, num_sequences](
        q, k, v, out, cu_q, cu_k, *pages,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *strides, scale * LOG2_E, window,
        softcap * LOG2_E,
        H=num_heads, G=group, D=dim, PAGE=1 if rows is None else rows.page_tokens,
        BLOCK_M=block, BLOCK_N=side, BLOCK_D=padded(dim), HAS_PAGES=rows is not None,
        HAS_WINDOW=window > 0, HAS_CAP=softcap > 0,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
