"""The sampler against plain loops: exact probabilities, filters, penalties, and independence.

A token is a function of (logits, spec, position, history) of its own row. So the tests draw at
many positions from one distribution and compare frequencies with probabilities computed by the
definition, one token at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from saqqara.cluster.sampling import MAX_TEMPERATURE, PENALTY_RANGE, SamplingParams
from saqqara.workers.plan import SamplingSpec
from saqqara.workers.sampling import sampler
from saqqara.workers.sampling.noise import gumbel, noise_keys
from saqqara.workers.sampling.sampler import TokenHistory, largest, sample

Array = NDArray[np.float64]

VOCAB = 1000
NOTHING = TokenHistory(np.zeros(0, np.int32), np.zeros(0, np.int32))


def make_logits(num_rows: int = 1, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_rows, VOCAB), generator=generator) * spread


def draw(
    logits: torch.Tensor, spec: SamplingSpec, count: int, seen: TokenHistory = NOTHING
) -> list[int]:
    """`count` tokens from one row of logits [V], at positions 0, 1, ..."""
    rows = logits.expand(count, -1)
    return [token for token, *_ in sample(rows, [spec] * count, range(count), [seen] * count)]


def exact_probabilities(logits: torch.Tensor, spec: SamplingSpec) -> NDArray[np.float64]:
    """Temperature, min_p, top_k, top_p by their definitions, with Python loops."""
    scaled = [value / spec.temperature for value in logits.double().tolist()]
    best = max(scaled)
    weights = {token: math.exp(value - best) for token, value in enumerate(scaled)}
    weights = {token: w for token, w in weights.items() if w >= spec.min_p}
    order = sorted(weights, key=lambda token: (-weights[token], token))
    if spec.top_k > 0:
        edge = weights[order[min(spec.top_k, len(order)) - 1]]
        order = [token for token in order if weights[token] >= edge]
    total = sum(weights[token] for token in order)
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if kept and mass >= spec.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    probabilities = np.zeros(len(scaled))
    for token in kept:
        probabilities[token] = weights[token] / mass
    return probabilities


def test_greedy_takes_the_best_token_and_leaves_logits_alone() -> None:
    logits = make_logits(5)
    before = logits.clone()
    spec = SamplingSpec(temperature=0.0, top_k=3, top_p=0.1, repetition_penalty=1.2)
    seen = TokenHistory(np.array([1], np.int32), np.array([2], np.int32))
    tokens = sample(logits, [replace(spec, repetition_penalty=1.0)] * 5, range(5), [seen] * 5)
    assert [token for token, *_ in tokens] == logits.argmax(dim=-1).tolist()
    sample(logits, [spec] * 5, range(5), [seen] * 5)
    assert torch.equal(logits, before)


FILTERS = {
    "none": SamplingSpec(),
    "temperature": SamplingSpec(temperature=0.5),
    "top_k": SamplingSpec(top_k=20),
    "top_k-1": SamplingSpec(top_k=1),
    "top_k-wide": SamplingSpec(top_k=900),
    "top_p": SamplingSpec(top_p=0.8),
    "top_p-none": SamplingSpec(top_p=0.0),
    "top_p-flat": SamplingSpec(top_p=0.95, temperature=30.0),
    "min_p": SamplingSpec(min_p=0.05),
    "min_p-flat": SamplingSpec(min_p=0.8, temperature=30.0),
    "all": SamplingSpec(temperature=1.3, top_k=50, top_p=0.7, min_p=0.01),
    "all-flat": SamplingSpec(temperature=20.0, top_k=700, top_p=0.7, min_p=0.5),
}


@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_follow_the_exact_probabilities(name: str) -> None:
    """20,000 positions; every frequency within 5 standard errors (plus one count)."""
    spec, count = FILTERS[name], 20_000
    logits = make_logits()[0]
    expected = exact_probabilities(logits, spec)
    counts = np.zeros(VOCAB)
    for start in range(0, count, 2000):
        rows = logits.expand(2000, -1)
        positions = range(start, start + 2000)
        for token, *_ in sample(rows, [spec] * 2000, positions, [NOTHING] * 2000):
            counts[token] += 1
    assert counts[expected == 0].sum() == 0, "a filtered token was drawn"
    error = np.sqrt(count * expected * (1 - expected))
    assert (np.abs(counts - count * expected) <= 5 * error + 1).all()


@pytest.mark.parametrize("num_candidates", [1, 4, 64, VOCAB])
def test_the_candidate_shortcut_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, num_candidates: int
) -> None:
    """Rows whose filtered set may reach beyond the candidates are sorted whole."""
    logits = make_logits(seed=3)[0]
    logits[::7] = logits[::7].round()  # ties, also at the edges of the filters
    expected = {name: draw(logits, spec, 200) for name, spec in FILTERS.items()}
    monkeypatch.setattr(sampler, "_NUM_CANDIDATES", num_candidates)
    for name, spec in FILTERS.items():
        assert draw(logits, spec, 200) == expected[name], name


def test_ties_at_the_edge_of_top_k_stay_in() -> None:
    logits = torch.zeros(VOCAB)
    logits[[3, 5, 8]] = 4.0
    logits[1] = 6.0
    assert set(draw(logits, SamplingSpec(top_k=2), 500)) == {1, 3, 5, 8}


def test_a_token_does_not_depend_on_its_batch() -> None:
    num_rows = 24
    logits = make_logits(num_rows, seed=1)
    specs = [replace(spec, seed=row) for row, spec in enumerate([*FILTERS.values()] * 2)]
    specs[5] = replace(specs[5], temperature=0.0, num_logprobs=2)
    specs[6] = replace(specs[6], repetition_penalty=1.5, frequency_penalty=0.3)
    seen = [
        TokenHistory(np.arange(row, dtype=np.int32), np.arange(3 * row, dtype=np.int32))
        for row in range(num_rows)
    ]
    positions = [7 * row for row in range(num_rows)]
    together = sample(logits, specs, positions, seen)
    alone = [
        sample(logits[row : row + 1], [specs[row]], [positions[row]], [seen[row]])[0]
        for row in range(num_rows)
    ]
    assert together == alone
    order = list(reversed(range(num_rows)))
    mixed = sample(
        logits[order],
        [specs[row] for row in order],
        [positions[row] for row in order],
        [seen[row] for row in order],
    )
    assert mixed == [together[row] for row in order]


def test_noise_is_uniform_and_differs_by_seed_position_and_token() -> None:
    """Mean, variance, correlation and a chi-square over 64 bins, within 5 standard errors."""
    count = 1 << 16

    def uniform(seeds: Sequence[int], positions: Sequence[int], tokens: torch.Tensor) -> Array:
        noise = gumbel(noise_keys(seeds, positions), tokens)
        numbers: Array = noise.neg().exp().neg().exp().flatten().numpy()  # the distribution's CDF
        return numbers

    token = torch.tensor([7])
    by_position = uniform([123] * count, range(count), token)
    by_seed = uniform(range(count), [5] * count, token)
    by_token = uniform([123], [5], torch.arange(count))
    for numbers in (by_position, by_seed, by_token):
        assert 0 < numbers.min() < numbers.max() < 1
        assert len(np.unique(numbers)) == count
        assert abs(numbers.mean() - 0.5) < 5 / math.sqrt(12 * count)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / math.sqrt(count)
        bins, _ = np.histogram(numbers, bins=64, range=(0, 1))
        chi_square = ((bins - count / 64) ** 2 / (count / 64)).sum()
        assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    other = uniform([124] * count, range(count), token)
    assert abs(np.corrcoef(by_position, other)[0, 1]) < 0.02
    assert noise_keys([-1], [0]) == noise_keys([2**64 - 1], [0])


def test_noise_is_splitmix64_of_the_token_id() -> None:
    """The int64 arithmetic of tensors against plain Python integers."""
    mask = (1 << 64) - 1
    [[key]] = noise_keys([42], [9]).tolist()
    tokens = [0, 1, 2, 49151]
    noise = gumbel(torch.tensor([[key]]), torch.tensor(tokens))[0]
    for token, got in zip(tokens, noise, strict=True):
        x = (token * 0x9E3779B97F4A7C15 + key) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        expected = -math.log(-math.log(((x >> 12) + 0.5) * 2.0**-52))
        assert float(got) == pytest.approx(expected, rel=1e-12)


def penalized_by_hand(
    logits: torch.Tensor, spec: SamplingSpec, prompt: list[int], output: list[int]
) -> torch.Tensor:
    """Repetition as in CTRL and Hugging Face, presence and frequency as OpenAI defines them."""
    result = logits.clone()
    for token in range(len(logits)):
        if token in prompt or token in output:
            value = result[token]
            penalty = spec.repetition_penalty
            result[token] = value / penalty if value > 0 else value * penalty
        result[token] -= spec.frequency_penalty * output.count(token)
        result[token] -= spec.presence_penalty * (token in output)
    return result


@pytest.mark.parametrize(
    "spec",
    [
        SamplingSpec(temperature=0.0, repetition_penalty=1.3),
        SamplingSpec(temperature=0.0, repetition_penalty=0.8),
        SamplingSpec(temperature=0.0, presence_penalty=1.5),
        SamplingSpec(temperature=0.0, frequency_penalty=-0.7),
        SamplingSpec(
            temperature=0.0, repetition_penalty=1.1, presence_penalty=0.4, frequency_penalty=0.2
        ),
    ],
)
def test_penalties_match_a_plain_loop(spec: SamplingSpec) -> None:
    generator = np.random.default_rng(0)
    logits = make_logits(4, seed=2)
    prompts = generator.integers(0, VOCAB, (4, 60))
    outputs = generator.integers(0, VOCAB, (4, 80))
    outputs[:, ::2] = outputs[:, :1]  # one token many times
    seen = [
        TokenHistory(prompt.astype(np.int32), output.astype(np.int32))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    seen[3] = NOTHING
    adjusted = sampler._penalized(logits, [spec] * 4, seen)
    for row, (prompt, output) in enumerate((s.prompt.tolist(), s.output.tolist()) for s in seen):
        expected = penalized_by_hand(logits[row], spec, prompt, output)
        # One fp32 rounding of the summed offsets instead of two.
        torch.testing.assert_close(adjusted[row], expected, rtol=1e-6, atol=1e-6)


def test_blocked_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 20.0, 10.0
    spec = SamplingSpec(temperature=0.0, min_tokens=3, blocked_token_ids=(7,))
    tokens = []
    for generated in range(5):
        seen = TokenHistory(np.zeros(4, np.int32), np.zeros(generated, np.int32))
        tokens.append(sample(logits, [spec], [generated], [seen])[0][0])
    assert tokens == [8, 8, 8, 7, 7]


def test_a_bias_moves_the_logits_of_its_own_row_only() -> None:
    logits = make_logits(3)
    best = logits.argmax(dim=-1).tolist()
    bias = ((best[1], -100.0), (7, 100.0))
    specs = [SamplingSpec(temperature=0.0, logit_bias=b) for b in ((), bias, ())]
    tokens = [token for token, *_ in sample(logits, specs, range(3), [NOTHING] * 3)]
    assert tokens == [best[0], 7, best[2]]
    expected = logits.clone()
    for token, value in bias:
        expected[1, token] += value
    assert torch.equal(sampler.biased(logits, specs), expected)


def test_a_biased_token_is_drawn_as_often_as_its_bias_says() -> None:
    """Two even logits, one raised by log 3: three of four draws, within 5 standard errors."""
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [10, 500]] = 0.0
    spec = SamplingSpec(logit_bias=((500, math.log(3)),))
    drawn = draw(logits, spec, 4000)
    assert abs(drawn.count(500) - 3000) < 5 * math.sqrt(4000 * 0.75 * 0.25)


def test_logprobs_are_the_models_own() -> None:
    """Raw log-probabilities: neither temperature nor penalties nor blocked tokens change them."""
    logits = make_logits(3)
    spec = SamplingSpec(
        temperature=0.3, top_k=5, presence_penalty=1.0, num_logprobs=4, blocked_token_ids=(1,)
    )
    seen = TokenHistory(np.arange(9, dtype=np.int32), np.arange(9, dtype=np.int32))
    specs = [spec, replace(spec, num_logprobs=None), replace(spec, num_logprobs=0)]
    results = sample(logits, specs, [0, 1, 2], [seen] * 3)
    expected = torch.log_softmax(logits, dim=-1)
    assert results[1][1] is None
    for row in (0, 2):
        token, logprobs = results[row][:2]
        assert logprobs is not None
        assert logprobs.logprob == pytest.approx(expected[row, token].item())
        ranked = expected[row].argsort(descending=True).tolist()
        assert logprobs.rank == 1 + ranked.index(token)
        assert list(logprobs.top_ids) == ranked[: 4 if row == 0 else 0]
        assert list(logprobs.top_logprobs) == pytest.approx(
            expected[row, list(logprobs.top_ids)].tolist()
        )


def test_ties_rank_as_greedy_decoding_takes_them() -> None:
    logits = torch.zeros(1, 8)
    spec = SamplingSpec(temperature=0.0, num_logprobs=0)
    token, logprobs = sample(logits, [spec], [0], [NOTHING])[0][:2]
    assert logprobs is not None
    assert (token, logprobs.rank) == (0, 1)


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[[10, 500]] = 0.0
    for spec in FILTERS.values():
        assert set(draw(logits, spec, 200)) <= {10, 500}


def test_only_allowed_tokens_are_drawn() -> None:
    logits = make_logits(2)
    allowed = np.array([7, 400, 999], np.int32)
    specs = [SamplingSpec(allowed_token_ids=allowed.tobytes()), SamplingSpec(temperature=0.0)]
    for position in range(50):
        limited, free = sample(logits, specs, [position] * 2, [NOTHING] * 2)
        assert limited.token_id in allowed
        assert free.token_id == logits[1].argmax()
    greedy = replace(specs[0], temperature=0.0)
    best = max(allowed.tolist(), key=lambda token: float(logits[0, token]))
    assert draw(logits[0], greedy, 1) == [best]


def test_a_bad_word_never_gets_its_last_token() -> None:
    """The word 3 4 5: token 5 is forbidden exactly where the output ends with 3 4."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 9] = 20.0, 10.0
    prompt = np.array([3, 4], np.int32)

    def best(words: tuple[tuple[int, ...], ...], *output: int) -> int:
        seen = TokenHistory(prompt, np.array(output, np.int32))
        spec = SamplingSpec(temperature=0.0, bad_words=words)
        return sample(logits, [spec], [0], [seen])[0].token_id

    assert best(((5,),)) == 9, "a word of one token is forbidden everywhere"
    assert best(((3, 4, 5),), 1, 3, 4) == 9
    assert best(((3, 4, 5),), 3, 4, 4) == 5
    assert best(((3, 4, 5),)) == 5, "the prompt does not count"
    assert best(((3, 4, 5),), 4) == 5
    assert best(((3, 4, 5), (4, 9)), 3, 4) not in (5, 9)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(broken: float, temperature: float) -> None:
    logits = make_logits(4)
    whole = logits.clone()
    logits[1, 3] = broken
    logits[2] = -math.inf
    specs = [SamplingSpec(temperature=temperature, top_k=5, num_logprobs=2)] * 4
    draws = sample(logits, specs, range(4), [NOTHING] * 4)
    expected = sample(whole, specs, range(4), [NOTHING] * 4)
    for row in (1, 2):
        assert "not finite" in (draws[row].error or "")
        assert f"position {row}" in (draws[row].error or "")
        assert draws[row][:2] == (0, None)
    assert [draws[0], draws[3]] == [expected[0], expected[3]]


