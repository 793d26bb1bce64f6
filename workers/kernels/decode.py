"""One query per sequence over what its rows keep in pages.

A program takes one row (a kv head of a sequence) and one part of its tokens, with all query heads
of the group in one tile, so that every key and value is read once. How a row is cut depends on its
own length only; a second kernel merges the parts by their log-sum-exp. Lengths, tables and slots
are read on the device and the grid is fixed by capacity, so a launch can be replayed in a CUDA
graph while rows grow.

Shapes: N sequences, S slots, H kv heads, G query heads per kv head, D head dim, P pages, W page
table entries of a row.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saqqara.workers.fixed_sizes import MAX_SPLITS, SPLIT_TOKENS

from .launch import LOG2_E, check, dense, padded

BLOCK_TOKENS = 64
_MASS_TOKENS = 256

# What changes from step to step must not choose the machine code: each variant compiles for
# seconds. These differ in divisibility by 16, and gain nothing from it.
_ANY_ALIGNMENT = ["lengths", "slots", "page_table", "first"]
_ANY_VALUE = [
    *("table_stride_n", "table_stride_h", "length_stride_n", "length_stride_h"),
    *("scores_stride", "width"),
]


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of one layer, as the kernel finds them.

    Attributes:
        k_pages, v_pages: [P, page_tokens, D], contiguous.
        page_table: int32 [N or S, H, W]; with `first` those of all rows, int32 [E].
        lengths: int32 [N or S, H], tokens of each row, a new one included.
        max_length: no row is longer; it fixes the grid.
        slots: int32 [N], which entry of table and lengths is whose; a negative one stands for no
            sequence (zeros come out). None: entry n is sequence n.
        first: int64 [N or S, H], where the entries of each row begin in `page_table`; None where
            that has a place for every row.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor
    max_length: int
    slots: Tensor | None = None
    first: Tensor | None = None

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self.k_pages.shape[1]


@triton.jit
def _row_of_program(lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS: tl.constexpr):
    """The entry of this program's row in the tables, its kv head and its length."""
    row = tl.program_id(0)
    entry = row // H
    head = row % H
    if HAS_SLOTS:
        entry = tl.load(slots + entry).to(tl.int32)
    place = lengths + entry.to(tl.int64) * length_stride_n + head * length_stride_h
    length = tl.load(place, mask=entry >= 0, other=0)
    return row, entry.to(tl.int64), head, length


