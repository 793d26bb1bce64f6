"""Scores of the context tokens: the larger, the sooner a token is kept.

`context_scores` has a function for each score of `scores.py`, chosen by its type. It looks at one
sequence in one layer and returns [H, n - w] fp32, one row per local kv head and one column per
context token, i.e. per prompt token before the window. The window (the last w tokens) and the sinks
(the first s) are kept whatever their score: `selecting.py` sees to that.

Shapes: n prompt tokens, w window tokens, H local kv heads, Hq local query heads, D head dim.
"""

import math
from functools import singledispatch
from typing import TypeVar, cast

import torch
from torch import Tensor

from .observation import Observation
from .propagate import Propagate
from .scores import H2O, KNorm, Random, Score, SnapKV, Streaming, Tova

_WIDE_KERNEL = 64

Bits = TypeVar("Bits", int, Tensor)


@singledispatch
def context_scores(score: Score, observation: Observation, window: int) -> Tensor:
    """Scores of the tokens before the last `window` ones, [H, n - w] fp32, by the type of score."""
    raise NotImplementedError(f"{score} has no function in scoring.py")


@context_scores.register
def streaming(score: Streaming, observation: Observation, window: int) -> Tensor:
    """Recency: with the sinks forced, the last `B - s` tokens stay.

    StreamingLLM, arXiv 2309.17453. The window lies within these, so at uniform budgets its length
    changes nothing; under another shape it is what every layer keeps at the least.
    """
    num_context = observation.prompt_tokens - window
    recency = torch.arange(num_context, dtype=torch.float32, device=observation.keys.device)
    return recency.expand(len(observation.heads), num_context)


@context_scores.register
def snapkv(score: SnapKV, observation: Observation, window: int) -> Tensor:
    """Attention that the last w queries pay to a token, pooled over its neighbours.

    Mean over the window queries and over the group's query heads, then 1-D pooling of
    `kernel_size` tokens with stride 1 over the context columns. Beyond their edges `max` sees
    nothing and `avg` sees zeros (it always divides by `kernel_size`), as published.

    SnapKV, arXiv 2404.14469, section 4; also the score of PyramidKV, arXiv 2406.02069.
    """
    num_context = observation.prompt_tokens - window
    mass = observation.window_mass()[:, :num_context]
    return pooled(mass, score.kernel_size, score.pooling)


