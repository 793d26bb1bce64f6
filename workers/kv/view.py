"""What passes between the store and those who write to its pages or attend to them.

Shapes: T new tokens of all sequences, N sequences, L local layers, H local kv heads, P pages,
D head dim.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVView:
    """What attention reads: the pages of one layer's rows of N sequences, and how long they are.

    Row `(n, h)` has its first `lengths[n, h]` tokens in the pages `page_table[n, h]`, in order.
    Entries past `ceil(length / page_tokens)` are valid page ids but belong to someone else.

    Attributes:
        k_pages, v_pages: [P, page_tokens, D].
        page_table: int32 [N, H, pages of the longest row].
        lengths: int32 [N, H].
        max_length: no row is longer; known on the host.
        page_tokens: tokens of one page.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor
    max_length: int
    page_tokens: int


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """Where the new tokens of one step go, in every layer and head.

    Attributes:
        slots: int64 [N], on the host.
        num_new: int64 [N], on the host; they sum to T.
        refs: int64 [L, T, H], flat targets `page * page_tokens + offset`.
        lengths: int32 [L, N, H], row lengths with the new tokens.
        max_lengths: the longest row of each layer, with the new tokens.
        before: int32 [L, N, H], row lengths without the new tokens, on the host.
        device_slots: `slots` on the device.
        survivors: int64, those of the T tokens that rows with a window still hold after the step,
            the others' refs there being -1; None: all.
    """

    slots: NDArray[np.int64]
    num_new: NDArray[np.int64]
    refs: Tensor
    lengths: Tensor
    max_lengths: tuple[int, ...]
    before: NDArray[np.int32]
    device_slots: Tensor
    survivors: Tensor | None = None
