"""Rotates queries and keys of a fused projection, and stores keys and values where they belong.

One launch does what follows the projection: the norms of query and key heads, where a model has
them, the rotation of half-rotated pairs in float32, and the write of the new token's key and value.
Queries stay where they are or go to a tensor of their own.

Shapes: T packed tokens, Hq query heads, H kv heads, G query heads per kv head, D head dim, P pages,
S slots, W page table entries of a row.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .decode import PagedRows, entries_of
from .launch import padded
from .norm import normalised

_BLOCK_TOKENS = 4
_IN_PLACE, _TENSORS, _REFS, _ROWS = range(4)  # where keys and values go


class Rotation(NamedTuple):
    """How heads are normalised and rotated.

    Attributes:
        positions: int64 [T], contiguous.
        cos, sin: fp32 [max_position, D / 2], contiguous.
        query_norm, key_norm: [D], the weights of the norms of heads; None for none.
        eps: of these norms.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


@triton.jit
def _heads(
    source, of_tile, positions, cos, sin, weight, d, eps,
    D: tl.constexpr, HAS_NORMS: tl.constexpr,
):  # fmt: skip
    """Both halves of heads, one head a row, rotated and rounded."""
    HALF: tl.constexpr = D // 2
    dtype = source.dtype.element_ty
    places = positions[:, None] * HALF + d[None, :]
    cos_MD = tl.load(cos + places, mask=of_tile, other=0.0)
    sin_MD = tl.load(sin + places, mask=of_tile, other=0.0)
    a_MD = tl.load(source, mask=of_tile, other=0.0).to(tl.float32)
    b_MD = tl.load(source + HALF, mask=of_tile, other=0.0).to(tl.float32)
    if HAS_NORMS:
        square = tl.sum(a_MD * a_MD + b_MD * b_MD, axis=1)[:, None] / D
        of_half = d < HALF
        a_weight = tl.load(weight + d, mask=of_half, other=0.0)[None, :]
        b_weight = tl.load(weight + HALF + d, mask=of_half, other=0.0)[None, :]
        a_MD = normalised(a_MD, a_weight, square, eps).to(tl.float32)
        b_MD = normalised(b_MD, b_weight, square, eps).to(tl.float32)
    return (a_MD * cos_MD - b_MD * sin_MD).to(dtype), (b_MD * cos_MD + a_MD * sin_MD).to(dtype)