def pooled(x_HN: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Pool each row with stride 1, [H, n]: the "max" or "avg" of `kernel_size` neighbours.

    Beyond the edges `max` sees nothing, and `avg` zeros. A wide kernel takes time by its logarithm
    and, where it reaches beyond the row, none for what lies there.
    """
    half, length = kernel_size // 2, x_HN.shape[1]
    if kernel_size <= _WIDE_KERNEL or length == 0:
        pool = torch.max_pool1d if pooling == "max" else torch.avg_pool1d
        return pool(x_HN, kernel_size, stride=1, padding=half)
    half = min(half, length)
    outside, combine = (-math.inf, torch.maximum) if pooling == "max" else (0.0, torch.add)
    block = torch.nn.functional.pad(x_HN, (half, half), value=outside)
    # `block` combines `size` neighbours, and `size` doubles: the width's binary digits choose.
    width, size, done, total = 2 * half + 1, 1, 0, None
    while size <= width:
        if width & size:
            part = block[:, done : done + length]
            total = part if total is None else combine(total, part)
            done += size
        block, size = combine(block[:, :-size], block[:, size:]), 2 * size
    assert total is not None
    return total if pooling == "max" else total / kernel_size


@context_scores.register
def knorm(score: KNorm, observation: Observation, window: int) -> Tensor:
    """Minus the L2 norm of the key: keys of small norm draw the most attention.

    Devoto et al., arXiv 2406.11430 (EMNLP 2024). The window is not observed, only kept.
    """
    num_context = observation.prompt_tokens - window
    keys = observation.keys[:num_context]
    return cast("Tensor", -torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).T)


@context_scores.register
def random(score: Random, observation: Observation, window: int) -> Tensor:
    """Uniform noise in [0, 1): the baseline that every method must beat.

    A pure function of (seed, layer, global kv head, position), so neither sharding nor the rest of
    the batch changes what is kept. At a compaction the position is the place in storage, and the
    number of the compaction is a further argument. The window is not observed, only kept.
    """
    num_context = observation.prompt_tokens - window
    device = observation.keys.device
    heads = torch.tensor(list(observation.heads), device=device)
    positions = torch.arange(num_context, device=device)
    layer_key = _mix32(_mix32(_mix32(score.seed >> 32) ^ score.seed) ^ observation.layer)
    if observation.compaction:
        layer_key = _mix32(layer_key ^ observation.compaction)
    head_keys = _mix32(heads ^ layer_key)
    bits = _mix32(head_keys.unsqueeze(1) ^ _mix32(positions + 1))
    return (bits >> 8).float() * 2**-24  # an fp32 holds 24 bits exactly


@context_scores.register
def h2o(score: H2O, observation: Observation, window: int) -> Tensor:
    """Attention that a token gets from all queries of the prompt, as a sum over them.

    Mean over the group's query heads. A row that keeps B tokens keeps the last
    `int(recent_ratio * B)` and, of the others, the sinks and the heavy hitters: those of the
    highest sum. The recent part takes the window's place (`window` is 0, so that it is exactly
    that part), and every token has a score. Sinks count as heavy hitters; where sinks and recent
    part are more than B, the recent part is what the sinks leave. With a shape that gives rows
    different budgets, B is the row's; heads that compete for a layer's tokens (`adaptive`) keep
    the recent part of their mean.

    H2O, arXiv 2306.14048, section 4: at the end of a prefill, its greedy eviction of the token of
    the lowest sum, taken for the whole prompt at once. Each decode step adds its attention to the
    sums of the kept tokens, and a compaction goes by these.
    """
    return observation.total_mass()


@context_scores.register
def tova(score: Tova, observation: Observation, window: int) -> Tensor:
    """Attention that the last query pays to a token, as a mean over all heads of the layer.

    The same scores for every head, so all keep the same tokens. The last token is the window.

    TOVA, arXiv 2401.06104, section 3.
    """
    num_context = observation.prompt_tokens - window
    mean = mean_of_heads(observation, observation.window_mass()[:, :num_context])
    return mean.expand(len(observation.heads), num_context)


def mean_of_heads(observation: Observation, mass_Hm: Tensor) -> Tensor:
    """Mean over all kv heads of the layer, [m]: the same bits on every rank."""
    return ordered_mean(observation.all_heads(mass_Hm))


def ordered_mean(heads: Tensor) -> Tensor:
    """Mean over the first dimension, kv heads, which are summed one after the other.

    A rank with another order of the sum could select other tokens.
    """
    total = heads[0].clone()
    for head in heads[1:]:
        total += head
    return total / len(heads)


def query_weights(propagate: Propagate, num_queries: int, device: torch.device) -> Tensor | None:
    """Weights of the recent queries, fp32 [r], from the first to the last; None for 1 each.

    PyramidInfer weighs nearer queries more: linear from 1 to `distance_weight`.
    """
    if propagate.kind == "once":
        return None
    return torch.linspace(1, propagate.distance_weight, num_queries, device=device)


def token_scores(propagate: Propagate, mass_Hc: Tensor, num_queries: int, group: int) -> Tensor:
    """Scores of the context tokens, fp32 [c]: means over queries and all query heads.

    Args:
        propagate: its kind decides the score. `pyramidinfer`: arXiv 2405.12532, the weighted mean
            itself. `once`: SnapKV's score (pooled over neighbours, per kv head), then the mean
            over kv heads, as FastKV (arXiv 2502.01068).
        mass_Hc: attention on the keys of the context, [H, c], summed over the recent queries (with
            their weights) and the query heads of each kv head.
        num_queries: r.
        group: query heads of one kv head.
    """
    context = mass_Hc / (num_queries * group)
    if propagate.kind == "once":
        context = pooled(context, propagate.kernel_size, propagate.pooling)
    return context.mean(dim=0)


def _mix32(bits: Bits) -> Bits:
    """Scramble the low 32 bits one to one (the finaliser of MurmurHash3)."""
    bits = bits & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
