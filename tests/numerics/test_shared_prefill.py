"""A prompt that several sequences share is computed once and retained by each one's own method."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.plans import new_sequence, prefill_plan, run_greedy
from support.tiny import VOCAB, save_tiny

from saqqara import LLM, SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, PrefillGroup, StepPlan
from saqqara.workers.worker import Worker

LAYERS, HEADS, NUM_TOKENS = 3, 3, 5
PAGE_BYTES = 4 * 2 * 16 * 4  # 4 tokens, key and value, head_dim 16, fp32
RETENTIONS = [
    Retention.parse("full"),
    Retention.parse({"method": "snapkv", "budget": 20, "window": 8}),
    Retention.parse({"method": "pyramidkv", "budget": "40%", "window": 8}),
    Retention.parse({"method": "random", "budget": 30, "window": 8}),
    Retention.parse({"method": "knorm", "budget": 25, "window": 8}),
]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(3, VOCAB, length).tolist() for length in (60, 33)]


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": 4}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}).for_worker())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder)
    return folder


def test_one_prompt_with_five_retentions_equals_five_runs(tiny: Path) -> None:
    """Beside another prompt of the group, and in layer ranges."""
    worker = make_worker(tiny)
    prompt, other = prompts()
    alone = [run_greedy(worker, [prompt], NUM_TOKENS, retention=r)[0] for r in RETENTIONS]
    [beside] = run_greedy(worker, [other], NUM_TOKENS)
    new = [
        new_sequence(s, prompt, retention=r, shares_prefill_with=0 if s else None)
        for s, r in enumerate(RETENTIONS)
    ]
    new.append(new_sequence(5, other))
    slots = tuple(n.slot for n in new)
    results = [
        worker.execute(StepPlan(0, new=tuple(new), prefill=(PrefillGroup(slots, 0, 1),))),
        worker.execute(StepPlan(1, prefill=(PrefillGroup(slots, 1, LAYERS),))),
    ]
    assert sum(r.prefill_layer_tokens for r in results) == LAYERS * (len(prompt) + len(other))
    for kept, sequence in zip(results[-1].kept, new, strict=True):
        counts = np.frombuffer(kept.counts, dtype=np.int32).reshape(LAYERS, HEADS)
        rows = sequence.retention.row_tokens(sequence.prompt_tokens, LAYERS, HEADS)
        assert (counts == rows).all()
    worker.check_integrity()
    for step in range(NUM_TOKENS - 1):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
        results.append(worker.execute(StepPlan(step + 2, decode=items)))
        worker.check_integrity()
    for slot, expected in enumerate([*alone, beside]):
        got = [t.token_id for r in results for t in r.sampled if t.slot == slot]
        assert got == [t.token_id for t in expected]
    last = worker.execute(StepPlan(9, free=slots))
    worker.check_integrity()
    assert last.pages_free == worker.info.num_pages


def test_followers_of_a_propagating_leader_keep_what_entered(tiny: Path) -> None:
    once = {"kind": "once", "layer": 0, "keep": 0.4, "window": 6}
    retentions = [
        Retention.parse({"propagate": once}),
        Retention.parse({"method": "knorm", "budget": 20, "window": 8, "propagate": once}),
    ]
    worker = make_worker(tiny)
    prompt, _ = prompts()
    alone = [run_greedy(worker, [prompt], 1, retention=r)[0][0].token_id for r in retentions]
    new = [
        new_sequence(s, prompt, retention=r, shares_prefill_with=0 if s else None)
        for s, r in enumerate(retentions)
    ]
    result = worker.execute(prefill_plan(worker, new))
    worker.check_integrity()
    assert [t.token_id for t in result.sampled] == alone
    assert result.prefill_layer_tokens == sum(retentions[0].entering_tokens(60, LAYERS))


def test_a_follower_can_be_scored_or_resumed(tiny: Path) -> None:
    worker = make_worker(tiny)
    prompt, continuation = prompts()[0], prompts()[1][:4]
    item = DecodeItem(1, len(prompt), 3, sample=False)
    scores = []
    for leader in (None, 0):
        new = [new_sequence(0, prompt)] if leader is not None else []
        new.append(new_sequence(1, prompt, continuation, score=True, shares_prefill_with=leader))
        results = [
            worker.execute(prefill_plan(worker, new)),
            worker.execute(StepPlan(1, decode=(item,))),
        ]
        scores.append([lp for r in results for s in r.scored for lp in s.logprobs])
        worker.execute(StepPlan(2, free=tuple(n.slot for n in new)))
    assert scores[0] == scores[1]
    assert len(scores[0]) == len(continuation)
    [straight] = run_greedy(worker, [prompt], NUM_TOKENS)
    known = [t.token_id for t in straight[:-1]]
    new = [new_sequence(0, prompt), new_sequence(1, prompt, known, shares_prefill_with=0)]
    first = worker.execute(prefill_plan(worker, new))
    assert [t.slot for t in first.sampled] == [0]
    second = worker.execute(StepPlan(1, decode=(DecodeItem(1, len(prompt), len(known)),)))
    assert [t.token_id for t in second.sampled] == [straight[-1].token_id]


def test_a_refused_leader_is_computed_for_its_followers(tiny: Path) -> None:
    """The pool holds the follower's budget, not the leader's whole prompt."""
    prompt, _ = prompts()
    pages = 9 * 8  # nine rows of 32 tokens; the leader would need nine of 60
    gib = (pages + 0.5) * PAGE_BYTES / 1024**3
    worker = make_worker(tiny, kv_memory_gib=gib, warmup=False)
    assert worker.info.num_pages == pages
    small = RETENTIONS[1]
    [[expected]] = run_greedy(worker, [prompt], 1, retention=small)
    new = [
        new_sequence(0, prompt),
        new_sequence(1, prompt, retention=small, shares_prefill_with=0),
    ]
    result = worker.execute(prefill_plan(worker, new))
    worker.check_integrity()
    assert result.refused == (0,)
    assert [k.slot for k in result.kept] == [1]
    assert [(t.slot, t.token_id) for t in result.sampled] == [(1, expected.token_id)]
    last = worker.execute(StepPlan(1, free=(0, 1)))
    worker.check_integrity()
    assert last.pages_free == pages


def test_choices_equal_separate_requests(tmp_path: Path, demo_model: Path) -> None:
    """`n` choices, also in a pool that preempts some: seeds decide, not who computed the prompt."""
    save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model)
    rng = np.random.default_rng(2)
    many = [rng.integers(20, 40_000, length).tolist() for length in (30, 44, 25)]
    retention = {"method": "snapkv", "window": 8, "budget": 24}
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "page_tokens": 4,
        "check_integrity": True,
    }

    def choices(llm: LLM, prompts: list[list[int]], n: int) -> list[list[tuple[int, ...]]]:
        sampling = SamplingParams(temperature=0.9, seed=7, n=n, max_tokens=20, ignore_eos=True)
        outputs = llm.generate(
            prompt_token_ids=prompts, sampling_params=sampling, retention=retention
        )
        return [[choice.token_ids for choice in output.outputs] for output in outputs]

    with LLM(str(tmp_path), **settings) as llm:
        separate = [choices(llm, [prompt], 4)[0] for prompt in many]
        # The first choice of four is that of one alone; later ones are of other noise.
        assert [choices(llm, [prompt], 1)[0] for prompt in many] == [c[:1] for c in separate]
        assert all(len(set(tokens)) == 4 for tokens in separate)
        together = choices(llm, many, 4)
    assert together == separate
    tight = 4 * LAYERS * HEADS * 12 * PAGE_BYTES / 1024**3
    with LLM(str(tmp_path), kv_memory_gib=tight, **settings) as llm:
        preempted = choices(llm, many, 4)
        report = llm.report()
    assert report.num_preemptions > 0
    assert report.pages_leaked == 0
    assert preempted == separate