@triton.jit
def _last_places(
    tokens, real, head, position, window, page_table, table_first, lengths, slots,
    table_stride_n, table_stride_h, length_stride_n, length_stride_h,
    PAGE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Which stored token each new one becomes, counted over all pages; negative for none."""
    slot = tl.load(slots + tokens, mask=real, other=-1).to(tl.int64)
    of_row = lengths + slot * length_stride_n + head * length_stride_h
    length = tl.load(of_row, mask=slot >= 0, other=0)
    last = tl.maximum(length - 1, 0)
    if HAS_WINDOW:
        last = (position % window).to(tl.int32)
    begin = entries_of(slot, head, table_first, table_stride_n, table_stride_h, HAS_FIRST)
    page = tl.load(page_table + begin + last // PAGE, mask=length > 0, other=0).to(tl.int64)
    return tl.where(length > 0, page * PAGE + last % PAGE, -1)


@triton.jit(
    do_not_specialize=[
        *("table_stride_n", "table_stride_h", "length_stride_n", "length_stride_h", "num_tokens"),
        "window",
    ],
    do_not_specialize_on_alignment=[
        *("positions", "refs", "page_table", "table_first", "lengths", "slots"),
    ],
)
def _rotate_kernel(
    qkv, q, k, v, positions, cos, sin, query_norm, key_norm, refs,
    page_table, table_first, lengths, slots,
    num_tokens, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    table_stride_n, table_stride_h, length_stride_n, length_stride_h, window, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORMS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_WINDOW: tl.constexpr,
    TO: tl.constexpr, IN_PLACE: tl.constexpr, TENSORS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One kv head of a few tokens, with the query heads of its group."""
    first, head = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.program_id(1)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_D)
    t = first + tl.arange(0, BLOCK_T)
    real = t < num_tokens
    of_tile = real[:, None] & (d < HALF)[None, :]
    m = tl.arange(0, BLOCK_M)
    tm = first + m // G
    of_queries = (m < BLOCK_T * G) & (tm < num_tokens)
    of_q_tile = of_queries[:, None] & (d < HALF)[None, :]
    heads = head * G + m % G

    source = qkv + (tm * ((G + 2) * H) + heads)[:, None] * D + d[None, :]
    position = tl.load(positions + tm, mask=of_queries, other=0)
    qa_MD, qb_MD = _heads(source, of_q_tile, position, cos, sin, query_norm, d, eps, D, HAS_NORMS)
    source_k = qkv + (t * ((G + 2) * H) + G * H + head)[:, None] * D + d[None, :]
    position = tl.load(positions + t, mask=real, other=0)
    ka_TD, kb_TD = _heads(source_k, of_tile, position, cos, sin, key_norm, d, eps, D, HAS_NORMS)
    tl.debug_barrier()  # in place: every thread has read before one writes

    target = q + (tm * q_stride_t + heads * q_stride_h)[:, None] + d[None, :]
    tl.store(target, qa_MD, mask=of_q_tile)
    tl.store(target + HALF, qb_MD, mask=of_q_tile)
    if TO == IN_PLACE:
        tl.store(source_k, ka_TD, mask=of_tile)
        tl.store(source_k + HALF, kb_TD, mask=of_tile)
    else:
        if TO == TENSORS:
            target_k = k + (t * k_stride_t + head * k_stride_h)[:, None] + d[None, :]
            target_v = v + (t * v_stride_t + head * v_stride_h)[:, None] + d[None, :]
        else:
            if TO == ROWS:
                places = _last_places(
                    t, real, head, position, window, page_table, table_first, lengths, slots,
                    table_stride_n, table_stride_h, length_stride_n, length_stride_h,
                    PAGE, HAS_FIRST, HAS_WINDOW,
                )  # fmt: skip
            else:
                places = tl.load(refs + t * H + head, mask=real, other=-1)
            of_tile = of_tile & (places >= 0)[:, None]
            target_k = k + places[:, None] * D + d[None, :]
            target_v = v + places[:, None] * D + d[None, :]
        source_v = source_k + H * D
        va_TD = tl.load(source_v, mask=of_tile, other=0.0)
        vb_TD = tl.load(source_v + HALF, mask=of_tile, other=0.0)
        tl.store(target_k, ka_TD, mask=of_tile)
        tl.store(target_k + HALF, kb_TD, mask=of_tile)
        tl.store(target_v, va_TD, mask=of_tile)
        tl.store(target_v + HALF, vb_TD, mask=of_tile)


def rotate_in_place(qkv: Tensor, num_kv_heads: int, rotation: Rotation) -> None:
    """Rotate queries and keys where they are.

    Args:
        qkv: [T, Hq + 2 H, D], contiguous: queries, keys, values.
        num_kv_heads: H.
        rotation: of the T tokens.
    """
    _launch(qkv, num_kv_heads, rotation, _IN_PLACE, _queries(qkv, num_kv_heads), qkv, qkv)


def rotate_to(
    qkv: Tensor, num_kv_heads: int, rotation: Rotation, q: Tensor, k: Tensor, v: Tensor
) -> None:
    """Rotate queries and keys into tensors of their own, and copy the values.

    Args:
        qkv: [T, Hq + 2 H, D], contiguous: queries, keys, values.
        num_kv_heads: H.
        rotation: of the T tokens.
        q: [T, Hq, D], written.
        k: [T, H, D], written.
        v: [T, H, D], written.
    """
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    _launch(qkv, num_kv_heads, rotation, _TENSORS, q, k, v)