@triton.jit
def _num_splits(length, SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    return tl.minimum(tl.maximum((length + SPLIT_TOKENS - 1) // SPLIT_TOKENS, 1), MAX_SPLITS)


@triton.jit
def _attend_new(
    q_GD, place_k, place_v, k_pages, v_pages, table_row, scores_row, stored, scale,
    total, acc, of_group, of_dim, d,
    D: tl.constexpr, PAGE: tl.constexpr, HAS_SCORES: tl.constexpr,
):  # fmt: skip
    """Store the new token, and attend to it first of all.

    It comes from registers; nobody reads it from its page in this launch.
    """
    k_D = tl.load(place_k, mask=of_dim, other=0.0)
    v_D = tl.load(place_v, mask=of_dim, other=0.0)
    page = tl.load(table_row + stored // PAGE).to(tl.int64)
    target = (page * PAGE + stored % PAGE) * D + d
    tl.store(k_pages + target, k_D, mask=of_dim)
    tl.store(v_pages + target, v_D, mask=of_dim)
    score = tl.sum(q_GD.to(tl.float32) * k_D[None, :].to(tl.float32), axis=1) * scale
    if HAS_SCORES:
        tl.store(scores_row + stored, score, mask=of_group)
    return score, total + 1.0, acc + v_D[None, :].to(tl.float32)


@triton.jit
def _attend_stored(
    q_GD, k_pages, v_pages, table_row, scores_row, start, stop, scale, best, total, acc,
    of_group, of_dim, d,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, HAS_SCORES: tl.constexpr,
):  # fmt: skip
    """Attend to the stored tokens `[start, stop)` of a row, block by block."""
    for first in range(start, stop, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        valid = t < stop
        pages = tl.load(table_row + t // PAGE, mask=valid, other=0).to(tl.int64)
        refs = (pages * PAGE + t % PAGE)[:, None] * D + d[None, :]
        k_TD = tl.load(k_pages + refs, mask=valid[:, None] & of_dim[None, :], other=0.0)
        s_GT = tl.dot(q_GD, tl.trans(k_TD), input_precision="ieee") * scale
        s_GT = tl.where(valid[None, :], s_GT, float("-inf"))
        if HAS_SCORES:
            tl.store(
                scores_row[:, None] + t[None, :], s_GT, mask=of_group[:, None] & valid[None, :]
            )
        higher = tl.maximum(best, tl.max(s_GT, axis=1))
        rescale = tl.exp2(best - higher)
        weights = tl.exp2(s_GT - higher[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        v_TD = tl.load(v_pages + refs, mask=valid[:, None] & of_dim[None, :], other=0.0)
        weighted = tl.dot(weights.to(v_TD.dtype), v_TD, input_precision="ieee")
        acc = acc * rescale[:, None] + weighted
        best = higher
    return best, total, acc


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _decode_kernel(
    q, out, parts, parts_lse, lse, scores, new_k, new_v,
    k_pages, v_pages, page_table, first, lengths, slots,
    q_stride_n, q_stride_h, new_k_stride_n, new_k_stride_h, new_v_stride_n, new_v_stride_h,
    table_stride_n, table_stride_h, length_stride_n, length_stride_h,
    scores_stride, H, scale,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_NEW: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One part of one row; scores in units of log 2.

    An online softmax: `best` is the largest score so far, `total` the sum of the weights relative
    to it and `acc` that of the weighted values. In order: which tokens are this part's; the new
    token, if the launch brings one, which the first part attends to and stores; the stored tokens,
    block by block; what came out, as the row's output or as a part for `_merge_kernel`.
    """
    row, entry, head, length = _row_of_program(
        lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS
    )
    split = tl.program_id(1)
    num_splits = _num_splits(length, SPLIT_TOKENS, MAX_SPLITS)
    if split >= num_splits:
        return
    blocks = (length + BLOCK_T - 1) // BLOCK_T
    span = (blocks + num_splits - 1) // num_splits * BLOCK_T
    start = split * span
    stored = length
    if HAS_NEW:
        stored = tl.maximum(length - 1, 0)
    stop = tl.minimum(start + span, stored)

    n = row // H
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    of_group, of_dim = g < G, d < D
    tile = of_group[:, None] & of_dim[None, :]
    q_heads = (head * G + g).to(tl.int64)
    q_GD = tl.load(
        q + n.to(tl.int64) * q_stride_n + q_heads[:, None] * q_stride_h + d[None, :],
        mask=tile, other=0.0,
    )  # fmt: skip
    place = entry * table_stride_n + head * table_stride_h
    if HAS_FIRST:
        place = tl.load(first + place, mask=entry >= 0, other=0)
    table_row = page_table + place
    scores_row = scores + (row * G + g).to(tl.int64) * scores_stride

    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if HAS_NEW:  # noqa: SIM102 - Triton decides the outer one while compiling
        if (split == 0) & (length > 0):
            place_k = new_k + n.to(tl.int64) * new_k_stride_n + head * new_k_stride_h + d
            place_v = new_v + n.to(tl.int64) * new_v_stride_n + head * new_v_stride_h + d
            best, total, acc = _attend_new(
                q_GD, place_k, place_v, k_pages, v_pages, table_row, scores_row, stored, scale,
                total, acc, of_group, of_dim, d, D, PAGE, HAS_SCORES,
            )  # fmt: skip
    best, total, acc = _attend_stored(
        q_GD, k_pages, v_pages, table_row, scores_row, start, stop, scale, best, total, acc,
        of_group, of_dim, d, D, PAGE, BLOCK_T, HAS_SCORES,
    )  # fmt: skip

    some = total > 0.0
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    log = tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    if num_splits == 1:
        heads = n.to(tl.int64) * H * G + q_heads
        tl.store(out + heads[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=tile)
        if HAS_LSE:
            tl.store(lse + row * G + g, log, mask=of_group)
    else:
        part = (row.to(tl.int64) * MAX_SPLITS + split) * G + g
        tl.store(parts + part[:, None] * D + d[None, :], acc, mask=tile)
        tl.store(parts_lse + part, log, mask=of_group)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _merge_kernel(
    out, parts, parts_lse, lse, lengths, slots, length_stride_n, length_stride_h, H,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """The parts of one row to its output."""
    row, _entry, head, length = _row_of_program(
        lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS
    )
    num_splits = _num_splits(length, SPLIT_TOKENS, MAX_SPLITS)
    if num_splits == 1:
        return
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    of_group = g < G
    tile = of_group[:, None] & (d < D)[None, :]
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for split in range(num_splits):
        part = (row.to(tl.int64) * MAX_SPLITS + split) * G + g
        log = tl.load(parts_lse + part, mask=of_group, other=0.0)
        part_GD = tl.load(parts + part[:, None] * D + d[None, :], mask=tile, other=0.0)
        higher = tl.maximum(best, log)  # finite: the first part is never empty
        rescale = tl.exp2(best - higher)
        weight = tl.exp2(log - higher)
        total = total * rescale + weight
        acc = acc * rescale[:, None] + part_GD * weight[:, None]
        best = higher
    heads = (row // H).to(tl.int64) * H * G + head * G + g
    acc = acc / total[:, None]
    tl.store(out + heads[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=tile)
    if HAS_LSE:
        tl.store(lse + row * G + g, best + tl.log2(total), mask=of_group)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _token_mass_kernel(
    mass, scores, lse, lengths, slots, length_stride_n, length_stride_h, H, width,
    G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Softmax weights of one block of a row's tokens, summed over the group; 0 past its end."""
    row, _entry, _head, length = _row_of_program(
        lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS
    )
    g = tl.arange(0, BLOCK_G)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    seen = (g < G)[:, None] & (t < length)[None, :]
    place = scores + (row * G + g).to(tl.int64)[:, None] * width + t[None, :]
    s_GT = tl.load(place, mask=seen, other=0.0)
    log = tl.load(lse + row * G + g, mask=g < G, other=0.0)
    weights = tl.where(seen, tl.exp2(s_GT - log[:, None]), 0.0)
    tl.store(mass + row.to(tl.int64) * width + t, tl.sum(weights, axis=0), mask=t < width)


def decode(
    q: Tensor,
    rows: PagedRows,
    scale: float,
    new: tuple[Tensor, Tensor] | None = None,
    return_mass: bool = False,
    lse: Tensor | None = None,
    split_tokens: int = SPLIT_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query per sequence over its rows.

    Args:
        q: [N, H G, D], bfloat16, float16 or float32.
        rows: what is attended to.
        scale: factor of the scores.
        new: keys and values of the newest token of each row, [N, H, D] each. They are stored as
            its last token, `lengths - 1`, and attended to. None: that token is in its page.
        return_mass: also return the attention on every token; then there is no `lse`.
        lse: float32 [N, H G], contiguous: receives the logarithm of the sum of the exponentials of
            each query's scores. None: not wanted.
        split_tokens: a row is cut into parts of about this many tokens, at most 32.

    Returns:
        [N, H G, D] and, with `return_mass`, float32 [N, H, max_length]: summed over the group, 0
        past the end of a row; else None.
    """
    q = dense(q)
    check(q, rows.k_pages, rows.v_pages, *(new or ()))
    (num_sequences, num_query_heads, dim), num_heads = q.shape, rows.lengths.shape[1]
    num_rows, group = num_sequences * num_heads, num_query_heads // num_heads
    new_floats = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    width = rows.max_length
    num_splits = min(MAX_SPLITS, max(1, -(-width // split_tokens)))
    parts = new_floats(num_rows * MAX_SPLITS * group * dim if num_splits > 1 else 0)
    parts_lse = new_floats(num_rows * MAX_SPLITS * group if num_splits > 1 else 0)
    scores = new_floats(num_rows * group * width if return_mass else 0)
    wants_lse = lse is not None
    assert not (wants_lse and return_mass), "masses and normalisers are not wanted at once"
    if lse is None:
        lse = new_floats(num_rows * group if return_mass else 0)
    k, v = (dense(x) for x in new) if new is not None else (q, q)
    slots = rows.lengths if rows.slots is None else rows.slots
    of_rows = (*rows.lengths.stride(), num_heads)
    sizes = {"G": group, "BLOCK_G": padded(group), "HAS_SLOTS": rows.slots is not None}
    dims = {"D": dim, "BLOCK_D": padded(dim)}
    splits = {"SPLIT_TOKENS": split_tokens, "MAX_SPLITS": MAX_SPLITS}
    splits["HAS_LSE"] = return_mass or wants_lse
    assert rows.page_table.stride(-1) == 1, "the page table of a row must lie together"
    first = rows.page_table if rows.first is None else rows.first
    if num_rows == 0:
        return out, new_floats(num_sequences, num_heads, width).zero_() if return_mass else None
    _decode_kernel[num_rows, num_splits](
        q, out, parts, parts_lse, lse, scores, k, v,
        rows.k_pages, rows.v_pages, rows.page_table, first, rows.lengths, slots,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *first.stride()[:2],
        *rows.lengths.stride(), width, num_heads, scale * LOG2_E,
        PAGE=rows.page_tokens, BLOCK_T=BLOCK_TOKENS,
        HAS_FIRST=rows.first is not None, HAS_NEW=new is not None,
        HAS_SCORES=return_mass, num_warps=4, num_stages=3, **sizes, **dims, **splits,
    )  # fmt: skip
    if num_splits > 1:
        _merge_kernel[(num_rows,)](
            out, parts, parts_lse, lse, rows.lengths, slots, *of_rows, **sizes, **dims, **splits
        )
    if not return_mass:
        if wants_lse:
            lse.div_(LOG2_E)
        return out, None
    mass = new_floats(num_sequences, num_heads, width)
    if width:
        _token_mass_kernel[num_rows, -(-width // _MASS_TOKENS)](
            mass, scores, lse, rows.lengths, slots, *of_rows, width, BLOCK_T=_MASS_TOKENS, **sizes
        )
    return out, mass
