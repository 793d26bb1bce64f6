"""A pool far too small for all: every request finishes, with the words it would have had alone."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.tiny import save_tiny

from saqqara import LLM, Retention, SamplingParams

NUM_REQUESTS = 200
BUDGET = 24
PAGE_TOKENS = 4
ROW_BYTES = 2 * 16 * 4  # key and value of one token in one row, head_dim 16, fp32
ROWS = 9  # 3 layers x 3 kv heads


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder, tokenizer_of=demo_model)
    return folder


def make_llm(model: Path, **settings: Any) -> LLM:
    given = {"retention": {"method": "pyramidkv", "window": 8, "budget": BUDGET}} | settings
    return LLM(
        str(model),
        dtype="float32",
        device="cpu",
        max_model_len=256,
        page_tokens=PAGE_TOKENS,
        check_integrity=True,
        **given,
    )


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(20, 40_000, rng.integers(5, 90)).tolist() for _ in range(NUM_REQUESTS)]
    sampling = [
        SamplingParams(
            temperature=0.0 if number % 2 else 0.8,
            top_p=0.9,
            seed=number,
            max_tokens=int(rng.integers(8, 40)),
            ignore_eos=True,
        )
        for number in range(NUM_REQUESTS)
    ]
    return prompts, sampling


def quarter_of_all_pages(prompts: list[list[int]], sampling: list[SamplingParams]) -> float:
    """GiB of 25% of the pages that all requests together hold when they end."""
    retention = Retention.parse({"method": "pyramidkv", "window": 8, "budget": BUDGET})
    pages = 0
    for prompt, params in zip(prompts, sampling, strict=True):
        assert params.max_tokens is not None
        kept = retention.row_tokens(len(prompt), 3, 3) + params.max_tokens - 1
        pages += int((-(-kept // PAGE_TOKENS)).sum())
    return 0.25 * pages * PAGE_TOKENS * ROW_BYTES / 1024**3


def test_quarter_of_the_pages_finishes_everything_unchanged(model: Path) -> None:
    prompts, sampling = requests()
    pool_gib = quarter_of_all_pages(prompts, sampling)
    with make_llm(model, kv_memory_gib=pool_gib, max_num_seqs=NUM_REQUESTS) as llm:
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        report = llm.report()
    assert report.num_preemptions > 0
    assert report.pages_leaked == 0
    got = [list(o.outputs[0].token_ids) for o in outputs]
    assert [len(tokens) for tokens in got] == [s.max_tokens for s in sampling]
    with make_llm(model, max_num_seqs=1) as llm:
        few = range(0, NUM_REQUESTS, 20)  # greedy and seeded alike
        for number in [*few, *(n + 1 for n in few)]:
            [alone] = llm.generate(
                prompt_token_ids=[prompts[number]], sampling_params=sampling[number]
            )
            assert list(alone.outputs[0].token_ids) == got[number]
        assert llm.report().num_preemptions == 0


def test_seeded_text_is_the_same_alone_batched_and_preempted(model: Path) -> None:
    prompts, _ = requests()
    prompts = [p[:40] for p in prompts[:24]]
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=30, ignore_eos=True)
    with make_llm(model, max_num_seqs=24) as llm:
        batched = llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        alone = [llm.generate(prompt_token_ids=[p], sampling_params=sampling)[0] for p in prompts]
        assert llm.report().num_preemptions == 0
    tight = 24 * ROWS * 9 * PAGE_TOKENS * ROW_BYTES / 1024**3
    with make_llm(model, max_num_seqs=24, kv_memory_gib=tight) as llm:
        preempted = llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        assert llm.report().num_preemptions > 0
    texts = [[o.outputs[0].text for o in outputs] for outputs in (alone, batched, preempted)]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1


@pytest.mark.parametrize("method", ["ada-pyramidkv", "headkv"])
def test_rows_of_different_lengths_share_a_small_pool(method: str, model: Path) -> None:
    """What a head keeps differs (profile), or is unknown when pages are promised (they compete).

    The ledger is compared with the workers' pages after every step that leaves none in flight.
    """
    retention: dict[str, Any] = {"method": method, "window": 8, "budget": BUDGET}
    if method == "headkv":
        # 3 layers, 6 query heads, 3 kv heads
        retention["profile"] = {
            f"{i}-{j}": [1.0 + (5 * i + j) % 7] for i in range(3) for j in range(6)
        }
    prompts, sampling = requests()
    prompts, sampling = prompts[:24], sampling[:24]
    pool_gib = 8 * ROWS * (BUDGET // PAGE_TOKENS) * PAGE_TOKENS * ROW_BYTES / 1024**3
    with make_llm(model, retention=retention, kv_memory_gib=pool_gib, max_num_seqs=24) as llm:
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        report = llm.report()
    assert report.num_preemptions > 0
    assert report.pages_leaked == 0
    got = [list(o.outputs[0].token_ids) for o in outputs]
    with make_llm(model, retention=retention, max_num_seqs=1) as llm:
        for number in (0, 1, 22, 23):
            [alone] = llm.generate(
                prompt_token_ids=[prompts[number]], sampling_params=sampling[number]
            )
            assert list(alone.outputs[0].token_ids) == got[number]


def test_layers_with_a_window_share_a_small_pool(demo_model: Path, tmp_path: Path) -> None:
    """Resumed past the window in chunks, beside rows that are cut; the ledger counts the same."""
    save_tiny("gemma2", tmp_path, tokenizer_of=demo_model)
    retention = {"method": "snapkv", "window": 8, "budget": BUDGET, "decode": {"slack_pages": 2}}
    prompts, sampling = requests()
    prompts, sampling = prompts[:16], sampling[:16]
    pool_gib = 450 * PAGE_TOKENS * ROW_BYTES / 1024**3
    for method in (retention, "full"):
        settings = {"retention": method, "max_num_seqs": 16}
        with make_llm(tmp_path, kv_memory_gib=pool_gib, **settings) as llm:
            outputs = llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
            report = llm.report()
        assert report.num_preemptions > 0
        assert report.pages_leaked == 0
        with make_llm(tmp_path, retention=method, max_num_seqs=1) as llm:
            for number in (1, 2, 15):
                alone, got = llm.generate([prompts[number]], sampling[number])[0], outputs[number]
                assert alone.outputs[0].token_ids == got.outputs[0].token_ids


OWN = {"budget": BUDGET, "window": 8, "sinks": 2}
TRIMMED = {"method": "pyramidinfer", "sinks": 2, "min_context": 4, "rho": 0.5}
MIXED: list[Any] = [
    "full",
    {"method": "snapkv"} | OWN,
    {"method": "adakv", "budget": BUDGET, "window": 8},
    {"method": "snapkv", "decode": {"slack_pages": 2}} | OWN,
    {"method": "h2o", "budget": BUDGET, "sinks": 2, "decode": {"slack_pages": 2}},
    TRIMMED | {"decode": {"trigger": "published", "exceed": 6}},
    TRIMMED | {"decode": {"trigger": "stored", "exceed": 6}},
]


def test_who_waits_on_the_host_goes_on_without_another_prefill(model: Path) -> None:
    """Rows that are kept whole, cut, cut again, trimmed: all come back as they were."""
    prompts, sampling = requests()
    prompts, sampling = [prompt[-60:] for prompt in prompts[:16]], sampling[:16]
    retentions = [MIXED[n % len(MIXED)] for n in range(16)]
    pool, host = 300 * PAGE_TOKENS * ROW_BYTES / 1024**3, 1e-3
    settings = {"retention": "full", "max_num_seqs": 16, "prefix_caching": False}
    with make_llm(model, **settings) as llm:
        expected = llm.generate(
            prompt_token_ids=prompts, sampling_params=sampling, retention=retentions
        )
    with make_llm(model, kv_memory_gib=pool + host, host_kv_gib=host, **settings) as llm:
        outputs = llm.generate(
            prompt_token_ids=prompts, sampling_params=sampling, retention=retentions
        )
        report, client = llm.report(), cast(Any, llm._client)
        counts = client._engine.scheduler.host_memory.counts
    assert counts.resumed == counts.parked == report.num_preemptions > 2
    assert report.pages_leaked == 0
    for one, other in zip(outputs, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
