"""Rows are compacted while decoding without anybody noticing: resumed, shared, scored, preempted.

That they are compacted as each method's definition says is in `test_method_suite.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan, run_greedy
from support.tiny import VOCAB, save_tiny

from saqqara import LLM, SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, StepPlan
from saqqara.workers.worker import Worker

LAYERS, HEADS, PAGE = 3, 3, 4
WINDOW, SINKS, BUDGET, SLACK_PAGES = 8, 2, 20, 2
SLACK = SLACK_PAGES * PAGE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama in which long texts have their place."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": PAGE}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}))


def retention_of(method: str, **settings: Any) -> Retention:
    window = 1 if method == "tova" else WINDOW
    return Retention.parse(
        {"method": method, "budget": BUDGET, "window": window, "sinks": SINKS}
        | {"decode": {"slack_pages": SLACK_PAGES}}
        | settings
    )


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """No token comes twice: in the lowest layer its keys would differ by a rotation only."""
    rng = np.random.default_rng(seed)
    return [(3 + rng.permutation(VOCAB - 3)[:length]).tolist() for length in lengths]


def stored(worker: Worker, slot: int) -> torch.Tensor:
    """All keys and values of a slot, row after row."""
    rows = [worker.kv.read(slot, layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def run_alone(
    worker: Worker, prompt: list[int], retention: Retention, num_steps: int, slot: int = 0
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of `num_steps` decode steps, and what the slot stores then; frees it."""
    result = worker.execute(prefill_plan(worker, [new_sequence(slot, prompt, retention=retention)]))
    tokens = [result.sampled[0].token_id]
    for step in range(num_steps):
        item = DecodeItem(slot, len(prompt) + step)
        tokens.append(worker.execute(StepPlan(step, decode=(item,))).sampled[0].token_id)
    rows = stored(worker, slot)
    worker.execute(StepPlan(num_steps, free=(slot,)))
    return tokens, rows


