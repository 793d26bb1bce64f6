"""Prefill over ranks: propagating groups, and sequences that share a prompt, equal one rank's.

All ranks of a stage select the same tokens, and stages hand over positions.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.plans import GREEDY, new_sequence, prefill_plan, run_greedy
from support.ranks import Job, RankRun, run_on_ranks, sampled_tokens
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout, head_shard
from saqqara.workers.plan import (
    CachedPrefix,
    DecodeItem,
    NewSequence,
    Parking,
    PrefillGroup,
    StepPlan,
    StepResult,
)
from saqqara.workers.worker import Worker

LAYERS, HEADS, NUM_TOKENS = 6, 3, 4
NUM_SHORT = 30
PYRAMID = Retention.parse(
    {"propagate": {"kind": "pyramidinfer", "rho": 0.5, "min_context": 8, "recent_ratio": 0.2}}
)
SNAPKV = Retention.parse({"method": "snapkv", "budget": 20, "window": 8})
ADAKV = Retention.parse({"method": "adakv", "budget": 20, "window": 8})
KNORM = Retention.parse({"method": "knorm-pyramid", "budget": "40%", "window": 8})
ONCE = Retention.parse({"propagate": {"kind": "once", "layer": 1, "keep": 0.4, "window": 6}})
PROFILE = {
    f"{layer}-{head}": [1 + (5 * layer + head) % 4] for layer in range(6) for head in range(6)
}
HEADKV = Retention.parse({"method": "headkv", "budget": 20, "window": 8, "profile": PROFILE})
TURNS = (SNAPKV, ADAKV, HEADKV)


def once(layer: int) -> Retention:
    """Drops tokens behind a layer, and some with a budget besides."""
    settings = {"kind": "once", "layer": layer, "keep": 0.4, "window": 6}
    return Retention.parse({**({} if layer == 1 else SNAPKV.to_dict()), "propagate": settings})


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCAB, length).tolist() for length in (70, 9, 41)]


def make_plans(new: list[NewSequence], splits: list[int]) -> list[StepPlan]:
    """Prefill in ranges that end at `splits`, then greedy decode, then free."""
    slots = tuple(n.slot for n in new)
    plans: list[StepPlan] = []
    for start, stop in zip([0, *splits], [*splits, LAYERS], strict=True):
        group = PrefillGroup(slots, start, stop)
        plans.append(StepPlan(len(plans), new=() if plans else tuple(new), prefill=(group,)))
    for step in range(NUM_TOKENS - 1):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
        plans.append(StepPlan(len(plans), decode=items))
    return [*plans, StepPlan(len(plans), free=slots)]


def make_new(retention: Retention) -> list[NewSequence]:
    return [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]


def make_shared() -> list[NewSequence]:
    """One prompt with three retentions, and another prompt behind it."""
    first, _, other = prompts()
    return [
        new_sequence(0, first),
        new_sequence(1, first, retention=SNAPKV, shares_prefill_with=0),
        new_sequence(2, first, retention=KNORM, shares_prefill_with=0),
        new_sequence(3, other),
    ]


def make_scored() -> list[NewSequence]:
    """Prompts whose tokens are scored, beside others: one alone, one that a follower asks of."""
    wanted = replace(GREEDY, num_prompt_logprobs=3)
    first, short, other = prompts()
    return [
        new_sequence(0, first),
        new_sequence(1, first, sampling=wanted, retention=SNAPKV, shares_prefill_with=0),
        new_sequence(2, short),
        new_sequence(3, other, sampling=replace(GREEDY, num_prompt_logprobs=0)),
    ]


def hit_plans(splits: list[int]) -> list[StepPlan]:
    """A prompt fills 15 blocks and goes; others begin with 10, none and 15 of them."""
    storer = replace(new_sequence(3, prompts()[0]), prefix=CachedPrefix(stored=tuple(range(15))))
    new = make_hits()
    for number, num_blocks in ((0, 10), (2, 15)):
        new[number] = replace(new[number], prefix=CachedPrefix(tuple(range(num_blocks))))
    group = PrefillGroup((3,), 0, LAYERS)
    first = StepPlan(0, new=(storer,), prefill=(group,))
    plans = [first, StepPlan(0, free=(3,)), *make_plans(new, splits)]
    plans.append(StepPlan(0, evict=tuple(range(15))))
    plans += [plan for retention in TURNS for plan in turn_plans(splits, retention)]
    return [replace(plan, step=step) for step, plan in enumerate(plans)]


def cut_plans(splits: list[int], cut: int) -> list[StepPlan]:
    """The same where tokens are dropped behind a layer, and a hit fills the last blocks."""
    retention, first = once(cut), prompts()[0]
    blocks = tuple(range(100 * cut, 100 * cut + 15))
    storer = new_sequence(3, first, retention=retention)
    storer = replace(storer, prefix=CachedPrefix(stored=blocks[:10]))
    hits = [
        new_sequence(slot, text, retention=retention) for slot, text in enumerate(cut_prompts())
    ]
    hits[0] = replace(hits[0], prefix=CachedPrefix(blocks[:8]))
    hits[1] = replace(hits[1], prefix=CachedPrefix(blocks[:10], blocks[10:]))
    again = replace(hits[1], prefix=CachedPrefix(blocks))
    group = PrefillGroup((3,), 0, LAYERS)
    return [
        StepPlan(0, new=(storer,), prefill=(group,)),
        StepPlan(0, free=(3,)),
        *make_plans(hits, splits),
        *make_plans([again], splits),
        StepPlan(0, evict=blocks),
    ]


def all_cut_plans(splits: list[int], cuts: Sequence[int]) -> list[StepPlan]:
    plans = [plan for cut in cuts for plan in cut_plans(splits, cut)]
    return [replace(plan, step=step) for step, plan in enumerate(plans)]


def cut_prompts() -> list[list[int]]:
    """What begins like the first prompt, or does not."""
    first, short, other = prompts()
    return [first[:32] + short, first, other]


def turn_plans(splits: list[int], retention: Retention) -> list[StepPlan]:
    """A prompt's rows stay, and a longer one goes on behind them."""
    prompt, parking = prompts()[0], Parking(3, 9, to_host=False)
    first = new_sequence(3, prompt[:40], retention=retention)
    longer = replace(new_sequence(3, prompt, retention=retention), resumes=9, resumed_tokens=40)
    return [
        StepPlan(0, new=(first,), prefill=(PrefillGroup((3,), 0, LAYERS),)),
        StepPlan(0, park=(parking,), free=(3,)),
        *make_plans([longer], splits),
    ]


