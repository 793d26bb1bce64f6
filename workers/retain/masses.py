"""The attention that stored tokens get, many rows at once; with torch alone, bounded in memory.

Shapes: N sequences, R rows of one layer, n stored tokens of each, C of them, w queries, H local kv
heads, G query heads per kv head, D head dim.
"""

import torch
from torch import Tensor

MASS_BYTES = 32 << 20  # bounds the fp32 attention weights of one piece of work


def rows_mass(
    q: Tensor, k: Tensor, scale: float, num_before: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """Attention mass as the backends' `mass`, for many rows at once.

    Args:
        q: queries of the last w tokens of each row, [w, R G, D].
        k: [n, R, D].
        scale: factor of the scores.
        num_before: so many keys of each row are nobody's and get nothing, [R]; None: all are keys.
        softcap: of the scores; 0: they have none.

    Returns:
        float32 [R, n]: causal softmax attention, summed over the queries and the group.
    """
    (num_queries, _, dim), (num_keys, num_rows, _) = q.shape, k.shape
    q_RMD = q.view(num_queries, num_rows, -1, dim).permute(1, 2, 0, 3).reshape(num_rows, -1, dim)
    k_RDN = k.permute(1, 2, 0)
    first = num_keys - num_queries
    position = torch.arange(num_keys, device=k.device)
    future = (position > position[first:, None]).repeat(q_RMD.shape[1] // num_queries, 1)
    mass = torch.empty(num_rows, num_keys, dtype=torch.float32, device=k.device)
    step = max(1, MASS_BYTES // (4 * q_RMD.shape[1] * num_keys))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        scores = torch.bmm(q_RMD[rows].float(), k_RDN[rows].float()).mul_(scale)
        _cap(scores, softcap)
        scores.masked_fill_(future, -torch.inf)
        if num_before is not None:
            scores.masked_fill_((position < num_before[rows, None])[:, None], -torch.inf)
        torch.sum(_softmax(scores), dim=1, out=mass[rows])
    return mass


def _cap(scores: Tensor, softcap: float) -> None:
    """Cap scores in place, as `AttentionBackend.softcap` says."""
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in place; 0 where all columns are -inf.

    Sums are of float64, so that their float32 does not depend on how many columns are.
    """
    limits = torch.finfo(torch.float32)
    weights = scores.sub_(scores.amax(dim=-1, keepdim=True).clamp_min_(limits.min)).exp_()
    total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return weights.div_(total.float().clamp_min_(limits.tiny))


def remembered_mass(
    q: Tensor,
    lse: Tensor,
    k: Tensor,
    scale: float,
    query_weights: Tensor,
    softcap: float = 0.0,
) -> Tensor:
    """Attention on keys that all of these queries saw, by the normalisers that it then had.

    Args:
        q: [N, w, H G, D].
        lse: float32 [N, w, H G].
        k: [N, H, C, D].
        scale: factor of the scores.
        query_weights: [w].
        softcap: of the scores; 0: they have none.

    Returns:
        float32 [N, H, C], summed over the queries, with their weights, and over the group.
    """
    (num, num_queries, _, dim), num_heads = q.shape, k.shape[1]
    q_NHMD = q.view(num, num_queries, num_heads, -1, dim).transpose(1, 2).flatten(2, 3)
    lse_NHM = lse.view(num, num_queries, num_heads, -1).transpose(1, 2).flatten(2, 3)
    scores = torch.matmul(q_NHMD.float(), k.float().transpose(2, 3)).mul_(scale)
    _cap(scores, softcap)
    weights = scores.sub_(lse_NHM[..., None]).exp_()
    group = weights.shape[2] // num_queries
    return (weights * query_weights.repeat_interleave(group)[:, None]).sum(dim=2)
