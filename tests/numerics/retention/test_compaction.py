"""Sequences that drop tokens while they decode go through the engine like others.

Batched, interrupted, fed in pieces, with shared pages or through a small pool, they keep what they
keep alone, and give their pages back at once. Which tokens that are is compared with the
definitions in `test_method_suite.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan, run_greedy
from support.pyramidinfer_counts import RELEASE, stored_by_a_worker
from support.tiny import VOCAB, save_tiny

from saqqara import LLM, SamplingParams
from saqqara.cluster.scheduling.ledger import Ledger
from saqqara.compression.decode import DecodeStage, TrimStage
from saqqara.compression.retention import Retention
from saqqara.compression.scores import H2O, SnapKV, Tova
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, NewSequence, StepPlan
from saqqara.workers.worker import Worker

LAYERS, HEADS, PAGE = 3, 3, 4
WINDOW, SINKS, BUDGET, SLACK_PAGES = 8, 2, 20, 2
SLACK = SLACK_PAGES * PAGE
METHODS = ["snapkv", "tova", "h2o", "headkv"]
RAGGED = ["ada-pyramidkv", "h2o-adaptive"]
TRIGGERS = ["stored", "published"]
EXCEED = 6
PROFILE = {
    f"{layer}-{head}": [float(1 + (layer + head) % 4)] for layer in range(3) for head in range(6)
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Llama in which long texts have their place, and its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny("llama-gqa", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return model, folder


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": PAGE}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}).for_worker())


def retention_of(method: str, **settings: Any) -> Retention:
    if method in TRIGGERS:
        stage = {"trigger": method, "exceed": EXCEED}
        return Retention.parse(
            {"method": "pyramidinfer", "sinks": SINKS, "decode": stage} | settings
        )
    own: dict[str, Any] = {"window": WINDOW}
    if method in ("tova", "h2o", "h2o-adaptive"):
        own = {}
    if method == "headkv":
        own |= {"profile": PROFILE, "head_beta": 2.0}
    return Retention.parse(
        {"method": method, "budget": BUDGET, "sinks": SINKS}
        | {"decode": {"slack_pages": SLACK_PAGES}}
        | own
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


@pytest.mark.parametrize("method", [*METHODS, *RAGGED, *TRIGGERS])
def test_batched_equals_alone(method: str, model: tuple[Any, Path]) -> None:
    """Sequences that fire together and apart, of the same and of another retention, fed alike."""
    worker = make_worker(model[1])
    retention, other = retention_of(method), retention_of("snapkv", decode={"slack_pages": 1})
    settings = [retention, retention, retention, other, Retention.parse("full")]
    num_steps = BUDGET + 2 * SLACK
    lengths = [45, 30, 5, 33, 20]
    texts = [text[: n + num_steps] for text, n in zip(prompts([100] * 5), lengths, strict=True)]
    batch = [
        new_sequence(slot, text[:n], text[n:], retention=r)
        for slot, (text, n, r) in enumerate(zip(texts, lengths, settings, strict=True))
    ]

    def run(new: list[NewSequence]) -> tuple[list[int], list[torch.Tensor]]:
        worker.execute(prefill_plan(worker, new))
        for step in range(num_steps):
            items = tuple(
                DecodeItem(n.slot, n.prompt_tokens + step, sample=step == num_steps - 1)
                for n in reversed(new)
            )
            result = worker.execute(StepPlan(step, decode=items))
            worker.check_integrity()
        assert (result.memory.ring_bytes > 0) == any(
            isinstance(n.retention.score, SnapKV | Tova)
            or isinstance(n.retention.decode, TrimStage)
            for n in new
        )
        assert (result.memory.mass_bytes > 0) == any(
            isinstance(n.retention.score, H2O) for n in new
        )
        rows = [stored(worker, n.slot) for n in new]
        worker.execute(StepPlan(num_steps, free=tuple(n.slot for n in new)))
        return [s.token_id for s in reversed(result.sampled)], rows

    tokens, rows = run(batch)
    assert worker.kv.pages_free == worker.kv.num_pages
    memory = worker.execute(StepPlan(99)).memory
    assert memory.ring_bytes == memory.mass_bytes == 0
    for slot, new in enumerate(batch):
        [token], [alone] = run([new])
        assert token == tokens[slot]
        # fp32 summed in another order; another kept token would differ by about 1.
        torch.testing.assert_close(rows[slot], alone, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "headkv", "ada-pyramidkv", "h2o-adaptive"])
def test_rows_stay_bounded_and_pages_return_at_once(method: str, model: tuple[Any, Path]) -> None:
    worker = make_worker(model[1])
    [prompt] = prompts([60])
    retention = retention_of(method)
    new = new_sequence(0, prompt, retention=retention)
    worker.execute(prefill_plan(worker, [new]))
    after_prefill = worker.kv.kept(0)
    assert (np.ptp(after_prefill, axis=1) > 0).any() == (method in ("headkv", *RAGGED))
    for step in range(100):
        item = DecodeItem(0, len(prompt) + step)
        result = worker.execute(StepPlan(step, decode=(item,)))
        kept = worker.kv.kept(0)
        assert (kept == after_prefill + (step + 1) % SLACK).all()
        held = int((-(-kept // PAGE)).sum())
        assert result.pages_free == worker.info.num_pages - held
        worker.check_integrity()


def test_a_resumed_sequence_goes_on_as_if_never_interrupted(model: tuple[Any, Path]) -> None:
    """Its known tokens are fed one by one, beside a neighbour that decodes on."""
    worker = make_worker(model[1])
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


def test_pieces_that_end_at_compactions_equal_single_tokens(model: tuple[Any, Path]) -> None:
    """What scoring does. A piece that spans a compaction is a bug of the scheduler."""
    worker = make_worker(model[1])
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


def test_pages_that_are_shared_are_left_alone(model: tuple[Any, Path]) -> None:
    """A fork keeps its rows while the other's are compacted, which needs room or is refused."""
    worker = make_worker(model[1])
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