def make_hits() -> list[NewSequence]:
    """What begins like the first prompt, and leaves 8 tokens or more."""
    first, short, other = prompts()
    retentions = [SNAPKV, SNAPKV, Retention.parse({"method": "adakv", "budget": 20, "window": 8})]
    texts = [first[:48], short, first[:60] + other[:8]]
    return [
        new_sequence(s, t, retention=r)
        for s, (t, r) in enumerate(zip(texts, retentions, strict=True))
    ]


# 3 kv heads on 2 ranks are 2 + 1; on 4 ranks one is shared by two.
CASES = {
    "pp2": (MeshLayout(pipeline_size=2), [2, 3], make_new(PYRAMID)),
    "tp2": (MeshLayout(tensor_size=2), [], make_new(PYRAMID)),
    "pp2xtp2": (MeshLayout(tensor_size=2, pipeline_size=2), [3], make_new(ONCE)),
    "tp4": (MeshLayout(tensor_size=4), [4], make_new(PYRAMID)),
    "scored-pp2xtp2": (
        MeshLayout(tensor_size=2, pipeline_size=2),
        [1, 4],
        make_scored(),
    ),
    "shared-pp2": (MeshLayout(pipeline_size=2), [1, 3], make_shared()),
}


HIT_CASES = {
    "hit-pp2": (MeshLayout(pipeline_size=2), [2]),
    "hit-tp2": (MeshLayout(tensor_size=2), []),
    "hit-tp4": (MeshLayout(tensor_size=4), [2]),
}
CUT_CASES = {
    # Two stages have three layers each: the second has the hidden states behind layer 2.
    "cut-pp2": (MeshLayout(pipeline_size=2), [2, 3], (1, 2, 4)),
    "cut-tp2": (MeshLayout(tensor_size=2), [], (1, 2)),
}


def make_config(folder: Path, layout: MeshLayout) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=4,
        page_tokens=4,
        kv_memory_gib=0.01,
        layer_split=(3, 3) if layout.pipeline_size == 2 else None,
        pipeline_parallel_size=layout.pipeline_size,
        tensor_parallel_size=layout.tensor_size,
        executor="ray",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    save_tiny("llama-gqa", folder, num_layers=LAYERS)
    return folder