def test_a_nan_that_only_the_log_probabilities_see_fails_the_row() -> None:
    logits = make_logits(1)
    logits[0, 3] = math.nan
    spec = SamplingSpec(min_tokens=1, blocked_token_ids=(3,), num_logprobs=0)
    assert "not finite" in (sample(logits, [spec], [0], [NOTHING])[0].error or "")


def test_settings_that_exclude_every_token_say_so() -> None:
    allowed = np.array([7, 8], np.int32).tobytes()
    spec = SamplingSpec(allowed_token_ids=allowed, bad_words=((7,), (8,)))
    [drawn] = sample(make_logits(1), [spec], [4], [NOTHING])
    assert drawn.error is not None
    assert "no token is left that may stand at position 4: allowed_token_ids" in drawn.error


SMALL_VOCAB = 300  # more than the candidates, so that both ways of drawing are taken
token_ids = st.integers(0, SMALL_VOCAB - 1)
params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, MAX_TEMPERATURE) | st.sampled_from([0, 1e-40, 1e-5, 1.0]),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(-1, 2**31 - 1) | st.integers(-1, SMALL_VOCAB + 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(*PENALTY_RANGE),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "min_tokens": st.integers(0, 2**31 - 1),
        "stop_token_ids": st.lists(token_ids, max_size=SMALL_VOCAB),
        "allowed_token_ids": st.none() | st.lists(token_ids, min_size=1),
        "logit_bias": st.dictionaries(token_ids, st.floats(-100, 100)),
        "logprobs": st.none() | st.integers(0, 20),
    },
)
special = st.sampled_from([-math.inf, 0.0, 1e-45, -1e30, 1e30, 5.0])