def test_a_row_that_propagation_left_short_keeps_its_ends(model: tuple[Any, Path]) -> None:
    """Fewer tokens enter the upper layers than window and sinks are; their rows stay as short."""
    worker = make_worker(model[1])
    [prompt] = prompts([45])
    once = {"kind": "once", "layer": 0, "keep": 0.1, "window": 4, "sinks": SINKS}
    retention = retention_of("snapkv", window=12, propagate=once, decode={"slack_pages": 1})
    worker.execute(prefill_plan(worker, [new_sequence(0, prompt, retention=retention)]))
    assert worker.kv.kept(0)[:, 0].tolist() == [BUDGET, 6, 6]
    before = {}
    for step in range(PAGE):
        before = {
            (i, h): worker.kv.read(0, i, h)[0] for i in range(1, LAYERS) for h in range(HEADS)
        }
        worker.execute(StepPlan(step, decode=(DecodeItem(0, len(prompt) + step),)))
        worker.check_integrity()
    assert worker.kv.kept(0)[:, 0].tolist() == [BUDGET, 6, 6]
    for (layer, head), keys in before.items():
        now, _ = worker.kv.read(0, layer, head)
        assert torch.equal(now[:SINKS], keys[:SINKS])
        assert torch.equal(now[SINKS:-1], keys[-3:])


def test_a_full_sequence_costs_no_ring(model: tuple[Any, Path]) -> None:
    worker = make_worker(model[1])
    for retention in (Retention.parse("full"), retention_of("knorm")):
        run_greedy(worker, prompts([20]), 3, retention=retention)
    worker.execute(
        prefill_plan(worker, [new_sequence(0, prompts([9])[0], retention=retention_of("snapkv"))])
    )
    ring = LAYERS * WINDOW * 6 * 16 * 4  # layers, queries, heads, head_dim, fp32
    assert worker.execute(StepPlan(9)).memory.ring_bytes == ring


def test_the_ledger_counts_the_bytes_of_a_ring(model: tuple[Any, Path]) -> None:
    """The published trigger's ring has room for all recent tokens there will be, and normalisers.

    Layer 0 stores up to 119 tokens of such a text; a fifth of them and the last one are recent.
    """
    worker = make_worker(model[1])
    [prompt] = prompts([80])
    for name, query_bytes in (("published", 24 * (16 + 1)), ("stored", 16), ("snapkv", 8 * 16)):
        retention, ledger = retention_of(name), Ledger([worker.info], 1)
        result = worker.execute(
            prefill_plan(worker, [new_sequence(0, prompt, retention=retention)])
        )
        ledger.admit(0, ledger.demand(retention, 80), 80)
        counted = ledger.usage().ring_bytes
        assert counted == result.memory.ring_bytes
        assert counted == LAYERS * 6 * query_bytes * 4  # layers, query heads, numbers, fp32
        assert worker.execute(StepPlan(1, free=(0,))).memory.ring_bytes == 0
        ledger.release(0)
        assert ledger.usage().ring_bytes == 0