def one_token_plans() -> list[StepPlan]:
    """More sequences than sends may be pending, one after the other; their token is fed to none."""
    plans: list[StepPlan] = []
    for _ in range(NUM_SHORT):
        new, group = new_sequence(0, prompts()[1]), PrefillGroup((0,), 0, LAYERS)
        plans.append(StepPlan(len(plans), new=(new,), prefill=(group,)))
        plans.append(StepPlan(len(plans), free=(0,)))
    return plans


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[RankRun]]:
    """What the ranks of every case did."""
    jobs = {
        name: Job(make_config(folder, layout), layout, make_plans(new, splits))
        for name, (layout, splits, new) in CASES.items()
    }
    stages = MeshLayout(pipeline_size=2)
    for name, (layout, splits) in HIT_CASES.items():
        jobs[name] = Job(make_config(folder, layout), layout, hit_plans(splits))
    for name, (layout, splits, cuts) in CUT_CASES.items():
        jobs[name] = Job(make_config(folder, layout), layout, all_cut_plans(splits, cuts))
    jobs["one-token"] = Job(make_config(folder, stages), stages, one_token_plans())
    return dict(zip(jobs, run_on_ranks(list(jobs.values())), strict=True))


def test_tokens_that_nobody_is_fed_block_no_stage(
    folder: Path, runs: dict[str, list[RankRun]]
) -> None:
    alone = Worker.local(make_config(folder, MeshLayout()).for_worker())
    [[expected]] = run_greedy(alone, [prompts()[1]], 1)
    tokens = [t.token_id for t in sampled_tokens(runs["one-token"])[0]]
    assert tokens == [expected.token_id] * NUM_SHORT


def test_ranks_together_score_prompts_as_one_does(
    folder: Path, runs: dict[str, list[RankRun]]
) -> None:
    """The first rank of the last stage says it, and no other does."""
    alone = Worker.local(make_config(folder, MeshLayout()).for_worker())
    [_, first, _, other] = CASES["scored-pp2xtp2"][2]
    by_rank = [[p for r in run.results for p in r.prompts] for run in runs["scored-pp2xtp2"]]
    assert [len(scores) for scores in by_rank] == [0, 0, 2, 0]
    for scores, new in zip(by_rank[2], (first, other), strict=True):
        lone = replace(new, slot=0, shares_prefill_with=None)
        [expected] = alone.execute(prefill_plan(alone, [lone])).prompts
        alone.execute(StepPlan(1, free=(0,)))
        assert scores.slot == new.slot
        assert (scores.top_ids, scores.ranks) == (expected.top_ids, expected.ranks)
        for got, want in (
            (scores.logprobs, expected.logprobs),
            (scores.top_logprobs, expected.top_logprobs),
        ):
            numbers = np.frombuffer(got, np.float32), np.frombuffer(want, np.float32)
            np.testing.assert_allclose(*numbers, atol=1e-4)  # sums over ranks round otherwise
    assert len(by_rank[2][0].top_ids) == 4 * 3 * (first.prompt_tokens - 1)
    assert by_rank[2][1].top_ids == b""


def kept_of(results: Sequence[StepResult], slot: int, num_heads: int) -> list[np.ndarray]:
    """What each prefill of a slot kept, int32 [L, H] of a rank."""
    kept = [kept for result in results for kept in result.kept if kept.slot == slot]
    return [np.frombuffer(k.counts, dtype=np.int32).reshape(-1, num_heads) for k in kept]


