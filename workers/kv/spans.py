"""Ranges of places, one after the other."""

import numpy as np
from numpy.typing import NDArray


def spans(starts: NDArray[np.int64], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Concatenate the ranges `[start, start + count)`; `starts` and `counts` are [R]."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total, dtype=np.int64)
