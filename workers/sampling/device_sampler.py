"""Sampling that asks the host for nothing: every row by the settings that the device has of it.

The tokens are those of `sampler.sample`, which decides on the host which rows need which filter.
Here the filters are numbers in tensors, so that the same operations serve every batch and can be
recorded. What a whole batch does without is left out (`Kind`). Biases, penalties and forbidden
tokens depend on the tokens before, which the device has (`DeviceSlots`) and the host may not have
yet (`adjusted`).

Shapes: S sampled rows, R of them, V vocabulary, C rows at a time, N tokens looked back on, M ends
of bad words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from saqqara.workers.fixed_sizes import SAMPLED_ROWS
from saqqara.workers.grammar.endings import MAX_TOKENS as MAX_ENDING_TOKENS
from saqqara.workers.grammar.masks import TokenMasks
from saqqara.workers.plan import SamplingSpec
from saqqara.workers.state.device_slots import LOG_MIN_P, TEMPERATURE, TOP_K, TOP_P, DeviceSlots
from saqqara.workers.transfer import to_device

from .noise import gumbel, mixed
from .sampler import MIN_TEMPERATURE, allowed, biased, filters


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


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of logits: the token at `position` of `slot`, whose prompt is so long."""

    slot: int
    position: int
    prompt_tokens: int
    spec: SamplingSpec

    @property
    def num_output(self) -> int:
        """Tokens between the prompt and this one."""
        return self.position - self.prompt_tokens

    @property
    def is_ending(self) -> bool:
        """Whether its answer has to be completed within the next few tokens."""
        most = self.spec.complete_within
        return most is not None and most - self.num_output <= MAX_ENDING_TOKENS

    @property
    def is_plain(self) -> bool:
        """Whether its logits are sampled from as they are."""
        spec = self.spec
        blocks = self.num_output < spec.min_tokens and spec.blocked_token_ids
        return not (
            blocks
            or is_penalized(spec)
            or spec.logit_bias
            or spec.bad_words
            or spec.allowed_token_ids
            or spec.grammar
        )


def is_penalized(spec: SamplingSpec) -> bool:
    """Whether tokens that were there before are less, or more, likely."""
    others = spec.presence_penalty or spec.frequency_penalty
    return spec.repetition_penalty != 1 or bool(others)


def adjusted(
    logits_SV: Tensor, rows: Sequence[SampledRow], masks: TokenMasks | None, slots: DeviceSlots
) -> Tensor:
    """The logits after all that the rows ask for; the given ones stay."""
    specs = [row.spec for row in rows]
    logits = _penalized(biased(logits_SV, specs), rows, slots)
    if masks is not None:
        logits = masks.apply(logits)
    logits = _blocked(allowed(logits, specs), rows)
    return _without_bad_words(logits, rows, slots)


def check_ids(row: SampledRow, vocab_size: int) -> None:
    """Look for what the device could not refuse.

    Raises:
        IndexError: the row names a token that the model has not.
    """
    spec = row.spec
    if row.is_plain:
        return
    ids = np.array(
        [token for token, _ in spec.logit_bias]
        + [word[-1] for word in spec.bad_words]
        + [*spec.blocked_token_ids, *np.frombuffer(spec.allowed_token_ids, dtype=np.int32)],
        dtype=np.int64,
    )
    wrong = ids[(ids < -vocab_size) | (ids >= vocab_size)]
    if len(wrong):
        raise IndexError(f"token {wrong[0]} is out of range of {vocab_size} tokens")


def _penalized(logits_SV: Tensor, rows: Sequence[SampledRow], slots: DeviceSlots) -> Tensor:
    some = [place for place, row in enumerate(rows) if is_penalized(row.spec)]
    if not some:
        return logits_SV
    device = logits_SV.device
    chosen = [rows[place] for place in some]
    most = max(row.position for row in chosen)
    numbers = [(place, rows[place].slot, rows[place].position) for place in some]
    place_R, slot_R, stop_R = to_device(np.array(numbers, dtype=np.int64).T.copy(), device)
    starts = np.array([row.prompt_tokens for row in chosen], dtype=np.int64)
    start_R = to_device(starts, device)
    tokens_RN = slots.tokens[slot_R, :most].long()
    at_N = torch.arange(most, device=device)
    seen_RN = at_N < stop_R[:, None]
    counts_RV = _counts(tokens_RN, seen_RN & (at_N >= start_R[:, None]), logits_SV.shape[1])
    known_RV = _counts(tokens_RN, seen_RN, logits_SV.shape[1]) > 0
    specs = [row.spec for row in chosen]
    penalties = [(s.repetition_penalty, s.presence_penalty, s.frequency_penalty) for s in specs]
    repetition, presence, frequency = to_device(np.array(penalties).T.copy(), device)[..., None]
    factor = torch.where(known_RV, repetition.float(), 1.0)
    value = logits_SV[place_R]
    value = torch.where(value > 0, value / factor, value * factor)
    offset = torch.where(counts_RV > 0, presence + frequency * counts_RV, 0.0)
    return logits_SV.index_copy(0, place_R, value - offset.float())


def _counts(tokens_RN: Tensor, wanted_RN: Tensor, vocab_size: int) -> Tensor:
    """How often each token stands in the wanted places, int64 [R, V]."""
    none = tokens_RN.new_zeros(len(tokens_RN), vocab_size)
    return none.scatter_add(1, tokens_RN * wanted_RN, wanted_RN.long())


def _blocked(logits_SV: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """Without the tokens that `min_tokens` blocks."""
    places = [
        (place, token)
        for place, row in enumerate(rows)
        if row.num_output < row.spec.min_tokens
        for token in row.spec.blocked_token_ids
    ]
    if not places:
        return logits_SV
    at_row, at_token = to_device(np.array(places, dtype=np.int64).T.copy(), logits_SV.device)
    nothing = logits_SV.new_full((len(places),), -torch.inf)
    return logits_SV.index_put((at_row, at_token), nothing)


def _without_bad_words(logits_SV: Tensor, rows: Sequence[SampledRow], slots: DeviceSlots) -> Tensor:
    """Without the last tokens of the bad words all but whose last token is there."""
    ends = [
        (place, row, word)
        for place, row in enumerate(rows)
        for word in row.spec.bad_words
        if len(word) - 1 <= row.num_output
    ]
    if not ends:
        return logits_SV
    device, longest = logits_SV.device, max(len(word) for _, _, word in ends)
    numbers = np.array([(p, row.slot, row.position, word[-1]) for p, row, word in ends])
    place_M, slot_M, position_M, token_M = to_device(numbers.T.copy(), device)
    before_MN = np.full((len(ends), longest - 1), -1, dtype=np.int64)  # the nearest first
    for before, (_, _, word) in zip(before_MN, ends, strict=True):
        before[: len(word) - 1] = word[-2::-1]
    wanted_MN = to_device(before_MN, device)
    back_N = torch.arange(1, longest, device=device)
    at_MN = (position_M[:, None] - back_N).clamp_(min=0)
    there_MN = slots.tokens[slot_M[:, None], at_MN] == wanted_MN
    matches_M = (there_MN | (wanted_MN < 0)).all(dim=1)
    added = torch.where(matches_M, -torch.inf, 0.0).to(logits_SV)
    return logits_SV.index_put((place_M, token_M), added, accumulate=True)
