"""Scores and selections of one layer, given keys and queries: any score with any budget shape.

The scores' oracles are the definitions of the method suite (`support/definitions.py`), which share
no code with `compression/`; cuts are written anew here. A new score is part of all of this by its
line there. A new shape needs its settings here, and an oracle if the heads of a layer compete.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.definitions import SCORE_DEFINITIONS
from support.slow_llama import Entry, Stored, attend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saqqara.compression.observation import Observation
from saqqara.compression.retention import Retention
from saqqara.compression.scores import SCORES
from saqqara.compression.scoring import context_scores
from saqqara.compression.selecting import compete, kept_positions, select, topk_positions
from saqqara.compression.shapes import SHAPES, Adaptive, Uniform
from saqqara.workers.mesh.layout import HeadShard, head_shard

HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5
LAYERS = 4


@dataclass
class Prompt:
    """Keys and values [n, H, D] and queries [n, Hq, D] of one sequence in one layer."""

    keys: Tensor
    queries: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[0]

    @property
    def positioned_queries(self) -> list[tuple[int, Tensor]]:
        return list(enumerate(self.queries.double()))

    @property
    def rows(self) -> list[list[Entry]]:
        """As the definitions see it: per kv head, each key with the attention that it gets."""
        keys, queries = self.keys.double(), self.queries.double()
        values = self.values.double()
        group = queries.shape[1] // keys.shape[1]
        rows = []
        for head in range(keys.shape[1]):
            mass = torch.zeros(len(keys), dtype=torch.float64)
            for query_head in range(head * group, (head + 1) * group):
                for i in range(len(keys)):
                    mass[: i + 1] += attend(queries[i, query_head], keys[: i + 1, head]) / group
            pairs = zip(keys[:, head], values[:, head], mass.tolist(), strict=True)
            rows.append([Entry(j, key, value, got) for j, (key, value, got) in enumerate(pairs)])
        return rows


def random_prompt(num_tokens: int, num_heads: int = 2, group: int = 3, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        keys=torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator),
        queries=torch.randn(num_tokens, num_heads * group, HEAD_DIM, generator=generator),
        values=torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator),
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
        layers=num_layers,
        prompt_tokens=prompt.num_tokens,
        keys=keys,
        values=prompt.values[:, heads.start : heads.stop],
        queries=window[:, heads.start * group : heads.stop * group] if num_queries else None,
        scale=SCALE,
        heads=heads,
        num_heads=num_heads,
        group_size=group,
        mass_fn=attention_mass,
    )


def rows_of(retention: Retention, observation: Observation) -> list[list[int]] | None:
    """What each local head keeps, by our code."""
    chosen = select(retention, observation)
    if chosen is None:
        return None
    rows = list(chosen)
    assert all(row.dtype == torch.int64 for row in rows)
    return [row.tolist() for row in rows]


class Exchange:
    """What ranks that run as threads show each other."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = Barrier(num_ranks, timeout=30)
        self._shown: list[Any] = [None] * num_ranks

    def show(self, rank: int, mine: Tensor) -> list[Tensor]:
        """What every rank shows."""
        self._shown[rank] = mine
        self._barrier.wait()
        shown = list(self._shown)
        self._barrier.wait()
        return shown


def rows_of_ranks(
    prompt: Prompt, retention: Retention, layer: int, num_ranks: int
) -> list[tuple[HeadShard, list[list[int]]]]:
    """What each of several tensor ranks keeps, with the heads that it holds."""
    num_heads, num_query_heads = prompt.keys.shape[1], prompt.queries.shape[1]
    held = [head_shard(num_query_heads, num_heads, num_ranks, rank) for rank in range(num_ranks)]
    everyone = Exchange(num_ranks)
    replicas = {mine.replica_group: Exchange(len(mine.replica_group)) for mine in held}

    def run(rank: int) -> list[list[int]]:
        mine = held[rank]

        def gather(x: Tensor) -> Tensor:
            rows = zip(held, everyone.show(rank, x), strict=True)
            by_head = {head: row for h, x in rows for head, row in zip(h.kv, x, strict=True)}
            return torch.stack([by_head[head] for head in range(num_heads)])

        def reduce(x: Tensor) -> Tensor:
            group = mine.replica_group
            return torch.stack(replicas[group].show(group.index(rank), x)).sum(0)

        whole = observe(prompt, retention, layer, LAYERS)
        observation = replace(
            whole,
            keys=whole.keys[:, mine.kv.start : mine.kv.stop],
            values=whole.values[:, mine.kv.start : mine.kv.stop],
            queries=None
            if whole.queries is None
            else whole.queries[:, mine.query.start : mine.query.stop],
            heads=mine.kv,
            reduce_fn=reduce if mine.replicated else None,
            gather_heads_fn=gather,
        )
        rows = rows_of(retention, observation)
        assert rows is not None
        return rows

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(zip(held, pool.map(run, range(num_ranks)), strict=True))


