"""One query per sequence over what its rows keep in pages.

A part is some of the tokens of one row (a kv head of a sequence), with all query heads of the group
in one tile, so that every key and value is read once. How a row is cut depends on its own length
only; a second kernel merges the parts by their log-sum-exp. Lengths, tables and slots are read on
the device, so a launch can be replayed in a CUDA graph while rows grow. Its programs then take
their parts from a list that is made on the device, too (`work.py`): how many there are follows from
the rows as they are, not from the longest that could be.

Shapes: N sequences, S slots, H kv heads, G query heads per kv head, D head dim, P pages, W page
table entries of a row.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saqqara.workers.fixed_sizes import MAX_SPLITS, SPLIT_TOKENS, most_splits

from .launch import LOG2_E, check, dense, padded
from .softcap import capped
from .work import WorkList, num_programs, num_splits_of

BLOCK_TOKENS = 64
_MASS_TOKENS = 256
_LOG2_E = tl.constexpr(LOG2_E)

# What changes from step to step must not choose the machine code: each variant compiles for
# seconds. These differ in divisibility by 16, and gain nothing from it.
_ANY_ALIGNMENT = ["lengths", "slots", "page_table", "first", "work", "num_work"]
_ANY_VALUE = [
    *("table_stride_n", "table_stride_h", "length_stride_n", "length_stride_h"),
    *("scores_stride", "width", "splits"),
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
        window: the rows are rings of so many tokens, the one at position p at place p mod window;
            0: they are in order.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor
    max_length: int
    slots: Tensor | None = None
    first: Tensor | None = None
    window: int = 0

    @property
    def begins(self) -> Tensor:
        """What says where a row's entries begin: by its values, or else by its strides alone."""
        return self.page_table if self.first is None else self.first

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self.k_pages.shape[1]


@triton.jit
def _find_row(row, lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS: tl.constexpr):
    """The entry of a row in the tables, its kv head and its length."""
    entry = row // H
    head = row % H
    if HAS_SLOTS:
        entry = tl.load(slots + entry).to(tl.int32)
    place = lengths + entry.to(tl.int64) * length_stride_n + head * length_stride_h
    length = tl.load(place, mask=entry >= 0, other=0)
    return entry.to(tl.int64), head, length


@triton.jit
def entries_of(
    entry, head, first, table_stride_n, table_stride_h, HAS_FIRST: tl.constexpr
):  # fmt: skip
    """Where the page table entries of a row begin; of no sequence's anywhere."""
    place = entry * table_stride_n + head * table_stride_h
    if HAS_FIRST:
        place = tl.load(first + place, mask=entry >= 0, other=0)
    return place


