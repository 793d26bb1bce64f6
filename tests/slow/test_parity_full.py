"""The whole parity promise on SmolLM2-135M-Instruct in fp32 (`make prove`).

8 prompts of 100 to 2000 tokens, 64 new tokens each: through LocalExecutor alone and together, after
preemption, as scores; and through Ray over ranks that are parallel in both ways. Half of the
prompts and of the tokens go through ranks that are parallel in one way.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.parity import Judge, token_ids

from saqqara import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(1800)]
LENGTHS = [100, 200, 350, 500, 750, 1000, 1500, 2000]
NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
FULL_MODEL_ROWS = 90  # 30 layers x 3 kv heads


@pytest.fixture(scope="module")
def judge(demo_model: Path) -> Judge:
    return Judge(demo_model, LENGTHS)


def make_llm(demo_model: Path, **settings: Any) -> LLM:
    return LLM(str(demo_model), dtype="float32", max_model_len=2304, **settings)


@pytest.fixture(scope="module")
def local(demo_model: Path) -> Iterator[LLM]:
    with make_llm(demo_model, check_integrity=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(local: LLM, judge: Judge) -> list[list[int]]:
    """What all prompts at once are answered."""
    return token_ids(local.generate(prompt_token_ids=judge.prompts, sampling_params=GREEDY))


def test_together(together: list[list[int]], judge: Judge) -> None:
    judge.assert_greedy(judge.prompts, together, NUM_TOKENS)


def test_alone(local: LLM, judge: Judge) -> None:
    outputs = [
        local.generate(prompt_token_ids=[prompt], sampling_params=GREEDY)[0]
        for prompt in judge.prompts
    ]
    judge.assert_greedy(judge.prompts, token_ids(outputs), NUM_TOKENS)


def test_scores(local: LLM, together: list[list[int]], judge: Judge) -> None:
    for prompt, continuation in zip(judge.prompts, together, strict=True):
        score = local.score(prompt, continuation)
        judge.assert_logprobs(prompt, continuation, list(score.logprobs))


def test_resumed(demo_model: Path, judge: Judge) -> None:
    """Room for every prompt and one more page a row: all but a few must be resumed."""
    pages = FULL_MODEL_ROWS * sum(-(-length // 16) + 1 for length in LENGTHS)
    gib = pages * 16 * 2 * 64 * 4 / 1024**3
    with make_llm(demo_model, kv_memory_gib=gib, check_integrity=True) as llm:
        outputs = llm.generate(prompt_token_ids=judge.prompts, sampling_params=GREEDY)
        assert llm.report().num_preemptions > 0
    judge.assert_greedy(judge.prompts, token_ids(outputs), NUM_TOKENS)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("tensor", "pipeline", "part"),
    [(2, 2, 1), (2, 1, 2), (3, 1, 2), (1, 2, 2)],
    ids=["tp2-pp2", "tp2", "tp3", "pp2"],
)
def test_through_ray(demo_model: Path, judge: Judge, tensor: int, pipeline: int, part: int) -> None:
    """One of `part` prompts, the longest among them, and one of `part` tokens."""
    prompts = judge.prompts[part - 1 :: part]
    with make_llm(
        demo_model,
        executor="ray",
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        check_integrity=True,
    ) as llm:
        sampling = GREEDY.model_copy(update={"max_tokens": NUM_TOKENS // part})
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        assert llm.report().pages_leaked == 0
    judge.assert_greedy(prompts, token_ids(outputs), NUM_TOKENS // part)