def score(retention: Retention, observation: Observation) -> Tensor:
    assert retention.score is not None
    return context_scores(retention.score, observation, retention.window)


VARIANTS: list[dict[str, Any]] = [
    {"score": "snapkv", "window": 8},
    {"score": "snapkv", "window": 1, "kernel_size": 1},
    {"score": "snapkv", "window": 5, "kernel_size": 5, "pooling": "avg"},
    {"score": "snapkv", "window": 3, "sinks": 0, "kernel_size": 41},
    {"score": "knorm", "window": 0, "sinks": 0},
    {"score": "random", "window": 2, "seed": 2**63 + 12345},
    {"score": "h2o", "sinks": 0, "recent_ratio": 0.2},
    {"score": "tova", "sinks": 0},
]

SETTINGS: list[dict[str, Any]] = [
    {"score": name} | ({"window": 4} if method.fixed_window is None else {})
    for name, method in SCORES.items()
] + VARIANTS


def profile(num_layers: int, seed: int = 0) -> dict[str, list[float]]:
    """Scores of 6 query heads, which are 2 kv heads of three or 3 of two."""
    scores = np.random.default_rng(seed).exponential(size=(num_layers, 6))
    return {f"{i}-{j}": [float(scores[i, j])] for i in range(num_layers) for j in range(6)}


SHAPE_SETTINGS: list[dict[str, Any]] = [
    {"shape": "uniform"},
    {"shape": "pyramid"},
    {"shape": "cosine", "beta": 3},
    {"shape": "adaptive"},
    {"shape": "adaptive", "mean": "pyramid", "floor_ratio": 0.5},
    {"shape": "adaptive", "mean": "cosine", "floor_ratio": 0},
    {"shape": "profile", "profile": profile(LAYERS)},
]


def fits(score_name: str, shape: str) -> bool:
    return SCORES[score_name].scope == "head" or not SHAPES[shape].heads_differ


def cases() -> list[Retention]:
    return [
        Retention.parse({**settings, **shape, "budget": 16})
        for settings in SETTINGS
        for shape in SHAPE_SETTINGS
        if fits(settings["score"], shape["shape"])
    ]


every_case = pytest.mark.parametrize("retention", cases(), ids=lambda retention: retention.label)
every_score = pytest.mark.parametrize(
    "retention",
    [retention for retention in cases() if isinstance(retention.shape, Uniform)],
    ids=lambda retention: retention.label,
)


def oracle_scores(prompt: Prompt, retention: Retention, layer: int = 0) -> list[list[float]]:
    """The score of each token before the window, by definition."""
    assert retention.score is not None
    definition = SCORE_DEFINITIONS[retention.score.name](retention.to_dict())
    stored = Stored(layer, prompt.rows, prompt.positioned_queries)
    context = prompt.num_tokens - retention.window
    return [definition(stored, head)[:context] for head in range(prompt.keys.shape[1])]


def oracle_positions(scores: list[float], keep: int, window: int, sinks: int) -> list[int]:
    """Sinks and window, then the best of the rest; of equal scores the later token."""
    n = len(scores) + window
    kept = [*range(sinks), *range(n - window, n)]
    rest = sorted(range(sinks, n - window), key=lambda j: (scores[j], j), reverse=True)
    return sorted(kept + rest[: keep - len(kept)])


def recent_oracle(retention: Retention, keep: int) -> int:
    """The last tokens of a row: the window, or H2O's part of the row, which the sinks precede."""
    settings = retention.to_dict()
    if settings["score"] != "h2o":
        return retention.window
    return min(int(Fraction(str(settings["recent_ratio"])) * keep), keep - retention.sinks)


def competing_oracle(
    scores: list[list[float]], keep: int, recent: int, retention: Retention
) -> list[list[int]]:
    """Each head's best up to its floor, then the best of all heads; scores of context tokens."""
    num_heads, num_context = len(scores), len(scores[0])
    floor = int(Fraction(str(retention.to_dict()["floor_ratio"])) * (keep - recent))
    order = [  # (score, token, minus head), so that the largest is the best
        (math.inf if j < retention.sinks else scores[head][j], j, -head)
        for head in range(num_heads)
        for j in range(num_context)
    ]
    order.sort(reverse=True)
    kept: list[list[int]] = [[] for _ in scores]
    for _, j, minus_head in order:
        if len(kept[-minus_head]) < floor:
            kept[-minus_head].append(j)
    slots = num_heads * (keep - recent) - sum(map(len, kept))
    for _, j, minus_head in order:
        if slots and j not in kept[-minus_head]:
            kept[-minus_head].append(j)
            slots -= 1
    return [sorted(row) + list(range(num_context, num_context + recent)) for row in kept]


