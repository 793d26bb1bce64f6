"""One suite for all retention methods: what they score, what they keep.

The oracles are plain fp32 loops that follow the definitions (docstrings in `compression/scores.py`)
word by word and share no code with `compression/`. A new score needs its oracle and its settings
here, a new shape nothing.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saqqara.compression.observation import Observation
from saqqara.compression.registry import SCORES, SHAPES
from saqqara.compression.retention import Retention
from saqqara.compression.select import kept_positions, select, topk_positions

HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5


@dataclass
class Prompt:
    """Keys [n, H, D] and queries [n, Hq, D] of one sequence in one layer."""

    keys: Tensor
    queries: Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[0]


def random_prompt(num_tokens: int, num_heads: int = 2, group: int = 3, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        keys=torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator),
        queries=torch.randn(num_tokens, num_heads * group, HEAD_DIM, generator=generator),
    )


def attention_mass(queries: Tensor, keys: Tensor) -> Tensor:
    """What an attention backend's `mass` returns: [H, n], summed over queries and the group."""
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    grouped = queries.reshape(num_queries, keys.shape[1], -1, HEAD_DIM)
    logits = torch.einsum("whgd,nhd->hgwn", grouped, keys) * SCALE
    positions = torch.arange(num_keys)
    future = positions > positions[num_keys - num_queries :].unsqueeze(1)
    return torch.softmax(logits.masked_fill(future, -math.inf), dim=-1).sum((1, 2))


def observe(
    prompt: Prompt,
    retention: Retention,
    layer: int = 0,
    num_layers: int = 1,
    heads: range | None = None,
) -> Observation:
    """The observation of a rank that holds the kv heads `heads` (all by default)."""
    num_heads = prompt.keys.shape[1]
    heads = range(num_heads) if heads is None else heads
    group = prompt.queries.shape[1] // num_heads
    num_queries = retention.num_window_queries(prompt.num_tokens)
    window = prompt.queries[prompt.num_tokens - num_queries :]
    keys = prompt.keys[:, heads.start : heads.stop]
    return Observation(
        layer=layer,
        num_layers=num_layers,
        prompt_tokens=prompt.num_tokens,
        keys=keys,
        values=keys,
        queries=window[:, heads.start * group : heads.stop * group] if num_queries else None,
        scale=SCALE,
        heads=heads,
        group_size=group,
        mass_fn=attention_mass,
    )


def score(retention: Retention, observation: Observation) -> Tensor:
    assert retention.score is not None
    return SCORES[retention.score].function(observation, retention)


# Oracles: (prompt, retention, layer, kv head) -> the score of each context token, j < n - w.


def streaming_oracle(prompt: Prompt, retention: Retention, layer: int, head: int) -> list[float]:
    return [float(j) for j in range(prompt.num_tokens - retention.window)]


def attention_oracle(prompt: Prompt, query_head: int, kv_head: int, i: int) -> list[np.float32]:
    """A[h, i, j] for all j: softmax over the keys up to query i."""
    query, keys = prompt.queries.numpy()[i, query_head], prompt.keys.numpy()[:, kv_head]
    logits = [np.float32(np.dot(query, keys[j])) * np.float32(SCALE) for j in range(i + 1)]
    highest = max(logits)
    weights = [np.exp(logit - highest) for logit in logits]
    total = sum(weights, np.float32(0))
    return [weight / total for weight in weights] + [np.float32(0)] * (prompt.num_tokens - i - 1)


def snapkv_oracle(prompt: Prompt, retention: Retention, layer: int, head: int) -> list[float]:
    n, w = prompt.num_tokens, retention.window
    group = prompt.queries.shape[1] // prompt.keys.shape[1]
    mean = [np.float32(0)] * n
    for query_head in range(head * group, (head + 1) * group):
        for i in range(n - w, n):
            attention = attention_oracle(prompt, query_head, head, i)
            for j in range(n):
                mean[j] += attention[j] / np.float32(w * group)
    context = mean[: n - w]
    pooled = []
    for j in range(n - w):
        reach = retention.kernel_size // 2
        near = [context[i] for i in range(j - reach, j + reach + 1) if 0 <= i < n - w]
        pooled.append(
            float(max(near) if retention.pooling == "max" else sum(near) / retention.kernel_size)
        )
    return pooled


