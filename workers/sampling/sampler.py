"""From logits to tokens: penalties, filters, and counter-based random numbers.

The order is vLLM's: biases, penalties and forbidden tokens (all that are not allowed or that the
grammar excludes, the ends of bad words, and those blocked before `min_tokens`), temperature, then
`min_p`, `top_k`, `top_p`, each on what the one before left. A token tied with the last of `top_k`
or with the threshold of `min_p` stays in; among ties at the edge of `top_p` the lower id comes
first.

A token is drawn by the Gumbel-max trick: the best of log-probability plus noise, the noise being a
function of (seed, position, token id) alone. So what is sampled does not depend on which other
sequences share the step, and a rounding error in the logits changes it only where two tokens come
that close (inverting a cumulative sum would be far more sensitive).

Shapes: S sampled rows, V vocabulary, C candidates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from saqqara.workers.fixed_sizes import SAMPLED_LOGITS
from saqqara.workers.grammar.masks import TokenMasks
from saqqara.workers.plan import FaultCode, SamplingSpec, TokenLogprobs
from saqqara.workers.transfer import to_device

from .noise import gumbel, noise_keys

# Below this a temperature is greedy decoding (as in vLLM).
MIN_TEMPERATURE = 1e-5

# The best tokens of a row, looked at before the whole row is sorted.
_NUM_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """What a sequence has so far: prompt and output token ids, integers [n] each."""

    prompt: NDArray[np.integer]
    output: NDArray[np.integer]


class Draw(NamedTuple):
    """What was sampled for one row; with an `error` there is no token (the id is 0).

    `code` is the error's kind.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    code: FaultCode = "computation_failed"


_ROUND = 512  # logits whose largest is found before it is known where it stands