def selection_oracle(
    scores: list[list[float]], retention: Retention, layer: int, num_layers: int
) -> list[list[int]] | None:
    """What every head keeps, given the scores of all tokens before the window; None for all."""
    n = len(scores[0]) + retention.window
    keep = retention.row_tokens(n, num_layers, len(scores))[layer].tolist()
    if keep == [n] * len(scores):
        return None
    recent = [recent_oracle(retention, count) for count in keep]
    if isinstance(retention.shape, Adaptive):
        context = [row[: n - recent[0]] for row in scores]
        return competing_oracle(context, keep[0], recent[0], retention)
    return [
        oracle_positions(row[: n - last], count, last, retention.sinks)
        for row, count, last in zip(scores, keep, recent, strict=True)
    ]


def test_every_score_has_a_function_of_its_own() -> None:
    missing = context_scores.dispatch(object)
    found = [context_scores.dispatch(kind) for kind in SCORES.values()]
    assert missing not in found
    assert len(set(found)) == len(SCORES)


def test_every_score_has_an_oracle() -> None:
    assert set(SCORE_DEFINITIONS) == set(SCORES)
    assert set(SHAPES) == {settings["shape"] for settings in SHAPE_SETTINGS}


@every_score
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
    for layer in range(LAYERS):
        observation = observe(prompt, retention, layer, LAYERS)
        scores = score(retention, observation).tolist()
        expected = selection_oracle(scores, retention, layer, LAYERS)
        assert rows_of(retention, observation) == expected


@every_case
def test_selection_end_to_end_differs_at_most_near_the_cut(retention: Retention) -> None:
    prompt = random_prompt(40, seed=1)
    chosen = rows_of(retention, observe(prompt, retention, layer=2, num_layers=LAYERS))
    scores = oracle_scores(prompt, retention, 2)
    expected = selection_oracle(scores, retention, 2, LAYERS)
    assert chosen is not None
    assert expected is not None
    assert sum(map(len, chosen)) == sum(map(len, expected))
    cuts = []
    for row, kept in zip(scores, expected, strict=True):
        recent = recent_oracle(retention, len(kept))
        context = [row[j] for j in kept if retention.sinks <= j < 40 - recent]
        cuts.append(min(context, default=0.0))
    for head, row in enumerate(scores):
        # Where heads compete, the cut may be that of another head.
        near = cuts if retention.ragged else [cuts[head]]
        for j in set(chosen[head]) ^ set(expected[head]):
            # 1e-5 is what the summation order may move a score by, and then some.
            assert any(row[j] == pytest.approx(cut, rel=1e-5) for cut in near)


@given(
    num_tokens=st.integers(1, 120),
    num_layers=st.integers(1, 6),
    window=st.integers(1, 12),
    sinks=st.integers(0, 5),
    budget=st.one_of(st.integers(1, 60), st.sampled_from(["5%", "25%", "62.5%", "100%"])),
    score_name=st.sampled_from(sorted(SCORES)),
    shape=st.sampled_from(SHAPE_SETTINGS),
)
def test_totals_window_sinks_and_order(
    num_tokens: int,
    num_layers: int,
    window: int,
    sinks: int,
    budget: int | str,
    score_name: str,
    shape: dict[str, Any],
) -> None:
    assume(fits(score_name, shape["shape"]))
    if isinstance(budget, int):
        budget += window + sinks
    settings = {"score": score_name, "sinks": sinks, **shape}
    fixed_window = SCORES[score_name].fixed_window
    if fixed_window is None:
        settings["window"] = window
    else:
        window = fixed_window
    if "profile" in shape:
        settings["profile"] = profile(num_layers, seed=num_tokens)
    retention = Retention.parse(settings, budget)
    prompt = random_prompt(num_tokens)
    expected = retention.row_tokens(num_tokens, num_layers, 2)
    total = 0
    for layer in range(num_layers):
        chosen = rows_of(retention, observe(prompt, retention, layer, num_layers))
        kept = [num_tokens] * 2 if chosen is None else [len(row) for row in chosen]
        assert sum(kept) == expected[layer].sum()
        if not retention.ragged:
            assert kept == expected[layer].tolist()
        total += sum(kept)
        for row in chosen or []:
            assert row == sorted(set(row))
            assert set(row) <= set(range(num_tokens))
            assert set(range(sinks)) <= set(row)
            assert set(range(num_tokens - window, num_tokens)) <= set(row)
    assert total == 2 * num_layers * retention.budget_tokens(num_tokens)


