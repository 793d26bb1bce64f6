"""Capped attention scores, as all kernels compute them (Gemma 2, arXiv 2408.00118, section 2)."""

import triton
import triton.language as tl

from .launch import LOG2_E

_TWO_LOG2_E = tl.constexpr(2 * LOG2_E)


@triton.jit
def capped(scores, cap, HAS_CAP: tl.constexpr):
    """`cap * tanh(scores / cap)` of scores and a cap in the same unit; without a cap, the scores.

    Out of exponentials: beyond their range they are infinite or 0, and tanh is 1 or -1.
    """
    if HAS_CAP:
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores / cap * _TWO_LOG2_E) + 1.0))
    return scores