@pytest.mark.parametrize("case", HIT_CASES)
def test_ranks_reuse_a_prefix_as_one_computes_it(
    case: str, folder: Path, runs: dict[str, list[RankRun]]
) -> None:
    """Or a turn's rows as one reuses them."""
    alone = Worker.local(make_config(folder, MeshLayout()).for_worker())
    got = sampled_tokens(runs[case])
    plans = [plan for retention in TURNS for plan in turn_plans([], retention)]
    expected_turns = list(map(alone.execute, plans))
    turns = [t.token_id for result in expected_turns for t in result.sampled]
    assert [t.token_id for t in got[3]][1:] == turns  # behind the token of the prompt that stored
    for new in make_hits():
        prompt, retention = new.tokens().tolist(), new.retention
        [expected] = run_greedy(alone, [prompt], NUM_TOKENS, retention=retention)
        assert [t.token_id for t in got[new.slot]] == [t.token_id for t in expected]
    layout, whole = HIT_CASES[case][0], kept_of(expected_turns, 3, HEADS)
    for rank, run in enumerate(runs[case]):
        heads = head_shard(6, HEADS, layout.tensor_size, layout.tensor_rank(rank)).kv
        num_layers = LAYERS // layout.pipeline_size
        start = layout.pipeline_rank(rank) * num_layers
        kept = kept_of(run.results, 3, len(heads))[1:]
        assert len(kept) == len(whole) == 2 * len(TURNS)
        for mine, rows in zip(kept, whole, strict=True):
            assert (mine == rows[start : start + num_layers, heads.start : heads.stop]).all()
    for run in runs[case]:
        stored = run.results[0].prefill_layer_tokens // len(prompts()[0])
        computed = sum(result.prefill_layer_tokens for result in run.results[1:])
        assert computed == stored * (8 + 9 + 8 + len(TURNS) * (40 + 30))
        assert run.results[-1].pages_free == run.num_pages


@pytest.mark.parametrize("case", CUT_CASES)
def test_ranks_reuse_what_lies_below_a_cut(
    case: str, folder: Path, runs: dict[str, list[RankRun]]
) -> None:
    """Wherever the cut is: the stage behind it has the hidden states of cached tokens."""
    alone = Worker.local(make_config(folder, MeshLayout()).for_worker())
    layout, _, cuts = CUT_CASES[case]
    got = sampled_tokens(runs[case])
    expected: dict[int, list[int]] = {slot: [] for slot in range(4)}
    computed = np.zeros(LAYERS, dtype=np.int64)
    for cut in cuts:
        retention = once(cut)
        answers = [
            [t.token_id for t in run_greedy(alone, [text], NUM_TOKENS, retention=retention)[0]]
            for text in cut_prompts()
        ]
        expected[3].append(answers[1][0])
        for slot in (0, 1, 2, 1):
            expected[slot] += answers[slot]
        for length, cached in ((70, 0), (41, 32), (70, 40), (41, 0), (70, 60)):
            entering = np.array(retention.entering_tokens(length, LAYERS))
            computed += entering - cached * (np.arange(LAYERS) <= cut)
    assert {slot: [t.token_id for t in tokens] for slot, tokens in got.items()} == expected
    num_layers = LAYERS // layout.pipeline_size
    for rank, run in enumerate(runs[case]):
        start = layout.pipeline_rank(rank) * num_layers
        num_computed = sum(result.prefill_layer_tokens for result in run.results)
        assert num_computed == computed[start : start + num_layers].sum()
        assert not any(result.refused for result in run.results)
        assert run.results[-1].pages_free == run.num_pages


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_equal_one(case: str, folder: Path, runs: dict[str, list[RankRun]]) -> None:
    layout, _, new = CASES[case]
    alone = Worker.local(make_config(folder, MeshLayout()).for_worker())
    expected = [
        run_greedy(alone, [n.tokens().tolist()], NUM_TOKENS, retention=n.retention)[0] for n in new
    ]
    got = sampled_tokens(runs[case])
    assert [[t.token_id for t in got[slot]] for slot in range(len(new))] == [
        [t.token_id for t in tokens] for tokens in expected
    ]
    leaders = [n for n in new if n.shares_prefill_with is None]
    entered = np.sum(
        [n.retention.entering_tokens(n.prompt_tokens, LAYERS) for n in leaders], axis=0
    )
    per_stage = LAYERS // layout.pipeline_size
    for rank, run in enumerate(runs[case]):
        start = layout.pipeline_rank(rank) * per_stage
        computed = sum(result.prefill_layer_tokens for result in run.results)
        assert computed == entered[start : start + per_stage].sum()
        assert run.results[-1].pages_free == run.num_pages
        heads = head_shard(6, HEADS, layout.tensor_size, layout.tensor_rank(rank)).kv
        kept = [kept for result in run.results for kept in result.kept]
        assert len(kept) == len(new)
        for counts, n in zip(kept, new, strict=True):
            rows = np.frombuffer(counts.counts, dtype=np.int32).reshape(per_stage, len(heads))
            wanted = n.retention.layer_tokens(n.prompt_tokens, LAYERS)[start : start + per_stage]
            assert (rows == np.array(wanted)[:, None]).all()
