"""What a rank shows a retention method: of a prompt in one layer, or of rows that are stored.

Shapes: n tokens, R rows, w window queries, Hq local query heads, H local kv heads, G = Hq / H,
D head dim.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.observation import Observation
from saqqara.compression.retention import Retention
from saqqara.workers.models.layer import QKV
from saqqara.workers.part import Part
from saqqara.workers.transfer import to_device

from .masses import rows_mass


def prompt_mass(part: Part, prompt: QKV, lse: Tensor | None) -> Tensor:
    """Attention [H, n] that each key of a prompt gets from all its queries, on this rank.

    `lse` is as for `observe_prompt`.
    """
    assert len(prompt.q) == len(prompt.k), "queries of cached tokens are gone"
    return part.backend.mass(prompt.q, prompt.k, part.scale, lse=lse)


def observe_prompt(
    part: Part,
    layer: int,
    prompt: QKV,
    lse: Tensor | None,
    retention: Retention,
    original_tokens: int,
    masses: Tensor | None = None,
    *,
    goes_on: bool = False,
    heads: Sequence[int] | None = None,
) -> Observation:
    """The tokens of a prompt that entered one layer, for a retention that drops some of them.

    The queries are those of its last tokens, at least as many as the retention looks at; where it
    `goes_on` behind rows of an earlier turn, a short turn's own queries are all there are. `lse` is
    what prefill returned of them, [queries, Hq], None if it did not; `original_tokens` is the
    length of the whole prompt, and `masses` the `prompt_mass` of these tokens if known. `heads` are
    global ids of the kv heads that the prompt is shown with; default: all of the rank's.
    """
    num_tokens = len(prompt.k)
    num_queries = min(retention.num_window_queries(original_tokens), num_tokens)
    if goes_on:
        num_queries = min(num_queries, len(prompt.q))
    before_window = len(prompt.q) - num_queries
    assert before_window >= 0, f"{len(prompt.q)} tokens are computed, {num_queries} are looked at"

    def mass(queries: Tensor, keys: Tensor) -> Tensor:
        window = None if lse is None else lse[before_window:]
        return part.backend.mass(queries, keys, part.scale, lse=window)

    return _observation(
        part,
        layer,
        prompt.k,
        prompt.v,
        prompt.q[before_window:] if num_queries else None,
        part.heads.kv if heads is None else heads,
        mass,
        masses,
        dropped_tokens=original_tokens - num_tokens,
    )


def observe_each_length(
    part: Part,
    layer: int,
    prompt: QKV,
    lse: Tensor | None,
    retention: Retention,
    original_tokens: int,
    pads: NDArray[np.int64],
) -> list[Observation]:
    """A prompt that goes on behind rows of several lengths: those of one length together.

    Of each local kv head the first keys, `pads` [H], are nobody's. Other arguments are those of
    `observe_prompt`.
    """
    num_heads = len(pads)
    seen = []
    for pad in np.unique(pads).tolist():
        local = np.flatnonzero(pads == pad)
        some = to_device(local, prompt.k.device)

        def of_heads(x: Tensor, some: Tensor = some) -> Tensor:
            by_head = x.view(len(x), num_heads, -1, *x.shape[2:])
            return by_head.index_select(1, some).flatten(1, 2)

        q, k, v = of_heads(prompt.q), of_heads(prompt.k[pad:]), of_heads(prompt.v[pad:])
        of_lse = None if lse is None else of_heads(lse)
        how = (retention, original_tokens)
        heads = (part.heads.kv.start + local).tolist()
        one = observe_prompt(part, layer, QKV(q, k, v), of_lse, *how, goes_on=True, heads=heads)
        seen.append(one)
    return seen


def observe_rows(
    part: Part,
    index: int,
    heads: NDArray[np.int64],
    k_RND: Tensor,
    v_RND: Tensor,
    queries_RWGD: Tensor | None,
    masses_RN: Tensor | None = None,
    compaction: int = 0,
    num_before: Tensor | None = None,
) -> Observation:
    """Rows of local layer `index`, row i of the local kv head `heads[i]`.

    They are of one length, or end together after `num_before` [R] columns that are nobody's.
    """
    return _observation(
        part,
        part.layers[index],
        k_RND.transpose(0, 1),
        v_RND.transpose(0, 1),
        None if queries_RWGD is None else queries_RWGD.transpose(0, 1).flatten(1, 2),
        (part.heads.kv.start + heads).tolist(),
        lambda queries, keys: rows_mass(
            queries, keys, part.scale, num_before, part.backend.softcap
        ),
        masses_RN,
        compaction=compaction,
    )


def no_rows(part: Part, num_tokens: int) -> Tensor:
    """Keys or values that stand for those of a slot which this rank has refused, [H, n, D]."""
    shape = (len(part.heads.kv), num_tokens, part.spec.head_dim)
    return torch.zeros(shape, device=part.device)


def _observation(
    part: Part,
    layer: int,
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    heads: Sequence[int],
    mass_fn: Callable[[Tensor, Tensor], Tensor],
    masses: Tensor | None,
    *,
    dropped_tokens: int = 0,
    compaction: int = 0,
) -> Observation:
    """What needs other ranks is asked for over the mesh."""
    return Observation(
        layer=layer,
        layers=part.spec.layers,
        prompt_tokens=len(keys),
        keys=keys,
        values=values,
        queries=queries,
        scale=part.scale,
        heads=heads,
        num_heads=part.spec.num_kv_heads,
        group_size=part.spec.group_size,
        mass_fn=mass_fn,
        reduce_fn=part.mesh.reduce_replicas if part.heads.replicated else None,
        gather_heads_fn=part.gather_heads if part.mesh.layout.tensor_size > 1 else None,
        dropped_tokens=dropped_tokens,
        compaction=compaction,
        masses=masses,
    )
