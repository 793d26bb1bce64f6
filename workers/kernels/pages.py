"""Moves keys and values: into pages after prefill, behind a row while decoding, to a row's front.

Each kernel moves the key and the value of a token together, straight from where they are.

Shapes: T packed tokens, H kv heads, D head dim, P pages, R rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import dense, padded

_MOVE_TOKENS = 64


@triton.jit(do_not_specialize_on_alignment=["indices"])
def _fill_kernel(
    k, v, k_pages, v_pages, indices, jobs, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_INDICES: tl.constexpr,
):  # fmt: skip
    """One page; for the jobs see `fill_pages`."""
    job = jobs + tl.program_id(0) * 5
    page, head = tl.load(job), tl.load(job + 1)
    first, count = tl.load(job + 2), tl.load(job + 3)
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    # The rest of a last page repeats its last token, so that no stale NaN stays in it.
    token = first + tl.minimum(t, count - 1)
    if HAS_INDICES:
        token = tl.load(indices + token)
    token += tl.load(job + 4)
    tile = (t < PAGE)[:, None] & (d < D)[None, :]
    target = (page * PAGE + t)[:, None] * D + d[None, :]
    k_TD = tl.load(k + token[:, None] * k_stride_t + head * k_stride_h + d[None, :], mask=tile)
    tl.store(k_pages + target, k_TD, mask=tile)
    v_TD = tl.load(v + token[:, None] * v_stride_t + head * v_stride_h + d[None, :], mask=tile)
    tl.store(v_pages + target, v_TD, mask=tile)


def fill_pages(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, jobs: Tensor, indices: Tensor | None
) -> None:
    """Fill pages with selected tokens, for any number of heads and sequences at once.

    Args:
        k: keys, [T, H, D].
        v: values, [T, H, D].
        k_pages: [P, page_tokens, D], written.
        v_pages: the same for values.
        jobs: int64 [pages, 5], one page each: its id, the head, where its tokens begin, how many
            they are, 1 to page_tokens, and where their sequence begins in `k` and `v`.
        indices: int64; with it, jobs begin at entries of `indices`, whose values are tokens of
            their sequence. None: they begin at tokens of it.
    """
    k, v = dense(k), dense(v)
    _, page_tokens, dim = k_pages.shape
    if len(jobs) == 0:
        return
    _fill_kernel[(len(jobs),)](
        k, v, k_pages, v_pages, jobs if indices is None else indices, jobs,
        *k.stride()[:2], *v.stride()[:2], D=dim, PAGE=page_tokens,
        BLOCK_T=padded(page_tokens, 1), BLOCK_D=padded(dim, 1), HAS_INDICES=indices is not None,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["refs"])
def _append_kernel(
    k, v, k_tokens, v_tokens, refs, k_stride_t, k_stride_h, v_stride_t, v_stride_h, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of one head."""
    row = tl.program_id(0)
    token, head = (row // H).to(tl.int64), row % H
    d = tl.arange(0, BLOCK_D)
    target = tl.load(refs + row) * D + d
    k_D = tl.load(k + token * k_stride_t + head * k_stride_h + d, mask=d < D)
    tl.store(k_tokens + target, k_D, mask=d < D)
    v_D = tl.load(v + token * v_stride_t + head * v_stride_h + d, mask=d < D)
    tl.store(v_tokens + target, v_D, mask=d < D)


def append_tokens(k: Tensor, v: Tensor, k_tokens: Tensor, v_tokens: Tensor, refs: Tensor) -> None:
    """Store new tokens where they belong.

    Args:
        k: keys, [T, H, D].
        v: values, [T, H, D].
        k_tokens: all pages token by token, [P page_tokens, D], written.
        v_tokens: the same for values.
        refs: int64 [T, H], contiguous: the row of `k_tokens` that each goes to.
    """
    k, v = dense(k), dense(v)
    num_tokens, num_heads, dim = k.shape
    assert refs.is_contiguous()
    if num_tokens == 0:
        return
    _append_kernel[(num_tokens * num_heads,)](
        k, v, k_tokens, v_tokens, refs, *k.stride()[:2], *v.stride()[:2], num_heads,
        D=dim, BLOCK_D=padded(dim, 1), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["entries", "indices", "starts", "counts"])
def _compact_kernel(
    tokens_a, tokens_b, entries, flat_pages, indices, starts, counts,
    D: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row, of keys or of values; from its front on, whole pages at a time.

    Indices ascend, so a token never moves backwards: what a round writes lies before all that
    later rounds read. Within a round everything is read before anything is written.
    """
    row = tl.program_id(0)
    first, start = tl.load(entries + row), tl.load(starts + row)
    count = tl.load(counts + row)
    tokens = tokens_a if tl.program_id(1) == 0 else tokens_b
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    padded_count = (count + PAGE - 1) // PAGE * PAGE
    for block in range(0, padded_count, SPAN):
        target = block + t
        moved = (t < SPAN) & (target < padded_count)
        kept = tl.minimum(target, count - 1)
        source = tl.load(indices + start + kept, mask=moved, other=0)
        moved = moved & (source != target)
        from_page = tl.load(flat_pages + first + source // PAGE, mask=moved, other=0).to(tl.int64)
        to_page = tl.load(flat_pages + first + target // PAGE, mask=moved, other=0).to(tl.int64)
        tile = moved[:, None] & (d < D)[None, :]
        from_refs = (from_page * PAGE + source % PAGE)[:, None] * D + d[None, :]
        to_refs = (to_page * PAGE + target % PAGE)[:, None] * D + d[None, :]
        numbers = tl.load(tokens + from_refs, mask=tile)
        tl.debug_barrier()
        tl.store(tokens + to_refs, numbers, mask=tile)


def compact_tokens(
    k_pages: Tensor,
    v_pages: Tensor,
    flat_pages: Tensor,
    entries: Tensor,
    indices: Tensor,
    starts: Tensor,
    counts: Tensor,
) -> None:
    """Move the kept tokens of rows to their fronts, in place, and fill up their last pages.

    No page that is written may belong to another row, too.

    Args:
        k_pages: [P, page_tokens, D].
        v_pages: the same for values.
        flat_pages: int32, the page tables of all rows, one after the other.
        entries: int64 [R], where the table of each row begins in `flat_pages`.
        indices: int64, the places that rows keep, ascending in each row.
        starts: int64 [R], where each row begins in `indices`.
        counts: int64 [R], how many tokens each keeps, at least 1.
    """
    _, page_tokens, dim = k_pages.shape
    if len(entries) == 0:
        return
    span = page_tokens * max(1, _MOVE_TOKENS // page_tokens)
    _compact_kernel[len(entries), 2](
        k_pages, v_pages, entries, flat_pages, indices, starts, counts,
        D=dim, PAGE=page_tokens, SPAN=span, BLOCK_T=padded(span, 1), BLOCK_D=padded(dim, 1),
    )  # fmt: skip