@triton.jit
def _attend_stored(
    q_GD, k_pages, v_pages, table_row, scores_row, start, stop, scale, cap, best, total, acc,
    of_group, of_dim, d,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, HAS_SCORES: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Attend to the stored tokens `[start, stop)` of a row, block by block."""
    for first in range(start, stop, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        valid = t < stop
        pages = tl.load(table_row + t // PAGE, mask=valid, other=0).to(tl.int64)
        refs = (pages * PAGE + t % PAGE)[:, None] * D + d[None, :]
        k_TD = tl.load(k_pages + refs, mask=valid[:, None] & of_dim[None, :], other=0.0)
        s_GT = tl.dot(q_GD, tl.trans(k_TD), input_precision="ieee") * scale
        s_GT = capped(s_GT, cap, HAS_CAP)
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


@triton.jit
def _attend_part(
    row, split, q, out, parts, parts_lse, lse, scores,
    k_pages, v_pages, page_table, first, lengths, slots,
    q_stride_n, q_stride_h, table_stride_n, table_stride_h, length_stride_n, length_stride_h,
    scores_stride, H, scale, cap,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_LSE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One part of one row; scores in units of log 2.

    An online softmax: `best` is the largest score so far, `total` the sum of the weights relative
    to it and `acc` that of the weighted values. In order: which tokens are this part's; these,
    block by block; what came out, as the row's output or as a part for `_merge_kernel`.
    """
    entry, head, length = _find_row(
        row, lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS
    )
    num_splits = num_splits_of(length, SPLIT_TOKENS, MAX_SPLITS)
    if split < num_splits:
        blocks = (length + BLOCK_T - 1) // BLOCK_T
        span = (blocks + num_splits - 1) // num_splits * BLOCK_T
        start = split * span
        stop = tl.minimum(start + span, length)

        n = (row // H).to(tl.int64)
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        of_group, of_dim = g < G, d < D
        tile = of_group[:, None] & of_dim[None, :]
        q_heads = (head * G + g).to(tl.int64)
        q_GD = tl.load(
            q + n * q_stride_n + q_heads[:, None] * q_stride_h + d[None, :], mask=tile, other=0.0
        )
        begin = entries_of(entry, head, first, table_stride_n, table_stride_h, HAS_FIRST)
        table_row = page_table + begin
        scores_row = scores + (row * G + g).to(tl.int64) * scores_stride

        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        best, total, acc = _attend_stored(
            q_GD, k_pages, v_pages, table_row, scores_row, start, stop, scale, cap,
            best, total, acc, of_group, of_dim, d, D, PAGE, BLOCK_T, HAS_SCORES, HAS_CAP,
        )  # fmt: skip

        some = total > 0.0
        acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
        log = tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        if num_splits == 1:
            heads = n * H * G + q_heads
            tl.store(out + heads[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=tile)
            if HAS_LSE:
                tl.store(lse + row * G + g, log / _LOG2_E, mask=of_group)
        else:
            part = (row.to(tl.int64) * MAX_SPLITS + split) * G + g
            tl.store(parts + part[:, None] * D + d[None, :], acc, mask=tile)
            tl.store(parts_lse + part, log, mask=of_group)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _decode_kernel(
    q, out, parts, parts_lse, lse, scores,
    k_pages, v_pages, page_table, first, lengths, slots, work, num_work, splits,
    q_stride_n, q_stride_h, table_stride_n, table_stride_h, length_stride_n, length_stride_h,
    scores_stride, H, scale, cap,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_WORK: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_LSE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One part of one row; with a list of the parts, as many programs as are launched share it."""
    program = tl.program_id(0)
    num_parts = program + 1
    if HAS_WORK:
        num_parts = tl.load(num_work)
    for place in range(program, num_parts, tl.num_programs(0)):
        row, split = place // splits, place % splits
        if HAS_WORK:
            part = tl.load(work + place)
            row, split = part // MAX_SPLITS, part % MAX_SPLITS
        _attend_part(
            row, split, q, out, parts, parts_lse, lse, scores,
            k_pages, v_pages, page_table, first, lengths, slots, q_stride_n, q_stride_h,
            table_stride_n, table_stride_h, length_stride_n, length_stride_h,
            scores_stride, H, scale, cap, G, D, PAGE, BLOCK_G, BLOCK_D, BLOCK_T,
            SPLIT_TOKENS, MAX_SPLITS, HAS_SLOTS, HAS_FIRST, HAS_SCORES, HAS_LSE, HAS_CAP,
        )  # fmt: skip


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _merge_kernel(
    out, parts, parts_lse, lse, lengths, slots, length_stride_n, length_stride_h, H,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """The parts of one row to the output of one query head, all loaded at once."""
    row, g = tl.program_id(0), tl.program_id(1)
    _entry, head, length = _find_row(
        row, lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS
    )
    num_splits = num_splits_of(length, SPLIT_TOKENS, MAX_SPLITS)
    if num_splits == 1:
        return
    s, d = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_D)
    part = (row.to(tl.int64) * MAX_SPLITS + s) * G + g
    log_S = tl.load(parts_lse + part, mask=s < num_splits, other=float("-inf"))
    tile = (s < num_splits)[:, None] & (d < D)[None, :]
    parts_SD = tl.load(parts + part[:, None] * D + d[None, :], mask=tile, other=0.0)
    best = tl.max(log_S, axis=0)  # finite: the first part is never empty
    weights_S = tl.exp2(log_S - best)
    total = tl.sum(weights_S, axis=0)
    merged_D = tl.sum(parts_SD * weights_S[:, None], axis=0) / total
    query = (row // H).to(tl.int64) * H * G + head * G + g
    tl.store(out + query * D + d, merged_D.to(out.dtype.element_ty), mask=d < D)
    if HAS_LSE:
        tl.store(lse + row * G + g, (best + tl.log2(total)) / _LOG2_E)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _token_mass_kernel(
    mass, scores, lse, lengths, slots, length_stride_n, length_stride_h, H, width,
    G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Softmax weights of one block of a row's tokens, summed over the group; 0 past its end."""
    row = tl.program_id(0)
    _entry, _head, length = _find_row(
        row, lengths, slots, length_stride_n, length_stride_h, H, HAS_SLOTS
    )
    g = tl.arange(0, BLOCK_G)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    seen = (g < G)[:, None] & (t < length)[None, :]
    place = scores + (row * G + g).to(tl.int64)[:, None] * width + t[None, :]
    s_GT = tl.load(place, mask=seen, other=0.0)
    log = tl.load(lse + row * G + g, mask=g < G, other=0.0) * _LOG2_E
    weights = tl.where(seen, tl.exp2(s_GT - log[:, None]), 0.0)
    tl.store(mass + row.to(tl.int64) * width + t, tl.sum(weights, axis=0), mask=t < width)


def decode(
    q: Tensor,
    rows: PagedRows,
    scale: float,
    return_mass: bool = False,
    lse: Tensor | None = None,
    split_tokens: int = SPLIT_TOKENS,
    work: WorkList | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query per sequence over its rows.

    Args:
        q: [N, H G, D], bfloat16, float16 or float32.
        rows: what is attended to.
        scale: factor of the scores.
        return_mass: also return the attention on every token; then there is no `lse`.
        lse: float32 [N, H G], contiguous: receives the logarithm of the sum of the exponentials of
            each query's scores. None: not wanted.
        split_tokens: a row is cut into parts of about this many tokens, at most 32.
        work: the parts of these rows, cut alike; None: the launch has as many programs as parts of
            rows that are all of `rows.max_length`.
        softcap: of the scores; 0: they have none.

    Returns:
        [N, H G, D] and, with `return_mass`, float32 [N, H, max_length]: summed over the group, 0
        past the end of a row; else None.
    """
    q = dense(q)
    check(q, rows.k_pages, rows.v_pages)
    (num_sequences, num_query_heads, dim), num_heads = q.shape, rows.lengths.shape[1]
    num_rows, group = num_sequences * num_heads, num_query_heads // num_heads
    new_floats = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    width = rows.max_length
    splits = most_splits(width, split_tokens)
    parts = new_floats(num_rows * MAX_SPLITS * group * dim if splits > 1 else 0)
    parts_lse = new_floats(num_rows * MAX_SPLITS * group if splits > 1 else 0)
    scores = new_floats(num_rows * group * width if return_mass else 0)
    assert lse is None or not return_mass, "masses and normalisers are not wanted at once"
    has_lse = return_mass or lse is not None
    if lse is None:
        lse = new_floats(num_rows * group if return_mass else 0)
    slots = rows.lengths if rows.slots is None else rows.slots
    of_rows = (*rows.lengths.stride(), num_heads)
    sizes = {"G": group, "HAS_SLOTS": rows.slots is not None}
    dims = {"D": dim, "BLOCK_D": padded(dim)}
    cuts = {"SPLIT_TOKENS": split_tokens, "MAX_SPLITS": MAX_SPLITS, "HAS_LSE": has_lse}
    block_g = padded(group)
    assert rows.page_table.stride(-1) == 1, "the page table of a row must lie together"
    if num_rows == 0:
        return out, new_floats(num_sequences, num_heads, width).zero_() if return_mass else None
    num_parts, listed = num_rows * splits, (rows.lengths, rows.lengths)
    if work is not None:
        assert work.split_tokens == split_tokens, "the list is of rows that are cut otherwise"
        num_parts, listed = min(num_parts, num_programs(q.device)), (work.parts, work.count)
    _decode_kernel[(num_parts,)](
        q, out, parts, parts_lse, lse, scores, rows.k_pages, rows.v_pages,
        rows.page_table, rows.begins, rows.lengths, slots, *listed, splits,
        *q.stride()[:2], *rows.begins.stride()[:2], *rows.lengths.stride(), width, num_heads,
        scale * LOG2_E, softcap * LOG2_E, HAS_CAP=softcap > 0, PAGE=rows.page_tokens,
        BLOCK_G=block_g, BLOCK_T=BLOCK_TOKENS, HAS_FIRST=rows.first is not None,
        HAS_WORK=work is not None, HAS_SCORES=return_mass,
        num_warps=4, num_stages=3, **sizes, **dims, **cuts,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[num_rows, group](
            out, parts, parts_lse, lse, rows.lengths, slots, *of_rows, **sizes, **dims, **cuts
        )
    if not return_mass:
        return out, None
    mass = new_floats(num_sequences, num_heads, width)
    if width:
        _token_mass_kernel[num_rows, -(-width // _MASS_TOKENS)](
            mass, scores, lse, rows.lengths, slots, *of_rows, width, BLOCK_G=block_g,
            BLOCK_T=_MASS_TOKENS, **sizes,
        )  # fmt: skip
    return out, mass
