"""What the launches of all kernels share."""

import os

import torch
import triton
from torch import Tensor

LOG2_E = 1.4426950408889634
_MIN_DOT = 16  # the smallest side of a matrix product on tensor cores
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_DIM = 256


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device, instead of being compiled.

    Triton decides that by TRITON_INTERPRET, read when a kernel is defined.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def padded(size: int, least: int = _MIN_DOT) -> int:
    """The power of two that a side of a tile is padded to."""
    return max(least, int(triton.next_power_of_2(size)))


def block_side(dtype: torch.dtype) -> int:
    """Queries, and keys, of one tile of scores; float32 has no tensor cores to fill."""
    return 32 if dtype == torch.float32 else 64


def check(q: Tensor, *others: Tensor) -> None:
    """Assert what the kernels take for granted about queries, keys and values."""
    assert q.dtype in _DTYPES, f"the triton kernels do not compute {q.dtype}"
    assert q.shape[-1] <= _MAX_DIM, f"head_dim {q.shape[-1]} is more than {_MAX_DIM}"
    for x in others:
        assert x.device == q.device, f"queries are on {q.device}, keys or values on {x.device}"
        assert x.dtype == q.dtype, f"queries are {q.dtype}, keys or values {x.dtype}"
        assert x.shape[-1] == q.shape[-1], (x.shape, q.shape)


def dense(x: Tensor) -> Tensor:
    """The tensor, copied unless the numbers of one head lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


if is_interpreted():
    from .interpreter import accept_new_numpy, compute_bfloat16

    accept_new_numpy()
    compute_bfloat16()