@pytest.mark.parametrize("method", ["snapkv", "knorm"])
def test_rows_stay_bounded_and_pages_return_at_once(method: str, model: Path) -> None:
    worker = make_worker(model)
    [prompt] = prompts([60])
    retention = retention_of(method)
    new = new_sequence(0, prompt, retention=retention)
    worker.execute(prefill_plan(worker, [new]))
    after_prefill = worker.kv.kept(0)
    for step in range(600):
        item = DecodeItem(0, len(prompt) + step)
        result = worker.execute(StepPlan(step, decode=(item,)))
        kept = worker.kv.kept(0)
        assert (kept == after_prefill + (step + 1) % SLACK).all()
        held = int((-(-kept // PAGE)).sum())
        assert result.pages_free == worker.info.num_pages - held
        if step % 50 == 0:
            worker.check_integrity()
    worker.check_integrity()


def test_a_resumed_sequence_goes_on_as_if_never_interrupted(model: Path) -> None:
    """Its known tokens are fed one by one, beside a neighbour that decodes on."""
    worker = make_worker(model)
    prompt, neighbour = prompts([45, 33], seed=4)
    retention = retention_of("snapkv")
    tokens, rows = run_alone(worker, prompt, retention, 3 * SLACK)
    known = tokens[: 2 * SLACK + 3]
    new = [
        new_sequence(3, prompt, known, retention=retention),
        new_sequence(1, neighbour, retention=retention),
    ]
    worker.execute(prefill_plan(worker, new))
    resumed = []
    for step in range(3 * SLACK):
        sample = step >= len(known) - 1
        items = (DecodeItem(1, 33 + step), DecodeItem(3, 45 + step, sample=sample))
        result = worker.execute(StepPlan(step, decode=items))
        resumed += [s.token_id for s in result.sampled if s.slot == 3]
    assert known + resumed == tokens
    torch.testing.assert_close(stored(worker, 3), rows, atol=1e-3, rtol=0)


def test_pieces_that_end_at_compactions_equal_single_tokens(model: Path) -> None:
    """What scoring does. A piece that spans a compaction is a bug of the scheduler."""
    worker = make_worker(model)
    prompt, text = prompts([45, 3 * SLACK + 1], seed=5)
    retention = retention_of("snapkv")
    scores: list[list[float]] = []
    rows = []
    for pieces in ([1] * 3 * SLACK, [SLACK, 3, SLACK - 3, 1, SLACK - 1]):
        new = new_sequence(0, prompt, text, retention=retention, score=True)
        scores.append(
            [x for s in worker.execute(prefill_plan(worker, [new])).scored for x in s.logprobs]
        )
        position = len(prompt)
        for num in pieces:
            item = DecodeItem(0, position, num, sample=False)
            result = worker.execute(StepPlan(0, decode=(item,)))
            worker.check_integrity()
            scores[-1] += [x for s in result.scored for x in s.logprobs]
            position += num
        rows.append(stored(worker, 0))
        worker.execute(StepPlan(0, free=(0,)))
    torch.testing.assert_close(*map(torch.tensor, scores), atol=1e-3, rtol=0)
    torch.testing.assert_close(*rows, atol=1e-3, rtol=0)
    new = new_sequence(0, prompt, text, retention=retention, score=True)
    worker.execute(prefill_plan(worker, [new]))
    with pytest.raises(AssertionError, match="spans a compaction"):
        worker.execute(StepPlan(0, decode=(DecodeItem(0, len(prompt), SLACK + 1, sample=False),)))


def test_pages_that_are_shared_are_left_alone(model: Path) -> None:
    """A fork keeps its rows while the other's are compacted, which needs room or is refused."""
    worker = make_worker(model)
    [prompt] = prompts([45])
    worker.execute(prefill_plan(worker, [new_sequence(0, prompt, retention=retention_of("knorm"))]))
    worker.kv.fork(0, 5)
    before = stored(worker, 5)
    for step in range(SLACK):
        worker.execute(StepPlan(step, decode=(DecodeItem(0, len(prompt) + step),)))
        worker.check_integrity()
    assert worker.kv.kept(0).sum() == LAYERS * HEADS * BUDGET
    assert torch.equal(stored(worker, 5), before)
    worker.kv.fork(0, 6)
    for step in range(SLACK, 2 * SLACK - 1):
        worker.execute(StepPlan(step, decode=(DecodeItem(0, len(prompt) + step),)))
    worker.kv.pool.allocate(worker.kv.pages_free)  # somebody else takes all the others
    result = worker.execute(
        StepPlan(2 * SLACK, decode=(DecodeItem(0, len(prompt) + 2 * SLACK - 1),))
    )
    assert result.refused == (0,)
    assert worker.kv.pages_of(0) == 0
    assert not result.sampled


def test_a_full_sequence_costs_no_ring(model: Path) -> None:
    worker = make_worker(model)
    for retention in (Retention.parse("full"), retention_of("knorm")):
        run_greedy(worker, prompts([20]), 3, retention=retention)
    worker.execute(
        prefill_plan(worker, [new_sequence(0, prompts([9])[0], retention=retention_of("snapkv"))])
    )
    ring = LAYERS * WINDOW * 6 * 16 * 4  # layers, queries, heads, head_dim, fp32
    assert worker.execute(StepPlan(9)).memory.ring_bytes == ring


def test_long_outputs_through_a_small_pool_are_unchanged(tmp_path: Path, demo_model: Path) -> None:
    """Preempted and resumed with a decode stage; ownership is proved after every step."""
    save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model)
    rng = np.random.default_rng(0)
    texts = [rng.integers(20, 40_000, rng.integers(5, 60)).tolist() for _ in range(10)]
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=45, ignore_eos=True)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 256,
        "page_tokens": PAGE,
        "retention": retention_of("pyramidkv").to_dict(),
        "check_integrity": True,
    }
    page_gib = 2 * 16 * 4 * PAGE / 1024**3
    rows = LAYERS * HEADS
    # A row has 5 pages on average when it is compacted, and 7 before: four sequences at a time.
    with LLM(str(tmp_path), kv_memory_gib=4 * rows * 7 * page_gib, **settings) as llm:
        got = llm.generate(prompt_token_ids=texts, sampling_params=sampling)
        report = llm.report()
    assert report.num_preemptions > 0
    assert report.pages_leaked == 0
    with LLM(str(tmp_path), max_num_seqs=1, **settings) as llm:
        for number in range(1, 10, 3):
            [alone] = llm.generate(prompt_token_ids=[texts[number]], sampling_params=sampling)
            assert alone.outputs[0].token_ids == got[number].outputs[0].token_ids
        [scored] = llm.score([texts[0]], [texts[1]])
        assert len(scored.logprobs) == len(texts[1])