def sample(
    logits: torch.Tensor,
    specs: Sequence[SamplingSpec],
    positions: Sequence[int],
    history: Sequence[TokenHistory],
    masks: TokenMasks | None = None,
) -> list[Draw]:
    """Sample one token per row.

    Log-probabilities are the model's own, before biases, penalties, filters and temperature (vLLM's
    default, `raw_logprobs`). A row whose best logit is no finite number (one NaN or +inf is enough,
    or nothing but -inf) has no token to sample: it gets an error, and the other rows their tokens.

    Args:
        logits: fp32 [S, V]; not changed.
        specs: sampling parameters of each row.
        positions: position of the token to be sampled in its sequence, per row.
        history: prompt and output so far, per row.
        masks: the tokens that their grammars allow, of the rows that have one.
    """
    assert len(logits) == len(specs) == len(positions) == len(history)
    adjusted = _penalized(biased(logits, specs), specs, history)
    if masks is not None:
        adjusted = masks.apply(adjusted)
    adjusted = _forbidden(adjusted, specs, history)
    best, tokens = largest(adjusted)
    finite = best.isfinite().tolist()
    random = [
        row for row, spec in enumerate(specs) if spec.temperature >= MIN_TEMPERATURE and finite[row]
    ]
    most = max(1, SAMPLED_LOGITS // logits.shape[1])
    for piece in (random[start : start + most] for start in range(0, len(random), most)):
        rows = torch.tensor(piece, device=logits.device)
        temperatures = _column([specs[row].temperature for row in piece], logits.device)
        keys = noise_keys([specs[row].seed for row in piece], [positions[row] for row in piece])
        scaled = adjusted[rows].double() / temperatures
        tokens[rows] = _draw(scaled, [specs[row] for row in piece], keys.to(logits.device))
    draws = list(map(Draw, tokens.tolist(), _logprobs(logits, tokens, specs)))
    for row, draw in enumerate(draws):
        if not finite[row] or (draw.logprobs is not None and math.isnan(draw.logprobs.logprob)):
            draws[row] = _no_token(logits[row], specs[row], positions[row])
    return draws


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row [S, V] and where it stands first; NaN counts as the largest.

    In two rounds: torch finds a maximum at the speed of memory, but where it is one by one.
    """
    num_rows, width = logits.shape
    if logits.is_cuda or width <= 2 * _ROUND or not logits.is_contiguous():
        best, places = logits.max(dim=-1)
        return best, places
    whole = width - width % _ROUND
    rounds = logits[:, :whole].view(num_rows, whole // _ROUND, _ROUND).amax(dim=-1)
    rest = logits[:, whole:].amax(dim=-1, keepdim=True) if whole < width else rounds[:, :0]
    first = torch.cat((rounds, rest), dim=-1).argmax(dim=-1, keepdim=True) * _ROUND
    near = (first + torch.arange(_ROUND)).clamp_(max=width - 1)
    best, place = logits.gather(1, near).max(dim=-1)
    return best, near[torch.arange(num_rows), place]


def _no_token(logits: torch.Tensor, spec: SamplingSpec, position: int) -> Draw:
    """What becomes of a row [V] that nothing can be sampled from."""
    return no_token(bool(logits.max().isfinite()), spec, position)  # a NaN is the largest


def no_token(is_sound: bool, spec: SamplingSpec, position: int) -> Draw:
    """What becomes of a row without a token; `is_sound` says whether its logits are numbers."""
    if not is_sound:
        return Draw(0, error=not_finite(position))
    message = (
        f"no token is left that may stand at position {position}: allowed_token_ids, bad_words and "
        "the stop tokens that min_tokens blocks exclude all"
    )
    if spec.grammar is not None:
        message = f"structured_outputs: {message} that match"
    return Draw(0, error=message, code="constraint_failed")


def not_finite(position: int) -> str:
    """The error of a sequence whose logits have become useless."""
    return (
        f"the model's logits at position {position} are not finite (NaN or infinite): its weights "
        "are broken, or its activations leave the range of its dtype"
    )


def biased(logits: torch.Tensor, specs: Sequence[SamplingSpec]) -> torch.Tensor:
    """Logits plus the `logit_bias` of their rows."""
    biases = [(row, *bias) for row, spec in enumerate(specs) for bias in spec.logit_bias]
    if not biases:
        return logits
    rows, ids, values = zip(*biases, strict=True)
    place = tuple(to_device(np.array(x, dtype=np.int64), logits.device) for x in (rows, ids))
    added = to_device(np.array(values, dtype=np.float32), logits.device)
    return logits.index_put(place, added, accumulate=True)


def _penalized(
    logits: torch.Tensor, specs: Sequence[SamplingSpec], history: Sequence[TokenHistory]
) -> torch.Tensor:
    """Logits after repetition (prompt and output), frequency and presence (output) penalties."""
    rows: list[int] = []
    ids: list[NDArray[np.integer]] = []
    factors: list[NDArray[np.float64]] = []
    offsets: list[NDArray[np.float64]] = []
    for row, (spec, seen) in enumerate(zip(specs, history, strict=True)):
        repetition = spec.repetition_penalty
        if repetition == 1 and not spec.presence_penalty and not spec.frequency_penalty:
            continue
        known = seen.output if repetition == 1 else np.concatenate((seen.prompt, seen.output))
        unique = np.unique(known)
        generated, counts = np.unique(seen.output, return_counts=True)
        offset = np.zeros(len(unique))
        offset[np.searchsorted(unique, generated)] = (
            spec.presence_penalty + spec.frequency_penalty * counts
        )
        rows += [row] * len(unique)
        ids.append(unique)
        factors.append(np.full(len(unique), repetition))
        offsets.append(offset)
    if not rows:
        return logits
    place = (
        torch.tensor(rows, device=logits.device),
        torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(logits.device),
    )
    factor = torch.from_numpy(np.concatenate(factors)).to(logits)
    value = logits[place]
    value = torch.where(value > 0, value / factor, value * factor)
    value -= torch.from_numpy(np.concatenate(offsets)).to(logits)
    return logits.index_put(place, value)


def _forbidden(
    logits: torch.Tensor, specs: Sequence[SamplingSpec], history: Sequence[TokenHistory]
) -> torch.Tensor:
    """Logits with -inf for every token that may not come next."""
    logits = allowed(logits, specs)
    rows: list[int] = []
    ids: list[NDArray[np.integer]] = []
    for row, (spec, seen) in enumerate(zip(specs, history, strict=True)):
        forbidden = [np.array([word[-1] for word in spec.bad_words if _completes(word, seen)])]
        if len(seen.output) < spec.min_tokens:
            forbidden.append(np.array(spec.blocked_token_ids))
        ids += forbidden
        rows += [row] * sum(map(len, forbidden))
    if not rows:
        return logits
    place = (
        torch.tensor(rows, device=logits.device),
        torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(logits.device),
    )
    return logits.index_put(place, logits.new_tensor(-torch.inf))


def _completes(word: Sequence[int], seen: TokenHistory) -> bool:
    """Whether the output ends with all of a bad word but its last token."""
    begin = len(seen.output) - (len(word) - 1)
    return begin >= 0 and np.array_equal(seen.output[begin:], word[:-1])


def allowed(logits: torch.Tensor, specs: Sequence[SamplingSpec]) -> torch.Tensor:
    """Logits with -inf for all but `allowed_token_ids` in the rows that have some."""
    limited = [row for row, spec in enumerate(specs) if spec.allowed_token_ids]
    if not limited:
        return logits
    out = logits.clone()
    for row in limited:
        some = np.frombuffer(specs[row].allowed_token_ids, dtype=np.int32).astype(np.int64)
        ids = to_device(some, logits.device)
        out[row] = -torch.inf
        out[row, ids] = logits[row, ids]
    return out


def _draw(logits: torch.Tensor, specs: Sequence[SamplingSpec], keys: torch.Tensor) -> torch.Tensor:
    """Draw from logits fp64 [S, V] (temperature applied) with keys [S, 1]; returns int64 [S].

    Filtered rows are drawn from the best candidates where these prove to hold the whole filtered
    set, and from the sorted row otherwise; both are exact and give the same token.
    """
    tokens = torch.empty(len(specs), dtype=torch.int64, device=logits.device)
    filtered = [row for row, spec in enumerate(specs) if filters(spec, logits.shape[1])]
    plain = [row for row in range(len(specs)) if row not in set(filtered)]
    if plain:
        rows = torch.tensor(plain, device=logits.device)
        vocabulary = torch.arange(logits.shape[1], device=logits.device)
        tokens[rows] = (logits[rows] + gumbel(keys[rows], vocabulary)).argmax(dim=-1)
    for choose in (_candidates, _sorted):
        if not filtered:
            break
        rows = torch.tensor(filtered, device=logits.device)
        drawn, exact = _draw_filtered(
            logits[rows], [specs[row] for row in filtered], keys[rows], choose
        )
        tokens[rows] = drawn
        filtered = [row for row, done in zip(filtered, exact.tolist(), strict=True) if not done]
    return tokens


def filters(spec: SamplingSpec, vocab_size: int) -> bool:
    """Whether a row is drawn from a part of the vocabulary."""
    return 0 < spec.top_k < vocab_size or spec.top_p < 1 or spec.min_p > 0


def _draw_filtered(
    logits: torch.Tensor,
    specs: Sequence[SamplingSpec],
    keys: torch.Tensor,
    choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn tokens int64 [S], and whether the candidates [S, C] of `choose` were enough, [S].

    Every filter keeps a prefix of the candidates, which descend.
    """
    device = logits.device
    values_SC, ids_SC = choose(logits)
    num_candidates, vocab_size = values_SC.shape[1], logits.shape[1]
    top_k = [spec.top_k if 0 < spec.top_k < vocab_size else vocab_size for spec in specs]
    last = torch.tensor([min(k, num_candidates) - 1 for k in top_k], device=device)[:, None]
    kept = values_SC >= values_SC.gather(1, last)
    log_min_p = [math.log(spec.min_p) if spec.min_p > 0 else -math.inf for spec in specs]
    kept &= values_SC >= values_SC[:, :1] + _column(log_min_p, device)

    # top_p is a share of what the other filters left: of the whole row where there are none.
    only_top_p = [
        k == vocab_size and low == -math.inf for k, low in zip(top_k, log_min_p, strict=True)
    ]
    whole = torch.tensor(only_top_p, device=device)[:, None]
    weights = torch.exp(values_SC - values_SC[:, :1]).masked_fill_(~kept, 0.0)
    row_total = torch.exp(logits - values_SC[:, :1]).sum(dim=-1, keepdim=True)
    total = torch.where(whole, row_total, weights.sum(dim=-1, keepdim=True))
    inside = _inside(kept, values_SC, vocab_size) | whole[:, 0]
    top_p = _column([spec.top_p if spec.top_p < 1 else math.inf for spec in specs], device)
    before = weights.cumsum(dim=-1) - weights
    nucleus = kept & (before < top_p * total)
    nucleus[:, 0] = True
    inside &= _inside(nucleus, values_SC, vocab_size)
    noisy = (values_SC + gumbel(keys, ids_SC)).masked_fill_(~nucleus, -torch.inf)
    place = noisy.argmax(dim=-1, keepdim=True)
    return ids_SC.gather(1, place)[:, 0], inside


def _inside(kept: torch.Tensor, values: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Whether the kept prefix [S, C] surely ends within the candidates, ties included; [S]."""
    if values.shape[1] == vocab_size:
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    ends = values.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
    return (ends > values[:, -1:])[:, 0]


def _candidates(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best values and their ids [S, C], descending, ties by ascending id."""
    count = min(_NUM_CANDIDATES, logits.shape[1])
    ids = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _sorted(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All values and their ids [S, V], descending, ties by ascending id."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values, ids


def logprob_counts(specs: Sequence[SamplingSpec]) -> dict[int, int]:
    """How many of the best tokens are wanted with log-probabilities, of the rows that want any."""
    return {row: n for row, spec in enumerate(specs) if (n := spec.num_logprobs) is not None}


def logprobs_of(
    logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the raw logits [S, V] for some rows [R].

    Returns:
        Those of the tokens, fp32 [R]; their ranks, int64 [R]; the best ids, int64 [R, K], and
        theirs, fp32 [R, K].
    """
    logprobs = torch.log_softmax(logits[rows], dim=-1)
    chosen = logprobs.gather(1, tokens[rows][:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < tokens[rows][:, None]
    ranks = 1 + ((logprobs > chosen) | ((logprobs == chosen) & earlier)).sum(dim=-1)
    best = logprobs.topk(min(num_best, logits.shape[1]), dim=-1)
    return chosen[:, 0], ranks, best.indices, best.values


def read_logprobs(
    counts: dict[int, int],
    chosen: torch.Tensor,
    ranks: torch.Tensor,
    best_ids: torch.Tensor,
    best_values: torch.Tensor,
) -> dict[int, TokenLogprobs]:
    """What `logprobs_of` has found, by row."""
    lists = zip(
        counts.items(),
        chosen.tolist(),
        ranks.tolist(),
        best_ids.tolist(),
        best_values.tolist(),
        strict=True,
    )
    return {
        row: TokenLogprobs(logprob, rank, tuple(ids[:count]), tuple(values[:count]))
        for (row, count), logprob, rank, ids, values in lists
    }


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, specs: Sequence[SamplingSpec]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the raw logits for the rows that ask for them."""
    counts = logprob_counts(specs)
    if not counts:
        return [None] * len(specs)
    rows = torch.tensor(list(counts), device=logits.device)
    found = read_logprobs(counts, *logprobs_of(logits, tokens, rows, max(counts.values())))
    return [found.get(row) for row in range(len(specs))]


def _column(values: Sequence[float] | NDArray[np.float64], device: torch.device) -> torch.Tensor:
    """Numbers as an fp64 column [S, 1]."""
    return torch.as_tensor(values, dtype=torch.float64, device=device)[:, None]