@given(
    rows=st.lists(
        st.tuples(params, st.integers(-(2**63), 2**63 - 1), st.lists(token_ids, max_size=9)),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_valid_parameters_give_a_token_or_an_error(rows: Any, data: st.DataObject) -> None:
    """A token that may stand there, or an error where the row has none; never an exception."""
    logits = make_logits(len(rows))[:, :SMALL_VOCAB].clone()
    for row in range(len(rows)):
        for value in data.draw(st.lists(special, max_size=3)):
            logits[row, data.draw(st.just(slice(None)) | st.lists(token_ids, max_size=3))] = value
    words = data.draw(st.lists(st.lists(token_ids, min_size=1, max_size=3).map(tuple), max_size=3))
    try:
        specs = [
            SamplingParams(**{"max_tokens": None} | given).spec(seed, (2,), bad_words=tuple(words))
            for given, seed, _ in rows
        ]
    except ValueError as error:  # refused before it is queued: see test_request.py
        if "nothing but tokens that end the text" not in str(error):
            raise
        reject()
    seen = [
        TokenHistory(np.array(ids[:4], np.int32), np.array(ids[4:], np.int32)) for *_, ids in rows
    ]
    draws = sample(logits, specs, range(len(rows)), seen)
    for row, (spec, drawn) in enumerate(zip(specs, draws, strict=True)):
        allowed = np.frombuffer(spec.allowed_token_ids, np.int32)
        if drawn.error is None:
            assert logits[row, drawn.token_id] > -math.inf
            assert not len(allowed) or drawn.token_id in allowed
            assert (drawn.token_id,) not in spec.bad_words
        else:
            banned = {*spec.blocked_token_ids, *(word[-1] for word in spec.bad_words)}
            left = (set(allowed.tolist()) or set(range(SMALL_VOCAB))) - banned
            assert all(logits[row, token] == -math.inf for token in left)


@pytest.mark.parametrize("width", [1, 1024, 1025, 1536, 5000])
def test_the_largest_is_found_as_torch_finds_it(width: int) -> None:
    """The first of equals, and NaN before all; also in the last logits, which fill no round."""
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    logits[0, -1] = 99
    logits[1, [width // 3, width // 2]] = 50
    logits[2, width // 2] = torch.nan
    logits[3] = -torch.inf
    best, tokens = largest(logits)
    expected = logits.max(dim=-1)
    torch.testing.assert_close(best, expected.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tokens, expected.indices)
    assert largest(logits[:0])[1].shape == (0,)
