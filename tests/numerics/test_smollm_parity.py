"""SmolLM2-135M-Instruct through the engine says, token for token, what transformers says (fp32)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.parity import (
    Reference,
    assert_greedy_parity,
    following_logits,
    reference_of,
    token_ids,
)

from saqqara import LLM, SamplingParams

pytestmark = pytest.mark.model
LENGTHS = [40, 170, 300]
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return reference_of(demo_model, LENGTHS, NUM_TOKENS)


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[LLM]:
    with LLM(str(demo_model), dtype="float32", max_model_len=2048, check_integrity=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def batched(llm: LLM, reference: Reference) -> list[list[int]]:
    """What the engine says to all prompts at once."""
    return token_ids(llm.generate(prompt_token_ids=reference.prompts, sampling_params=GREEDY))


def test_batched(batched: list[list[int]], reference: Reference) -> None:
    assert_greedy_parity(reference, batched)


def test_alone(llm: LLM, reference: Reference) -> None:
    outputs = [
        llm.generate(prompt_token_ids=[p], sampling_params=GREEDY)[0] for p in reference.prompts
    ]
    assert_greedy_parity(reference, token_ids(outputs))


def test_budget_at_least_prompt_is_token_identical_to_full(
    llm: LLM, batched: list[list[int]], reference: Reference
) -> None:
    kept = llm.generate(
        prompt_token_ids=reference.prompts,
        sampling_params=GREEDY,
        retention="pyramidkv",
        budget=max(LENGTHS),
    )
    assert token_ids(kept) == batched


def test_resume_after_preemption(demo_model: Path, reference: Reference) -> None:
    """A pool that holds the prompts but not what they write forces preemption; nothing changes."""
    page_bytes = 16 * 2 * 64 * 4
    pages = 90 * (sum(-(-n // 16) for n in LENGTHS) + 1)  # 90 rows; one prompt has spare pages
    with LLM(
        str(demo_model),
        dtype="float32",
        max_model_len=2048,
        kv_memory_gib=pages * page_bytes / 1024**3,
        check_integrity=True,
    ) as llm:
        outputs = llm.generate(prompt_token_ids=reference.prompts, sampling_params=GREEDY)
        assert llm.report().num_preemptions > 0
    assert_greedy_parity(reference, token_ids(outputs))


def test_score_matches_teacher_forcing(llm: LLM, reference: Reference) -> None:
    for prompt, continuation in zip(reference.prompts, reference.outputs, strict=True):
        [score] = [llm.score(prompt, continuation)]
        fed = prompt + continuation[:-1]
        logits = following_logits(reference.model, fed, len(continuation))
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=1e-3, rtol=0)