def rotate_append(
    qkv: Tensor,
    num_kv_heads: int,
    rotation: Rotation,
    k_tokens: Tensor,
    v_tokens: Tensor,
    refs: Tensor,
) -> Tensor:
    """Rotate queries in place, and store rotated keys, and values, where they are told to go.

    Args:
        qkv: [T, Hq + 2 H, D], contiguous: queries, keys, values.
        num_kv_heads: H.
        rotation: of the T tokens.
        k_tokens: all pages token by token, [P page_tokens, D], written.
        v_tokens: the same for values.
        refs: int64 [T, H], contiguous: the row of `k_tokens` that each goes to; negative: nowhere.

    Returns:
        The queries, [T, Hq, D], a view of `qkv`.
    """
    assert refs.is_contiguous()
    q = _queries(qkv, num_kv_heads)
    _launch(qkv, num_kv_heads, rotation, _REFS, q, k_tokens, v_tokens, refs)
    return q


def rotate_append_rows(
    qkv: Tensor, num_kv_heads: int, rotation: Rotation, rows: PagedRows
) -> Tensor:
    """`rotate_append`, to the last place of rows; what has a negative slot is not stored.

    In a ring that is the place of the token's position.

    Args:
        qkv: [T, Hq + 2 H, D], contiguous: queries, keys, values.
        num_kv_heads: H.
        rotation: of the T tokens.
        rows: with slots; those of the T tokens, which their lengths count already.

    Returns:
        The queries, [T, Hq, D], a view of `qkv`.
    """
    q = _queries(qkv, num_kv_heads)
    _launch(qkv, num_kv_heads, rotation, _ROWS, q, rows.k_pages, rows.v_pages, rows=rows)
    return q


def _queries(qkv: Tensor, num_kv_heads: int) -> Tensor:
    return qkv[:, : qkv.shape[1] - 2 * num_kv_heads]


def _launch(
    qkv: Tensor,
    num_kv_heads: int,
    rotation: Rotation,
    to: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    refs: Tensor | None = None,
    rows: PagedRows | None = None,
) -> None:
    num_tokens, num_heads, dim = qkv.shape
    group = (num_heads - 2 * num_kv_heads) // num_kv_heads
    assert num_heads == (group + 2) * num_kv_heads, "query heads are no multiple of kv heads"
    assert qkv.is_contiguous()
    assert qkv.dtype == q.dtype == k.dtype == v.dtype, (qkv.dtype, q.dtype, k.dtype, v.dtype)
    if num_tokens == 0:
        return
    unused = rotation.positions
    has_norms = rotation.query_norm is not None and rotation.key_norm is not None
    norms = (rotation.query_norm, rotation.key_norm) if has_norms else (qkv, qkv)
    table = (unused, unused, unused, unused)
    row_strides: tuple[int, ...] = (0, 0, 0, 0)
    if rows is not None:
        assert rows.slots is not None
        assert rows.page_table.stride(-1) == 1, "the page table of a row must lie together"
        table = (rows.page_table, rows.begins, rows.lengths, rows.slots)
        row_strides = (*rows.begins.stride()[:2], *rows.lengths.stride())
    window = 0 if rows is None else rows.window
    in_pages = to in (_REFS, _ROWS)
    strides = (0,) * 4 if in_pages else (*k.stride()[:2], *v.stride()[:2])
    block_m, block_d = padded(_BLOCK_TOKENS * group, 1), padded(dim // 2, 1)
    _rotate_kernel[-(-num_tokens // _BLOCK_TOKENS), num_kv_heads](
        qkv, q, k, v, rotation.positions, rotation.cos, rotation.sin, *norms,
        unused if refs is None else refs, *table,
        num_tokens, *q.stride()[:2], *strides, *row_strides, window, rotation.eps,
        H=num_kv_heads, G=group, D=dim, PAGE=1 if rows is None else rows.page_tokens,
        BLOCK_T=_BLOCK_TOKENS, BLOCK_M=block_m, BLOCK_D=block_d, HAS_NORMS=has_norms,
        HAS_FIRST=rows is not None and rows.first is not None, HAS_WINDOW=window > 0,
        TO=to, IN_PLACE=_IN_PLACE, TENSORS=_TENSORS, ROWS=_ROWS,
        num_warps=min(4, max(1, block_m * block_d // 512)),
    )  # fmt: skip
