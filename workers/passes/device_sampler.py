"""Sampling that asks the host for nothing: every row by the settings that the device has of it.

The tokens are those of `sampler.sample`, which decides on the host which rows need which filter.
Here the filters are numbers in tensors, so that the same operations serve every batch and can be
recorded. What a whole batch does without is left out (`Kind`).

Shapes: S sampled rows, V vocabulary, C rows at a time.
"""

from collections.abc import Iterable
from enum import IntEnum

import torch
from torch import Tensor

from saqqara.workers.plan import SamplingSpec
from saqqara.workers.sizing import SAMPLED_ROWS
from saqqara.workers.state.device_slots import LOG_MIN_P, TEMPERATURE, TOP_K, TOP_P

from .noise import gumbel, mixed
from .sampler import MIN_TEMPERATURE, filters


class Kind(IntEnum):
    """What the rows of a batch need at most."""

    GREEDY = 0
    RANDOM = 1
    FILTERED = 2

    @classmethod
    def of(cls, specs: Iterable[SamplingSpec], vocab_size: int) -> "Kind":
        """The least that serves all of these."""
        return max((_kind(spec, vocab_size) for spec in specs), default=cls.GREEDY)


def _kind(spec: SamplingSpec, vocab_size: int) -> Kind:
    if spec.temperature < MIN_TEMPERATURE:
        return Kind.GREEDY
    return Kind.FILTERED if filters(spec, vocab_size) else Kind.RANDOM


def draw(
    raw_SV: Tensor,
    adjusted_SV: Tensor,
    seeds_S: Tensor,
    filters_S4: Tensor,
    positions_S: Tensor,
    kind: Kind,
) -> Tensor:
    """One token per row.

    Args:
        raw_SV: the model's logits, float32.
        adjusted_SV: the same after biases, penalties and masks; not changed.
        seeds_S: see `DeviceSlots`.
        filters_S4: see `DeviceSlots`.
        positions_S: of the tokens to be sampled, int64.
        kind: of the batch.

    Returns:
        int64 [3, S]: the token (0 where there is none), whether it may be taken, and whether the
        model's logits are sound.
    """
    best, tokens = adjusted_SV.max(dim=-1)  # NaN counts as the largest
    may_take = best.isfinite()
    is_sound = may_take if raw_SV is adjusted_SV else raw_SV.amax(dim=-1).isfinite()
    if kind > Kind.GREEDY:
        chosen = _filtered if kind is Kind.FILTERED else _unfiltered
        drawn = []
        for first in range(0, len(tokens), SAMPLED_ROWS):
            some = slice(first, first + SAMPLED_ROWS)  # their temporaries are large
            temperatures = filters_S4[some, TEMPERATURE, None]
            is_random = temperatures >= MIN_TEMPERATURE
            keys = mixed(mixed(seeds_S[some, None]) + positions_S[some, None])
            scale = torch.where(is_random, temperatures, 1.0)
            token = chosen(adjusted_SV[some], scale, filters_S4[some], keys)
            drawn.append(torch.where(is_random[:, 0], token, tokens[some]))
        tokens = torch.cat(drawn)
    tokens = torch.where(may_take, tokens, 0)
    return torch.stack((tokens, may_take.long(), is_sound.long()))


def _unfiltered(logits_CV: Tensor, scale_C1: Tensor, _: Tensor, keys_C1: Tensor) -> Tensor:
    vocabulary = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    return (logits_CV.double() / scale_C1 + gumbel(keys_C1, vocabulary)).argmax(dim=-1)


def _filtered(logits_CV: Tensor, scale_C1: Tensor, filters_C4: Tensor, keys_C1: Tensor) -> Tensor:
    """As `sampler._draw_filtered` of whole rows, sorted; a row without filters keeps all."""
    sorted_CV, ids_CV = logits_CV.sort(dim=-1, descending=True, stable=True)
    values_CV = sorted_CV.double() / scale_C1
    last = filters_C4[:, TOP_K, None].long() - 1
    kept = values_CV >= values_CV.gather(1, last)
    kept &= values_CV >= values_CV[:, :1] + filters_C4[:, LOG_MIN_P, None]
    weights = torch.exp(values_CV - values_CV[:, :1]).masked_fill_(~kept, 0.0)
    before = weights.cumsum(dim=-1) - weights
    total = weights.sum(dim=-1, keepdim=True)
    kept &= before < filters_C4[:, TOP_P, None] * total
    kept[:, 0] = True
    noisy = (values_CV + gumbel(keys_C1, ids_CV)).masked_fill_(~kept, -torch.inf)
    return ids_CV.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
