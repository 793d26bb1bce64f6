"""What a step does to rows' lengths, and how rows are cut into parts, listed on the device.

A recorded launch has a fixed number of programs, while rows grow. So one launch a step lists, for
every layer, the parts that its rows have now, and the programs of the layer's decode launch take
from that list in turn.

Shapes: S slots, L layers, H kv heads, N sequences, C parts at most.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saqqara.workers.fixed_sizes import MAX_SPLITS, SPLIT_TOKENS, most_splits

_BLOCK_ROWS = 1024
_PROGRAMS_PER_PROCESSOR = 4  # twice what fits at once, so that a long part delays no other for long
_INTERPRETED_PROGRAMS = 3


@dataclass(frozen=True, slots=True)
class WorkList:
    """The parts of one layer's rows.

    Attributes:
        parts: int32 [C], `row * MAX_SPLITS + split`, row `n * H + h`; only the first `count` count.
        count: int32 [1].
        split_tokens: tokens of a part, about.
    """

    parts: Tensor
    count: Tensor
    split_tokens: int


@triton.jit
def num_splits_of(length, SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Parts of a row; an empty one has one part, which writes zeros."""
    return tl.minimum(tl.maximum((length + SPLIT_TOKENS - 1) // SPLIT_TOKENS, 1), MAX_SPLITS)


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs that share the parts of a layer: enough to keep the device busy."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_PROCESSOR * processors


@triton.jit(
    do_not_specialize=["num_rows", "capacity", "stride_s", "stride_l", "stride_h", "H"],
    do_not_specialize_on_alignment=["lengths", "slots"],
)
def _list_kernel(
    parts, counts, lengths, slots, num_rows, capacity, stride_s, stride_l, stride_h, H,
    SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The list of one layer, rows in order."""
    layer = tl.program_id(0).to(tl.int64)
    listed = parts + layer * capacity
    num_listed = 0
    for first in range(0, num_rows, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        slot = tl.load(slots + rows // H, mask=rows < num_rows, other=-1).to(tl.int64)
        places = lengths + slot * stride_s + layer * stride_l + rows % H * stride_h
        length = tl.load(places, mask=slot >= 0, other=0)
        splits = tl.where(rows < num_rows, num_splits_of(length, SPLIT_TOKENS, MAX_SPLITS), 0)
        target = num_listed + tl.cumsum(splits, axis=0) - splits
        for split in range(tl.max(splits, axis=0)):
            tl.store(listed + target + split, rows * MAX_SPLITS + split, mask=split < splits)
        num_listed += tl.sum(splits, axis=0)
    tl.store(counts + layer, num_listed)


@triton.jit(
    do_not_specialize=["num_rows", "stride_s"],
    do_not_specialize_on_alignment=["lengths", "slots"],
)
def _lengthen_kernel(
    lengths, slots, caps, num_rows, stride_s, BLOCK_R: tl.constexpr, HAS_CAPS: tl.constexpr
):  # fmt: skip
    """The rows of one sequence."""
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    for first in range(0, num_rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        of_slot = (row < num_rows) & (slot >= 0)
        place = lengths + slot * stride_s + row
        length = tl.load(place, mask=of_slot, other=0) + 1
        if HAS_CAPS:
            length = tl.minimum(length, tl.load(caps + row, mask=of_slot, other=0))
        tl.store(place, length, mask=of_slot)


def lengthen(lengths: Tensor, slots: Tensor, caps: Tensor | None = None) -> None:
    """Count a new token in every row of some sequences.

    Args:
        lengths: int32 [S, L, H], contiguous, tokens of each row; those of `slots` grow by 1.
        slots: int64 [N], contiguous, different ones; negative: no sequence.
        caps: int32 [L, H], contiguous, what rows never outgrow; None: they all grow.
    """
    assert lengths.is_contiguous(), "the rows of a slot must lie together"
    if len(slots):
        _lengthen_kernel[(len(slots),)](
            lengths, slots, lengths if caps is None else caps, lengths[0].numel(),
            lengths.stride(0), BLOCK_R=_BLOCK_ROWS, HAS_CAPS=caps is not None,
        )  # fmt: skip


def list_work(
    lengths: Tensor, slots: Tensor, max_length: int, split_tokens: int = SPLIT_TOKENS
) -> list[WorkList | None]:
    """What the decode launch of each layer has to do.

    Args:
        lengths: int32 [S, L, H], tokens of each row.
        slots: int64 [N], contiguous, whose rows; negative: no sequence.
        max_length: no row is longer; it fixes the size of the lists.
        split_tokens: a row is cut into parts of about this many tokens, at most 32.

    Returns:
        A list for each layer; None where no row can have more than one part, so that nothing needs
        to be listed.
    """
    (_, num_layers, num_heads), splits = lengths.shape, most_splits(max_length, split_tokens)
    num_rows = len(slots) * num_heads
    if splits == 1 or num_rows == 0:
        return [None] * num_layers
    capacity = num_rows * splits
    parts, counts = (
        torch.empty((num_layers, size), dtype=torch.int32, device=lengths.device)
        for size in (capacity, 1)
    )
    _list_kernel[(num_layers,)](
        parts, counts, lengths, slots, num_rows, capacity, *lengths.stride(), num_heads,
        SPLIT_TOKENS=split_tokens, MAX_SPLITS=MAX_SPLITS, BLOCK_R=_BLOCK_ROWS,
    )  # fmt: skip
    return [WorkList(*of_layer, split_tokens) for of_layer in zip(parts, counts, strict=True)]
