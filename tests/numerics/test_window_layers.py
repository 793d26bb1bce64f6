"""Layers with a sliding window, against transformers, with prompts several windows long.

The models are small ones of families that have such layers: Mistral, where every layer has one, and
Qwen2, where some have. Tolerances are those of `test_worker_parity.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import following_logits
from support.plans import new_sequence, prefill_plan, run_greedy
from support.tiny import VOCAB, save_tiny

from saqqara.configs.schema import EngineConfig
from saqqara.workers import part
from saqqara.workers.models.spec import ModelSpec, load_spec
from saqqara.workers.plan import DecodeItem, SampledToken, SamplingSpec, StepPlan
from saqqara.workers.worker import Worker

ALL_LOGPROBS = SamplingSpec(temperature=0.0, num_logprobs=VOCAB)
TOLERANCE = 1e-4
LENGTHS = [1, 7, 33, 64]
NUM_TOKENS = 8
PAGE_TOKENS = 4
WINDOWS = {"mistral": (6, 6, 6), "qwen2": (0, 9, 9)}


@pytest.fixture(scope="module", params=WINDOWS)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[Any, Path]]:
    """A transformers model with windows, and its folder as our workers read it."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    model, windows = save_tiny(name, folder), WINDOWS[name]
    config = model.config
    config.sliding_window = max(windows)
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    if name == "qwen2":
        config.use_sliding_window, config.layer_types = True, kinds
        for layer, kind in zip(model.model.layers, kinds, strict=True):
            layer.attention_type = kind
            layer.self_attn.sliding_window = max(windows) if "sliding" in kind else None
        model.model.has_sliding_layers = True

    def with_windows(folder: str) -> ModelSpec:
        return replace(load_spec(folder), windows=windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "load_spec", with_windows)
        yield model, folder


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, length).tolist() for length in LENGTHS]


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": PAGE_TOKENS}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}).for_worker())


def assert_same_logits(model: Any, fed: list[int], tokens: list[SampledToken]) -> None:
    """`fed` ends with the token before the last one that was sampled."""
    expected = following_logits(model, fed, len(tokens)).log_softmax(-1)
    got = torch.empty(len(tokens), VOCAB)
    for row, token in zip(got, tokens, strict=True):
        assert token.logprobs is not None
        row[list(token.logprobs.top_ids)] = torch.tensor(token.logprobs.top_logprobs)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention_backend", ["torch", "reference"])
def test_logits_match_transformers(windowed: tuple[Any, Path], attention_backend: str) -> None:
    model, folder = windowed
    worker = make_worker(folder, attention_backend=attention_backend, linear_chunk_tokens=16)
    outputs = run_greedy(worker, prompts(), NUM_TOKENS, sampling=ALL_LOGPROBS)
    for prompt, tokens in zip(prompts(), outputs, strict=True):
        assert len(tokens) == NUM_TOKENS
        assert_same_logits(model, prompt + [t.token_id for t in tokens[:-1]], tokens)


def test_extending_past_the_window_and_beside_others(windowed: tuple[Any, Path]) -> None:
    """Chunks shorter and longer than the window; rows never hold more than it."""
    model, folder = windowed
    worker = make_worker(folder)
    prompt, other = prompts()[2], prompts()[1]
    known = prompts()[3][:40]
    new = [
        new_sequence(0, prompt, known, sampling=ALL_LOGPROBS),
        new_sequence(1, other, sampling=ALL_LOGPROBS),
    ]
    results = [worker.execute(prefill_plan(worker, new))]
    at, windows = len(prompt), np.array(worker.spec.windows)[:, None]
    for step, count in enumerate([3, 5, 20, 1, 11]):
        is_last = at + count == len(prompt) + len(known)
        items = (DecodeItem(0, at, count, sample=is_last), DecodeItem(1, len(other) + step))
        results.append(worker.execute(StepPlan(step + 1, decode=items)))
        worker.check_integrity()
        at += count
        for slot, seen in ((0, at), (1, len(other) + step + 1)):
            held = np.where(windows, np.minimum(windows, seen), seen)
            assert (worker.kv.kept(slot) == held).all()
            pages = -(-held // PAGE_TOKENS) * worker.spec.num_kv_heads
            assert worker.kv.pages_of(slot) == pages.sum()
    sampled = [s for result in results for s in result.sampled]
    assert_same_logits(model, prompt + known, [s for s in sampled if s.slot == 0])
    others = [s for s in sampled if s.slot == 1]
    assert_same_logits(model, other + [s.token_id for s in others[:-1]], others)


def test_scores_past_the_window(windowed: tuple[Any, Path]) -> None:
    """Of a continuation, in chunks, and of the prompt itself."""
    model, folder = windowed
    worker = make_worker(folder)
    context, continuation = prompts()[2], prompts()[3][:30]
    first = worker.execute(
        prefill_plan(worker, [new_sequence(3, context, continuation, score=True)])
    )
    items = [DecodeItem(3, len(context), 17, sample=False)]
    items.append(DecodeItem(3, len(context) + 17, len(continuation) - 18, sample=False))
    results = [first, *(worker.execute(StepPlan(n + 1, decode=(i,))) for n, i in enumerate(items))]
    got = [lp for r in results for s in r.scored for lp in s.logprobs]
    table = following_logits(model, context + continuation[:-1], len(continuation)).log_softmax(-1)
    expected = table.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got), expected, atol=TOLERANCE, rtol=0)
