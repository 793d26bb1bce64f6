"""What feeds several tokens to layers with a sliding window, against transformers.

Prompts are several windows long. In Mistral every layer has one; in Gemma 2 every second has, and
its scores are capped. `test_worker_parity.py` has prefill and decode steps of the same models, and
the tolerance.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import following_logits
from support.plans import new_sequence, prefill_plan
from support.tiny import VOCAB, save_tiny

from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, SampledToken, SamplingSpec, StepPlan
from saqqara.workers.worker import Worker

ALL_LOGPROBS = SamplingSpec(temperature=0.0, num_logprobs=VOCAB)
TOLERANCE = 1e-4
LENGTHS = [1, 7, 33, 64]
PAGE_TOKENS = 4
FAMILIES = ("mistral", "gemma2")


@pytest.fixture(scope="module", params=FAMILIES)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, Path]:
    """A transformers model with windows, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_tiny(request.param, folder), folder


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
    at, windows = len(prompt), np.array(worker.spec.layers.windows)[:, None]
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