@every_case
def test_a_budget_of_the_whole_prompt_drops_nothing(retention: Retention) -> None:
    for num_tokens in range(1, 17):
        prompt = random_prompt(num_tokens)
        assert select(retention, observe(prompt, retention, 1, LAYERS)) is None
    assert select(Retention.parse("full"), observe(prompt, Retention.parse("full"))) is None


@every_case
def test_selection_is_deterministic(retention: Retention) -> None:
    prompt = random_prompt(50)
    first, second = (rows_of(retention, observe(prompt, retention, 1, LAYERS)) for _ in range(2))
    assert first is not None
    assert first == second


@every_case
def test_sharding_over_kv_heads_changes_nothing(retention: Retention) -> None:
    """2 + 1 heads on two ranks; on four, the first two share a head and its two query heads."""
    prompt = random_prompt(50, num_heads=3, group=2)
    whole = rows_of(retention, observe(prompt, retention, 2, LAYERS))
    assert whole is not None
    for num_ranks in (2, 4):
        for held, rows in rows_of_ranks(prompt, retention, 2, num_ranks):
            assert rows == whole[held.kv.start : held.kv.stop]


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
    chosen = rows_of(retention, observe(random_prompt(100), retention))
    assert chosen == [[0, 1, 2, 3, 94, 95, 96, 97, 98, 99]] * 2


def test_skipped_layers_keep_everything_and_the_others_pay_for_it() -> None:
    retention = Retention.parse({"method": "knorm", "budget": 25, "window": 8, "skip_layers": [1]})
    prompt = random_prompt(41)
    kept = [rows_of(retention, observe(prompt, retention, layer, 3)) for layer in range(3)]
    assert [[41] if rows is None else sorted({*map(len, rows)}) for rows in kept] == [
        [17],
        [41],
        [17],
    ]


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


def test_heads_that_compete_are_told_apart_at_once() -> None:
    """On a GPU every `nonzero` waits for the device: there is one, whatever the number of heads."""
    calls: list[str] = []

    class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Calls():  # type: ignore[no-untyped-call]
        compete(torch.rand(8, 40), keep=12, floor=2, recent=2, sinks=1)
    assert calls.count("nonzero") == 1
    assert not {"_local_scalar_dense", "item", "masked_select"} & set(calls)


def test_heads_that_compete_keep_what_they_deserve() -> None:
    """Head 0 has the better scores; head 1 keeps its floor, its sink and the recent tokens."""
    scores = torch.tensor([[0.0, 9.0, 8.0, 7.0, 6.0, 5.0], [0.0, 1.0, 4.0, 2.0, 3.0, 0.5]])
    rows = compete(scores, keep=5, floor=2, recent=2, sinks=1)
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3, 6, 7], [0, 2, 6, 7]]
    # A floor below the sinks is met by them, and all is free beyond.
    rows = compete(scores, keep=5, floor=0, recent=2, sinks=1)
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3, 4, 6, 7], [0, 6, 7]]


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 2.5, 1e30]), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ),
    keep=st.integers(5, 11),
    floor_ratio=st.sampled_from([0, 0.2, 0.5, 1]),
)
def test_ties_of_competing_heads_go_to_the_later_token_then_the_lower_head(
    rows: list[list[float]], keep: int, floor_ratio: float
) -> None:
    """Sinks 3, recent 2, context 9."""
    retention = Retention.parse(
        {"score": "knorm", "shape": "adaptive", "window": 2, "sinks": 3}
        | {"floor_ratio": floor_ratio, "budget": 6}
    )
    floor = int(Fraction(str(floor_ratio)) * (keep - 2))
    ours = compete(torch.tensor(rows), keep, floor, recent=2, sinks=3)
    assert [row.tolist() for row in ours] == competing_oracle(rows, keep, 2, retention)


def test_h2o_keeps_half_recent_and_half_heavy_hitters() -> None:
    """A key that all queries love is a heavy hitter; no other may take a recent token's place."""
    prompt = random_prompt(60, num_heads=1, group=1)
    prompt.queries[:, :, 0] = 4.0
    prompt.keys[:, :, 0] = 0.0
    prompt.keys[[7, 11, 30], :, 0] = 9.0
    retention = Retention.parse({"method": "h2o", "budget": 6, "sinks": 0})
    assert rows_of(retention, observe(prompt, retention)) == [[7, 11, 30, 57, 58, 59]]
    sinks = Retention.parse({"method": "h2o", "budget": 6, "sinks": 2})
    assert rows_of(sinks, observe(prompt, sinks)) == [[0, 1, 7, 57, 58, 59]]


def test_tova_keeps_the_same_tokens_in_all_heads() -> None:
    retention = Retention.parse("tova", 20)
    rows = rows_of(retention, observe(random_prompt(60, num_heads=3), retention))
    assert rows is not None
    assert rows == [rows[0]] * 3
