"""Ranges of places, one after the other."""

import numpy as np
from numpy.typing import NDArray


def spans(starts: NDArray[np.int64], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Concatenate the ranges `[start, start + count)`; `starts` and `counts` are [R]."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total, dtype=np.int64)


def padded(
    counts: NDArray[np.int32], room: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the tokens of rows, `counts` [R] of them, and fill their `room` [R] with the last one.

    Returns:
        For each place of all rooms, one after the other: the token within its row, and the row.
    """
    row = np.repeat(np.arange(len(counts)), room)
    nth = spans(np.zeros(len(counts), dtype=np.int64), room)
    return np.minimum(nth, counts[row] - 1), row
