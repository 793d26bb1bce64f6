"""How much attention each key gets, without the matrix of weights.

The first kernel finds the log-sum-exp of every query, the second recomputes the scores of a block
of keys and sums their weights over the queries. Nothing is added by atomics: the same bits come out
every time.

Shapes: T packed tokens, N sequences, H kv heads, G query heads per kv head, D head dim, C parts
that the keys of a query are cut into.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LOG2_E, block_side, check, dense, padded
from .softcap import capped

_SPLIT_KEYS = 1024
_MAX_SPLITS = 16


@triton.jit(do_not_specialize=["splits", "num_tokens"])
def _queries_kernel(
    q, k, lse, cu_q, cu_k, num_tokens, splits,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, scale, cap,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Natural log-sum-exp of a block of queries over one part of the keys; -inf where it has none.

    `lse` is [C, Tq, H G].
    """
    block, head, n = tl.program_id(0) // splits, tl.program_id(1), tl.program_id(2)
    split = tl.program_id(0) % splits
    first_q, stop_q = tl.load(cu_q + n), tl.load(cu_q + n + 1)
    first_k, stop_k = tl.load(cu_k + n), tl.load(cu_k + n + 1)
    num_q, num_k = stop_q - first_q, stop_k - first_k
    if block * BLOCK_M >= num_q * G:
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    i = m // G
    tokens, heads = (first_q + i).to(tl.int64), head * G + m % G
    real = m < num_q * G
    q_MD = tl.load(
        q + tokens[:, None] * q_stride_t + heads[:, None] * q_stride_h + d[None, :],
        mask=real[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    before = num_k - num_q
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, num_q - 1)
    blocks = (num_k + BLOCK_N - 1) // BLOCK_N
    span = (blocks + splits - 1) // splits * BLOCK_N
    stop = tl.minimum((split + 1) * span, before + last + 1)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(split * span, stop, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        places = (first_k + t).to(tl.int64)[:, None] * k_stride_t + head * k_stride_h
        within = (t < num_k)[:, None] & (d < D)[None, :]
        k_ND = tl.load(k + places + d[None, :], mask=within, other=0.0)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        s_MN = capped(s_MN, cap, HAS_CAP)
        seen = (t[None, :] <= before + i[:, None]) & (t < num_k)[None, :]
        s_MN = tl.where(seen, s_MN, float("-inf"))
        higher = tl.maximum(best, tl.max(s_MN, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a part may hide all from a query
        total = total * tl.exp2(best - base) + tl.sum(tl.exp2(s_MN - base[:, None]), axis=1)
        best = higher
    some = total > 0.0
    log = tl.where(some, (best + tl.log2(tl.where(some, total, 1.0))) / 1.4426950408889634, best)
    place = (split.to(tl.int64) * num_tokens + tokens) * H * G + heads
    tl.store(lse + place, log, mask=real)


@triton.jit(do_not_specialize=["num_keys"])
def _keys_kernel(
    q, k, lse, weights, mass, cu_q, cu_k, num_keys,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, scale, cap,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weights that a block of keys gets from all queries that see it; `mass` is [H, Tk]."""
    block, head, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_q, stop_q = tl.load(cu_q + n), tl.load(cu_q + n + 1)
    first_k, stop_k = tl.load(cu_k + n), tl.load(cu_k + n + 1)
    num_q, num_k = stop_q - first_q, stop_k - first_k
    if block * BLOCK_N >= num_k:
        return
    t = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = (first_k + t).to(tl.int64)
    within = (t < num_k)[:, None] & (d < D)[None, :]
    k_ND = tl.load(
        k + keys[:, None] * k_stride_t + head * k_stride_h + d[None, :], mask=within, other=0.0
    )
    before = num_k - num_q
    # Queries before this one see none of the block.
    first_row = tl.maximum(block * BLOCK_N - before, 0) * G // BLOCK_M * BLOCK_M
    acc = tl.zeros([BLOCK_N], tl.float32)
    for first in range(first_row, num_q * G, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        i = m // G
        real = m < num_q * G
        tokens, heads = (first_q + i).to(tl.int64), head * G + m % G
        q_MD = tl.load(
            q + tokens[:, None] * q_stride_t + heads[:, None] * q_stride_h + d[None, :],
            mask=real[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        log = tl.load(lse + tokens * H * G + heads, mask=real, other=0.0) * 1.4426950408889634
        s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * scale
        s_NM = capped(s_NM, cap, HAS_CAP)
        seen = (t[:, None] <= before + i[None, :]) & real[None, :]
        p_NM = tl.where(seen, tl.exp2(s_NM - log[None, :]), 0.0)
        if HAS_WEIGHTS:
            p_NM = p_NM * tl.load(weights + tokens, mask=real, other=0.0)[None, :]
        acc += tl.sum(p_NM, axis=1)
    tl.store(mass + head.to(tl.int64) * num_keys + keys, acc, mask=t < num_k)


def mass(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    query_weights: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention that each key gets from the last queries of its sequence.

    Args:
        q: [Tq, H G, D]; of each sequence the queries of its last tokens, or of all.
        k: [Tk, H, D].
        cu_q: int32 [N + 1], where each sequence starts in `q`.
        cu_k: the same for `k`.
        max_q: the most queries of a sequence.
        max_k: the most keys of a sequence.
        scale: factor of the scores.
        query_weights: float32 [Tq], a factor for each query; None: 1.
        lse: float32 [Tq, H G], the log-sum-exp of each query's scores; None: computed first.
        softcap: of the scores; 0: they have none.

    Returns:
        float32 [H, Tk]: causal softmax attention, summed over the queries and the group.
    """
    q, k = dense(q), dense(k)
    check(q, k)
    (_, num_query_heads, dim), (num_keys, num_heads, _) = q.shape, k.shape
    group, num_sequences = num_query_heads // num_heads, len(cu_q) - 1
    result = torch.zeros(num_heads, num_keys, dtype=torch.float32, device=q.device)
    if max_q == 0 or num_sequences == 0:
        return result
    side = block_side(q.dtype)
    strides = (*q.stride()[:2], *k.stride()[:2])
    sizes = {"H": num_heads, "G": group, "D": dim, "BLOCK_D": padded(dim)}
    blocks = {"BLOCK_M": min(side, padded(max_q * group)), "BLOCK_N": side}
    if lse is None:
        lse = log_sum_exps(q, k, cu_q, cu_k, max_q, max_k, scale, softcap)
    lse = lse.contiguous()
    weights = lse if query_weights is None else query_weights.float().contiguous()
    _keys_kernel[-(-max_k // side), num_heads, num_sequences](
        q, k, lse, weights, result, cu_q, cu_k, num_keys, *strides, scale * LOG2_E,
        softcap * LOG2_E, HAS_WEIGHTS=query_weights is not None, HAS_CAP=softcap > 0,
        num_warps=4, num_stages=2, **sizes, **blocks,
    )  # fmt: skip
    return result


def log_sum_exps(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """The normalisers of causal softmax attention; arguments as `mass`.

    Returns:
        float32 [Tq, H G], the logarithm of the sum of the exponentials of each query's scores.
    """
    q, k = dense(q), dense(k)
    check(q, k)
    (num_queries, num_query_heads, dim), (_, num_heads, _) = q.shape, k.shape
    group, num_sequences = num_query_heads // num_heads, len(cu_q) - 1
    side = block_side(q.dtype)
    block = min(side, padded(max_q * group))
    query_blocks = -(-max_q * group // block)
    # Few queries would leave most of the device idle; many keep it busy by themselves.
    splits = min(_MAX_SPLITS, -(-max_k // _SPLIT_KEYS)) if query_blocks <= _MAX_SPLITS else 1
    parts = q.new_empty(splits, num_queries, num_query_heads, dtype=torch.float32)
    _queries_kernel[query_blocks * splits, num_heads, num_sequences](
        q, k, parts, cu_q, cu_k, num_queries, splits, *q.stride()[:2], *k.stride()[:2],
        scale * LOG2_E, softcap * LOG2_E, H=num_heads, G=group, D=dim, HAS_CAP=softcap > 0,
        BLOCK_D=padded(dim), BLOCK_M=block, BLOCK_N=side, num_warps=4, num_stages=2,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.logsumexp(dim=0)