def knorm_oracle(prompt: Prompt, retention: Retention, layer: int, head: int) -> list[float]:
    keys = prompt.keys.numpy()[:, head]
    return [
        -float(np.sqrt(sum((x * x for x in keys[j]), np.float32(0))))
        for j in range(prompt.num_tokens - retention.window)
    ]


def random_oracle(prompt: Prompt, retention: Retention, layer: int, head: int) -> list[float]:
    def scramble(x: int) -> int:  # MurmurHash3's 32-bit finaliser
        x = x % 2**32
        x = (x ^ x // 2**16) * 0x85EBCA6B % 2**32
        x = (x ^ x // 2**13) * 0xC2B2AE35 % 2**32
        return x ^ x // 2**16

    key = scramble(scramble(retention.seed // 2**32) ^ retention.seed)
    key = scramble(scramble(key ^ layer) ^ head)
    positions = range(prompt.num_tokens - retention.window)
    return [scramble(key ^ scramble(j + 1)) // 2**8 / 2**24 for j in positions]


ORACLES = {
    "streaming": streaming_oracle,
    "snapkv": snapkv_oracle,
    "knorm": knorm_oracle,
    "random": random_oracle,
}

SETTINGS = [
    {"score": "streaming", "window": 4},
    {"score": "snapkv", "window": 8},
    {"score": "snapkv", "window": 1, "kernel_size": 1},
    {"score": "snapkv", "window": 5, "kernel_size": 5, "pooling": "avg"},
    {"score": "snapkv", "window": 3, "sinks": 0, "kernel_size": 41},
    {"score": "knorm", "window": 4},
    {"score": "knorm", "window": 0, "sinks": 0},
    {"score": "random", "window": 2},
    {"score": "random", "window": 2, "seed": 2**63 + 12345},
]


def cases() -> list[Retention]:
    shapes = [shape for shape in SHAPES if not SHAPES[shape].ragged]
    return [
        Retention.parse({**settings, "shape": shape, "budget": 16})
        for settings in SETTINGS
        for shape in shapes
    ]


every_case = pytest.mark.parametrize("retention", cases(), ids=lambda retention: retention.label)


def oracle_scores(prompt: Prompt, retention: Retention, layer: int = 0) -> list[list[float]]:
    assert retention.score is not None
    oracle = ORACLES[retention.score]
    return [oracle(prompt, retention, layer, head) for head in range(prompt.keys.shape[1])]


def oracle_positions(scores: list[float], keep: int, window: int, sinks: int) -> list[int]:
    """Sinks and window, then the best of the rest; of equal scores the later token."""
    n = len(scores) + window
    kept = [*range(sinks), *range(n - window, n)]
    rest = sorted(range(sinks, n - window), key=lambda j: (scores[j], j), reverse=True)
    return sorted(kept + rest[: keep - len(kept)])


def test_every_score_has_an_oracle() -> None:
    assert set(ORACLES) == set(SCORES) == {settings["score"] for settings in SETTINGS}


@every_case
def test_scores_follow_the_definition(retention: Retention) -> None:
    prompt = random_prompt(40)
    for layer in (0, 3):
        ours = score(retention, observe(prompt, retention, layer, num_layers=4))
        assert ours.dtype == torch.float32
        # Sums of some tens of fp32 numbers in another order: a few units in the last place.
        expected = torch.tensor(oracle_scores(prompt, retention, layer))
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-7)


@every_case
def test_selection_is_exact_given_the_scores(retention: Retention) -> None:
    prompt = random_prompt(40)
    for layer in range(4):
        observation = observe(prompt, retention, layer, num_layers=4)
        chosen = select(retention, observation)
        keep = retention.layer_tokens(40, 4)[layer]
        if keep == 40:
            assert chosen is None
            continue
        assert chosen is not None
        assert chosen.dtype == torch.int64
        scores = score(retention, observation).tolist()
        assert chosen.tolist() == [
            oracle_positions(row, keep, retention.window, retention.sinks) for row in scores
        ]


@every_case
def test_selection_end_to_end_differs_at_most_near_the_cut(retention: Retention) -> None:
    prompt = random_prompt(40, seed=1)
    observation = observe(prompt, retention, layer=2, num_layers=4)
    keep = retention.layer_tokens(40, 4)[2]
    chosen = select(retention, observation)
    assert chosen is not None
    for ours, scores in zip(chosen.tolist(), oracle_scores(prompt, retention, 2), strict=True):
        expected = oracle_positions(scores, keep, retention.window, retention.sinks)
        context = [j for j in expected if retention.sinks <= j < len(scores)]
        cut = min((scores[j] for j in context), default=0.0)
        for j in set(ours) ^ set(expected):
            # 1e-5 is what the summation order may move a score by, and then some.
            assert scores[j] == pytest.approx(cut, rel=1e-5)


@given(
    num_tokens=st.integers(1, 120),
    num_layers=st.integers(1, 6),
    window=st.integers(1, 12),
    sinks=st.integers(0, 5),
    budget=st.one_of(st.integers(1, 60), st.sampled_from(["5%", "25%", "62.5%", "100%"])),
    score_name=st.sampled_from(sorted(SCORES)),
    shape=st.sampled_from([shape for shape in SHAPES if not SHAPES[shape].ragged]),
)
def test_totals_window_sinks_and_order(
    num_tokens: int,
    num_layers: int,
    window: int,
    sinks: int,
    budget: int | str,
    score_name: str,
    shape: str,
) -> None:
    if isinstance(budget, int):
        budget += window + sinks
    retention = Retention.parse(
        {"score": score_name, "shape": shape, "window": window, "sinks": sinks}, budget
    )
    prompt = random_prompt(num_tokens)
    total = 0
    for layer in range(num_layers):
        chosen = select(retention, observe(prompt, retention, layer, num_layers))
        if chosen is None:
            total += num_tokens
            continue
        total += chosen.shape[1]
        for row in chosen.tolist():
            assert row == sorted(set(row))
            assert row[0] >= 0
            assert row[-1] < num_tokens
            assert set(range(sinks)) <= set(row)
            assert set(range(num_tokens - window, num_tokens)) <= set(row)
    assert total == num_layers * retention.budget_tokens(num_tokens)


@every_case
def test_a_budget_of_the_whole_prompt_drops_nothing(retention: Retention) -> None:
    for num_tokens in range(1, 17):
        prompt = random_prompt(num_tokens)
        assert select(retention, observe(prompt, retention, 1, num_layers=3)) is None
    assert select(Retention.parse("full"), observe(prompt, Retention.parse("full"))) is None


@every_case
def test_selection_is_deterministic(retention: Retention) -> None:
    prompt = random_prompt(50)
    first, second = (select(retention, observe(prompt, retention, 1, 3)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@every_case
def test_sharding_over_kv_heads_changes_nothing(retention: Retention) -> None:
    prompt = random_prompt(50, num_heads=3)
    whole = select(retention, observe(prompt, retention, 2, 3))
    shards = [
        select(retention, observe(prompt, retention, 2, 3, heads))
        for heads in (range(2), range(2, 3))
    ]
    assert whole is not None
    assert torch.equal(whole, torch.cat([shard for shard in shards if shard is not None]))


def test_replicas_of_a_kv_head_add_up_their_scores() -> None:
    """Two ranks hold the one kv head and two of its four query heads each."""
    retention = Retention.parse({"method": "snapkv", "budget": 16, "window": 4})
    prompt = random_prompt(50, num_heads=1, group=4)
    whole = observe(prompt, retention)
    assert whole.queries is not None
    shares = [attention_mass(whole.queries[:, ranks], whole.keys) for ranks in ([0, 1], [2, 3])]
    replica = replace(whole, queries=whole.queries[:, :2], reduce_fn=lambda mine: mine + shares[1])
    torch.testing.assert_close(replica.window_mass(), whole.window_mass(), rtol=1e-6, atol=0)
    # Softmax rows sum to one, so the mean does.
    torch.testing.assert_close(whole.window_mass().sum(1), torch.ones(1), rtol=1e-6, atol=0)


def test_streaming_keeps_the_sinks_and_the_last_tokens() -> None:
    retention = Retention.parse({"method": "streaming", "budget": 10, "window": 3})
    chosen = select(retention, observe(random_prompt(100), retention))
    assert chosen is not None
    assert chosen.tolist() == [[0, 1, 2, 3, 94, 95, 96, 97, 98, 99]] * 2


def test_skipped_layers_keep_everything_and_the_others_pay_for_it() -> None:
    retention = Retention.parse({"method": "knorm", "budget": 25, "window": 8, "skip_layers": [1]})
    prompt = random_prompt(41)
    kept = [select(retention, observe(prompt, retention, layer, 3)) for layer in range(3)]
    assert [41 if chosen is None else chosen.shape[1] for chosen in kept] == [17, 41, 17]


def test_average_pooling_counts_zeros_beyond_the_edges() -> None:
    """As torch pools by default and so do SnapKV's code, KVCache-Factory and kvpress."""
    retention = Retention.parse(
        {"method": "snapkv", "budget": 8, "window": 2, "kernel_size": 3, "pooling": "avg"}
    )
    observation = observe(random_prompt(12, num_heads=1), retention)
    mass = observation.window_mass()[0]
    pooled = score(retention, observation)[0]
    torch.testing.assert_close(pooled[0], (mass[0] + mass[1]) / 3)
    torch.testing.assert_close(pooled[9], (mass[8] + mass[9]) / 3)


def test_random_is_uniform_noise_of_its_coordinates() -> None:
    def noise(num_tokens: int, seed: int = 0, layer: int = 0) -> Tensor:
        retention = Retention.parse(
            {"method": "random", "budget": 1, "window": 0, "sinks": 0, "seed": seed}
        )
        return score(retention, observe(random_prompt(num_tokens), retention, layer, 2))

    sample = noise(20_000)
    assert sample.min() >= 0
    assert sample.max() < 1
    # Means of 20,000 uniform numbers have a deviation of 0.002, correlations one of 0.007.
    torch.testing.assert_close(sample.mean(1), torch.full((2,), 0.5), rtol=0, atol=0.01)
    others = [noise(20_000, seed=1)[0], noise(20_000, seed=2**32)[0], noise(20_000, layer=1)[0]]
    rows = torch.stack([sample[0], sample[1], sample[0].roll(1), *others])
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.035
    assert torch.equal(noise(100), sample[:, :100])


@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 2.5, math.inf]), min_size=9, max_size=9
        ),
        min_size=1,
        max_size=3,
    ),
    k=st.integers(0, 9),
)
def test_ties_go_to_the_later_token(rows: list[list[float]], k: int) -> None:
    assert topk_positions(torch.tensor(rows), k).tolist() == [
        oracle_positions(row, k, window=0, sinks=0) for row in rows
    ]


def test_ties_go_to_the_later_token_in_long_rows() -> None:
    """Long enough for a sort that is unstable to show it."""
    scores = torch.randint(0, 3, (2, 5000), generator=torch.Generator().manual_seed(0)).float()
    expected = [oracle_positions(row, 2100, window=0, sinks=0) for row in scores.tolist()]
    assert topk_positions(scores, 2100).tolist() == expected


def test_sinks_and_window_are_kept_whatever_the_scores() -> None:
    scores = torch.tensor([[-math.inf, 1.0, 9.0, 3.0, 3.0, math.nan]])
    assert kept_positions(scores[:, :5], keep=6, window=3, sinks=1).tolist() == [[0, 2, 4, 5, 6, 7]]
    # A broken score must not break the shape: not a number counts as the best.
    assert kept_positions(scores, keep=3, window=1, sinks=1).tolist() == [[0, 5, 6]]
