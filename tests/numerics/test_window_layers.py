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
from saqqara.workers.plan import DecodeItem, PrefillGroup, SampledToken, SamplingSpec, StepPlan
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


class Texts:
    """Scored texts on a worker: where each stands, and what it scored on the way."""

    def __init__(self, worker: Worker, model: Any, texts: list[list[int]]) -> None:
        self.worker, self.texts = worker, texts
        self.at = dict.fromkeys(range(len(texts)), 0)  # tokens that are fed; 0: not admitted
        self.step = 0
        self.expected = []
        for text in texts:
            table = following_logits(model, text[:-1], len(text) - 1).log_softmax(-1)
            self.expected.append(table.gather(1, torch.tensor(text[1:])[:, None])[:, 0])
        self.shared: dict[tuple[int, int, int], torch.Tensor] = {}

    def execute(self, **parts: Any) -> None:
        """One step; what it scored is right, and rows hold what they should."""
        self.step += 1
        starts = {item.slot: item.position for item in parts.get("decode", ())}
        starts |= {new.slot: new.prompt_tokens - 1 for new in parts.get("new", ())}
        result = self.worker.execute(StepPlan(self.step, **parts))
        assert result.refused == ()
        self.worker.check_integrity()
        for scored in result.scored:
            start = starts[scored.slot]
            wanted = self.expected[scored.slot][start : start + len(scored.logprobs)]
            got = torch.tensor(scored.logprobs)
            torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)

    def admit(self, slot: int, prompt_tokens: int) -> None:
        text = self.texts[slot]
        new = new_sequence(slot, text[:prompt_tokens], text[prompt_tokens:], score=True)
        self.execute(new=(new,), prefill=(PrefillGroup((slot,), 0, self.worker.spec.num_layers),))
        self.at[slot] = prompt_tokens

    def feed(self, counts: dict[int, int]) -> None:
        items = tuple(DecodeItem(s, self.at[s], n, sample=False) for s, n in counts.items())
        self.execute(decode=items)
        for slot, count in counts.items():
            self.at[slot] += count

    def fork(self, slot: int, target: int) -> None:
        """Share a slot's pages; the copy stays as it is whatever happens to the slot."""
        kv = self.worker.kv
        self.unfork(target)
        kv.fork(slot, target)
        rows = np.ndindex(kv.num_layers, kv.num_heads)
        self.shared = {(target, *row): torch.cat(kv.read(target, *row), dim=1) for row in rows}

    def unfork(self, target: int) -> None:
        for row, stored in self.shared.items():
            assert torch.equal(torch.cat(self.worker.kv.read(*row), dim=1), stored)
        self.shared = {}
        self.worker.kv.free(target)

    def check_lengths(self) -> None:
        """Rows with a window never take more pages than it, the others one token for each fed."""
        windows = np.array(self.worker.spec.layers.windows)[:, None]
        for slot, at in self.at.items():
            held = np.where(windows, np.minimum(windows, at), at)
            assert (self.worker.kv.kept(slot) == held).all()
            pages = -(-held // PAGE_TOKENS) * self.worker.spec.num_kv_heads
            assert self.worker.kv.pages_of(slot) == pages.sum()


def test_random_steps(windowed: tuple[Any, Path]) -> None:
    """Single tokens, chunks, preemptions and shared pages, in any order."""
    model, folder = windowed
    rng = np.random.default_rng(2)
    texts = [rng.integers(3, VOCAB, 70).tolist() for _ in range(3)]
    run = Texts(make_worker(folder), model, texts)
    spare = len(texts)
    for _ in range(60):
        waiting = [slot for slot, at in run.at.items() if at == 0]
        running = [slot for slot, at in run.at.items() if at]
        draw = rng.random()
        if waiting and (draw < 0.4 or not running):
            run.admit(int(rng.choice(waiting)), int(rng.integers(1, 40)))
        elif draw < 0.5:  # preempted; it will start anew
            slot = int(rng.choice(running))
            run.execute(free=(slot,))
            run.at[slot] = 0
        elif draw < 0.6:
            run.fork(int(rng.choice(running)), spare)
        else:
            left = {slot: len(texts[slot]) - 1 - run.at[slot] for slot in running}
            counts = {s: min(n, int(rng.choice([1, 1, 1, 2, 7, 15]))) for s, n in left.items()}
            run.feed({slot: count for slot, count in counts.items() if count})
        run.check_lengths()
    run.unfork(spare)
    run.execute(free=tuple(slot for slot, at in run.at.items() if at))
    assert run.worker.kv.pages_free == run.worker.kv.num_pages


def test_the_pool_holds_windows_not_texts(tmp_path: Path) -> None:
    """A long prompt takes the pages of its global layers; a local one takes a window's."""
    save_tiny("gemma2", tmp_path)
    worker = make_worker(tmp_path, kv_memory_gib=0.05)
    [window] = {*worker.spec.windows} - {0}
    num_local, num_global = 3, 2
    prompt = np.random.default_rng(0).integers(3, VOCAB, 480).tolist()
    worker.execute(prefill_plan(worker, [new_sequence(0, prompt)]))
    of_local, of_global = -(-window // PAGE_TOKENS), len(prompt) // PAGE_TOKENS
    for step in range(PAGE_TOKENS):
        worker.execute(StepPlan(step + 1, decode=(DecodeItem(0, len(prompt) + step),)))
        heads = worker.spec.num_kv_heads
        held = worker.kv.num_pages - worker.kv.pages_free
        assert held == heads * (num_local * of_local + num_global * (of_global + 1))
    # The peak is all fresh keys and values of a layer, and what was kept before it.
    peak = worker.execute(StepPlan(9, free=(0,))).memory.prefill_kv_bytes_peak
    row_bytes = 2 * worker.spec.head_dim * 4
    fresh = len(prompt) * heads * row_bytes
    pages = heads * (num_local * of_local + num_global * of_global) * PAGE_TOKENS * row_bytes
    assert peak == fresh + pages
