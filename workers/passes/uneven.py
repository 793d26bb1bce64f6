"""Attention over rows of one layer that differ in length: each kv head a sequence of its own.

Backends take packed sequences of one length for all heads. The fresh tokens of a turn that goes on
behind rows of several lengths are few, so their kv heads are packed one after the other instead, in
one call. It costs a copy of the layer's keys and values.

Shapes: T packed fresh queries, S packed keys, N prompts, Hq local query heads, H local kv heads,
G = Hq / H, D head dim.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.attention.base import AttentionBackend, CuSeqlens
from saqqara.workers.kv.spans import spans
from saqqara.workers.transfer import to_device

from .prefixes import Keyed


def attend(
    backend: AttentionBackend, keyed: Keyed, q: Tensor, cu_q: CuSeqlens, scale: float, window: int
) -> tuple[Tensor, Tensor | None]:
    """`AttentionBackend.prefill` of last queries, q [T, Hq, D], over keys that end together.

    Args:
        backend: that computes it.
        keyed: keys and values. Where its rows differ in length the layer has no window.
        q: of each prompt's last tokens, all that are fresh or fewer.
        cu_q: where each prompt's queries begin.
        scale: factor of the scores.
        window: as for `AttentionBackend.prefill`.
    """
    k, v = keyed.qkv.k, keyed.qkv.v
    if all(pads is None for pads in keyed.pads):
        return backend.prefill(q, k, v, cu_q, keyed.cu_k, scale, window)
    assert not window, "rows of a layer with a window are as long as each other"
    (num_queries, _, dim), num_heads = q.shape, k.shape[1]
    q_HTGD = q.view(num_queries, num_heads, -1, dim).transpose(0, 1)
    source, lengths_HN = _by_head(keyed, num_heads)
    at = to_device(source, k.device)
    k_by_head, v_by_head = (x.reshape(-1, 1, dim).index_select(0, at) for x in (k, v))
    bounds = (
        CuSeqlens.of(cu_q.lengths * num_heads, q.device),
        CuSeqlens.of(lengths_HN.reshape(-1).tolist(), q.device),
    )
    out, lse = backend.prefill(q_HTGD.flatten(0, 1), k_by_head, v_by_head, *bounds, scale)
    out_THGD = out.view(q_HTGD.shape).transpose(0, 1)
    if lse is not None:
        lse = lse.view(q_HTGD.shape[:3]).transpose(0, 1).flatten(1)
    return out_THGD.flatten(1, 2), lse


def _by_head(keyed: Keyed, num_heads: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of the S x H keys are tokens', head after head, and how many of each, [H, N]."""
    none = np.zeros(num_heads, dtype=np.int64)
    pads_HN = np.stack([none if pads is None else pads for pads in keyed.pads], axis=1)
    lengths_HN = np.array(keyed.cu_k.lengths) - pads_HN
    starts_HN = np.array(keyed.cu_k.host[:-1]) + pads_HN
    heads = np.arange(num_heads).repeat(lengths_HN.sum(axis=1))
    tokens = spans(starts_HN.reshape(-1), lengths_HN.reshape(-1))
    return tokens * num_heads + heads, lengths_HN
