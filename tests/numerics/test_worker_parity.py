"""A worker computes what transformers computes, for every family, batched and alone, in fp32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import following_logits
from support.plans import new_sequence, prefill_plan, run_greedy
from support.tiny import CONFIGS, VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import (
    DecodeItem,
    PrefillGroup,
    SampledToken,
    SamplingSpec,
    StepPlan,
)
from saqqara.workers.worker import Worker

ALL_LOGPROBS = SamplingSpec(temperature=0.0, num_logprobs=VOCAB)
LENGTHS = [1, 7, 33, 64]
NUM_TOKENS = 6
# fp32 with another order of summation: logits of size ~10 agree to about 1e-5.
TOLERANCE = 1e-4


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, length).tolist() for length in LENGTHS]


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": 4}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}).for_worker())


def all_logprobs(token: SampledToken) -> torch.Tensor:
    assert token.logprobs is not None
    row = torch.empty(VOCAB)
    row[list(token.logprobs.top_ids)] = torch.tensor(token.logprobs.top_logprobs)
    return row


def assert_same_logits(model: Any, prompt: list[int], tokens: list[SampledToken]) -> None:
    fed = prompt + [t.token_id for t in tokens[:-1]]
    expected = following_logits(model, fed, len(tokens)).log_softmax(-1)
    got = torch.stack([all_logprobs(t) for t in tokens])
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert [t.token_id for t in tokens] == expected.argmax(-1).tolist()
    assert [t.position for t in tokens] == list(range(len(prompt), len(prompt) + len(tokens)))


@pytest.mark.parametrize("attention_backend", ["torch", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers(name: str, attention_backend: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path)
    # Within the original length of longrope, beyond which transformers takes other frequencies.
    lengths = {"max_model_len": 128} if "longrope" in name else {}
    worker = make_worker(
        tmp_path, attention_backend=attention_backend, linear_chunk_tokens=16, **lengths
    )
    outputs = run_greedy(worker, prompts(), NUM_TOKENS, sampling=ALL_LOGPROBS)
    for prompt, tokens in zip(prompts(), outputs, strict=True):
        assert len(tokens) == NUM_TOKENS
        assert_same_logits(model, prompt, tokens)


def test_batched_equals_alone(tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    together = run_greedy(worker, prompts(), NUM_TOKENS, sampling=ALL_LOGPROBS)
    for prompt, expected in zip(prompts(), together, strict=True):
        [alone] = run_greedy(worker, [prompt], NUM_TOKENS, sampling=ALL_LOGPROBS)
        assert [t.token_id for t in alone] == [t.token_id for t in expected]
        for a, b in zip(alone, expected, strict=True):
            torch.testing.assert_close(all_logprobs(a), all_logprobs(b), atol=TOLERANCE, rtol=0)


def test_layer_ranges_equal_one_range(tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    expected = run_greedy(worker, prompts(), 1)
    new = tuple(new_sequence(slot, p) for slot, p in enumerate(prompts()))
    slots = tuple(n.slot for n in new)
    worker.execute(StepPlan(1, new=new, prefill=(PrefillGroup(slots, 0, 1),)))
    worker.execute(StepPlan(2, prefill=(PrefillGroup(slots, 1, 2),)))
    result = worker.execute(StepPlan(3, prefill=(PrefillGroup(slots, 2, 3),)))
    assert [s.token_id for s in result.sampled] == [e[0].token_id for e in expected]
    assert {k.slot for k in result.kept} == set(slots)


def test_extend_replays_known_tokens(tmp_path: Path) -> None:
    """A resumed sequence, in chunks and beside a decoding one, goes on as if never interrupted."""
    model = save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    prompt, other = prompts()[2], prompts()[1]
    [straight] = run_greedy(worker, [prompt], NUM_TOKENS, sampling=ALL_LOGPROBS)
    known = [t.token_id for t in straight[:-1]]
    new = [
        new_sequence(0, prompt, known, sampling=ALL_LOGPROBS),
        new_sequence(1, other, sampling=ALL_LOGPROBS),
    ]
    first = worker.execute(prefill_plan(worker, new))
    assert [s.slot for s in first.sampled] == [1]
    at = len(prompt)
    items = (DecodeItem(0, at, 3, sample=False), DecodeItem(1, len(other)))
    second = worker.execute(StepPlan(1, decode=items))
    items = (DecodeItem(1, len(other) + 1), DecodeItem(0, at + 3, len(known) - 3))
    third = worker.execute(StepPlan(2, decode=items))
    resumed = next(s for s in third.sampled if s.slot == 0)
    assert_same_logits(model, prompt + known, [resumed])
    others = [s for r in (first, second, third) for s in r.sampled if s.slot == 1]
    assert_same_logits(model, other, others)


def test_score_gives_log_probabilities_of_known_tokens(tmp_path: Path) -> None:
    model = save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    context, continuation = prompts()[1], prompts()[2][:9]
    new = new_sequence(3, context, continuation, score=True)
    first = worker.execute(prefill_plan(worker, [new]))
    assert not first.sampled
    item = DecodeItem(3, len(context), len(continuation) - 1, sample=False)
    second = worker.execute(StepPlan(1, decode=(item,)))
    got = [lp for r in (first, second) for s in r.scored for lp in s.logprobs]
    ranks = [rank for r in (first, second) for s in r.scored for rank in s.ranks]
    logits = following_logits(model, context + continuation[:-1], len(continuation))
    table = logits.log_softmax(-1)
    expected = table.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got), expected, atol=TOLERANCE, rtol=0)
    assert ranks == (1 + (table > expected[:, None]).sum(-1)).tolist()


def test_score_lists_the_most_likely_tokens_in_each_place(tmp_path: Path) -> None:
    model = save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    context, continuation = prompts()[1], prompts()[2][:9]
    sampling = SamplingSpec(num_logprobs=5)
    new = new_sequence(3, context, continuation, sampling=sampling, score=True)
    first = worker.execute(prefill_plan(worker, [new]))
    item = DecodeItem(3, len(context), len(continuation) - 1, sample=False)
    second = worker.execute(StepPlan(1, decode=(item,)))
    scored = [s for r in (first, second) for s in r.scored]
    logits = following_logits(model, context + continuation[:-1], len(continuation))
    expected = logits.log_softmax(-1).topk(5, dim=-1)
    got = torch.tensor([row for s in scored for row in s.top_logprobs])
    torch.testing.assert_close(got, expected.values, atol=TOLERANCE, rtol=0)
    assert [list(row) for s in scored for row in s.top_ids] == expected.indices.tolist()


def test_worker_short_of_pages_refuses_and_holds_nothing(tmp_path: Path) -> None:
    """A refused slot costs only itself: its neighbours decode on, and all pages come back."""
    save_tiny("llama-gqa", tmp_path)
    long, short, refused = prompts()[2], [5, 6], prompts()[1]  # 9, 1 and 2 pages in each of 9 rows
    page_bytes = 4 * 2 * 16 * 4
    # Enough for all in two of the three layers, in the third only for the first two.
    pages = 2 * 3 * (9 + 1 + 2) + 3 * (9 + 1) + 2
    worker = make_worker(tmp_path, kv_memory_gib=(pages + 0.5) * page_bytes / 1024**3, warmup=False)
    assert worker.info.num_pages == pages
    [expected] = run_greedy(worker, [short], 3)
    new = [new_sequence(0, long), new_sequence(1, short), new_sequence(2, refused)]
    first = worker.execute(prefill_plan(worker, new))
    assert first.refused == (2,)
    assert {s.slot for s in first.sampled} == {0, 1}
    assert {k.slot for k in first.kept} == {0, 1}
    worker.check_integrity()
    items = tuple(DecodeItem(n.slot, n.prompt_tokens) for n in new)
    second = worker.execute(StepPlan(1, decode=items))
    assert second.refused == ()
    worker.execute(StepPlan(2, free=(2, 0)))
    third = worker.execute(StepPlan(3, decode=(DecodeItem(1, len(short) + 1),)))
    got = [s.token_id for r in (first, second, third) for s in r.sampled if s.slot == 1]
    assert got == [t.token_id for t in expected]
    last = worker.execute(StepPlan(4, free=(1,)))
    worker.check_integrity()
    assert last.pages_free == worker.info.num_pages


@pytest.mark.parametrize(
    "method",
    [
        "streaming",
        "snapkv",
        "pyramidkv",
        "knorm",
        "random",
        "h2o",
        "tova",
        "adakv",
        "snapkv-cosine",
    ],
)
def test_budget_at_least_prompt_is_full(method: str, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    full = run_greedy(worker, prompts(), NUM_TOKENS)
    retention = Retention.parse(method, 64)
    kept = run_greedy(worker, prompts(), NUM_TOKENS, retention=retention)
    assert kept == full


@pytest.mark.parametrize("method", ["streaming", "snapkv", "pyramidkv", "knorm", "random"])
def test_kept_tokens_sum_to_the_budget(method: str, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    retention = Retention.parse({"method": method, "budget": 20, "window": 8})
    new = [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]
    result = worker.execute(prefill_plan(worker, new))
    worker.check_integrity()
    assert len(result.kept) == len(new)
    for kept, prompt in zip(result.kept, prompts(), strict=True):
        counts = np.frombuffer(kept.counts, dtype=np.int32).reshape(3, 3)
        assert (counts.sum(axis=0) == 3 * min(20, len(prompt))).all()