def test_workers_store_what_the_release_of_pyramidinfer_stores(tmp_path: Path) -> None:
    """More runs are in `tests/slow`, and as counts without a worker in `tests/unit`."""
    run = RELEASE[0]
    stored = stored_by_a_worker(tmp_path, run["prompt_tokens"], run["fed_tokens"])
    assert stored == [[length] * HEADS for length in run["stored"]]


@pytest.mark.parametrize(
    "retention",
    [
        retention_of("pyramidkv"),
        retention_of("h2o"),
        retention_of("ada-pyramidkv"),
        retention_of("published", min_context=4, rho=0.5),
        retention_of("stored", min_context=4, rho=0.5),
    ],
    ids=lambda retention: retention.label.split(",")[0] + retention.decode.label,
)
def test_long_outputs_through_a_small_pool_are_unchanged(
    retention: Retention, tmp_path: Path, demo_model: Path
) -> None:
    """Preempted and resumed with a decode stage; ownership is proved after every step.

    So is the ledger: the engine compares its count of pages with the worker's after every step.
    """
    save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model)
    rng = np.random.default_rng(0)
    texts = [rng.integers(20, 40_000, rng.integers(5, 60)).tolist() for _ in range(10)]
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=45, ignore_eos=True)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 256,
        "page_tokens": PAGE,
        "retention": retention.to_dict(),
        "check_integrity": True,
    }
    page_gib = 2 * 16 * 4 * PAGE / 1024**3
    # Where rows have targets they have 5 pages on average when compacted, and 7 before.
    row_pages = 7 if isinstance(retention.decode, DecodeStage) else 15
    pool_gib = 4 * LAYERS * HEADS * row_pages * page_gib
    with LLM(str(tmp_path), kv_memory_gib=pool_gib, expected_output_tokens=1, **settings) as llm:
        got = llm.generate(prompt_token_ids=texts, sampling_params=sampling)
        report = llm.report()
    assert report.num_preemptions > 0
    assert report.pages_leaked == 0
    with LLM(str(tmp_path), max_num_seqs=1, **settings) as llm:
        for number in (1, 7):
            [alone] = llm.generate(prompt_token_ids=[texts[number]], sampling_params=sampling)
            assert alone.outputs[0].token_ids == got[number].outputs[0].token_ids


def test_scoring_token_by_token_takes_the_steps_of_generating(
    tmp_path: Path, demo_model: Path
) -> None:
    """What a method generates greedily is what it holds most likely when it is fed it again.

    Its rows were compacted several times on the way, so that would not be so without.
    """
    save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model)
    [text] = np.random.default_rng(0).integers(20, 40_000, (1, 50)).tolist()
    names = ["full", "snapkv", "tova", "h2o", "ada-pyramidkv", "headkv", *TRIGGERS]
    retentions = [Retention()] + [retention_of(name) for name in names[1:]]
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)
    with LLM(
        str(tmp_path),
        dtype="float32",
        device="cpu",
        max_model_len=256,
        page_tokens=PAGE,
        check_integrity=True,
    ) as llm:
        outputs = llm.generate(
            prompt_token_ids=[text] * len(names), sampling_params=sampling, retention=retentions
        )
        for token_by_token in (True, False):
            scores = llm.score(
                [text] * len(names),
                [list(output.outputs[0].token_ids) for output in outputs],
                retention=retentions,
                token_by_token=token_by_token,
            )
            for output, score in zip(outputs, scores, strict=True):
                assert score.error is None
                assert score.is_greedy
                completion = output.outputs[0]
                assert completion.cumulative_logprob is not None
                # Sums of 40 terms, in another order within the kernels.
                assert abs(completion.cumulative_logprob - score.sum) < 1e-2
