"""The whole parity promise on SmolLM2-135M-Instruct in fp32 (`make prove`).

8 prompts of 100 to 2000 tokens, 64 new tokens each: through LocalExecutor alone and together, after
preemption, as scores; and through Ray over ranks that are parallel in both ways. Half of the
prompts and of the tokens go through ranks that are parallel in one way.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(1800)]
LENGTHS = [100, 200, 350, 500, 750, 1000, 1500, 2000]
NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
FULL_MODEL_ROWS = 90  # 30 layers x 3 kv heads


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return reference_of(demo_model, LENGTHS, NUM_TOKENS)


def make_llm(demo_model: Path, **settings: Any) -> LLM:
    return LLM(str(demo_model), dtype="float32", max_model_len=2304, **settings)


@pytest.fixture(scope="module")
def local(demo_model: Path) -> Iterator[LLM]:
    with make_llm(demo_model, check_integrity=True) as llm:
        yield llm


def test_together(local: LLM, reference: Reference) -> None:
    outputs = local.generate(prompt_token_ids=reference.prompts, sampling_params=GREEDY)
    assert_greedy_parity(reference, token_ids(outputs))


def test_alone(local: LLM, reference: Reference) -> None:
    outputs = [
        local.generate(prompt_token_ids=[prompt], sampling_params=GREEDY)[0]
        for prompt in reference.prompts
    ]
    assert_greedy_parity(reference, token_ids(outputs))


def test_scores(local: LLM, reference: Reference) -> None:
    for prompt, continuation in zip(reference.prompts, reference.outputs, strict=True):
        score = local.score(prompt, continuation)
        fed = prompt + continuation[:-1]
        logprobs = following_logits(reference.model, fed, len(continuation)).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=1e-3, rtol=0)


def test_resumed(demo_model: Path, reference: Reference) -> None:
    """Room for every prompt and one more page a row: all but a few must be resumed."""
    pages = FULL_MODEL_ROWS * sum(-(-length // 16) + 1 for length in LENGTHS)
    gib = pages * 16 * 2 * 64 * 4 / 1024**3
    with make_llm(demo_model, kv_memory_gib=gib, check_integrity=True) as llm:
        outputs = llm.generate(prompt_token_ids=reference.prompts, sampling_params=GREEDY)
        assert llm.report().num_preemptions > 0
    assert_greedy_parity(reference, token_ids(outputs))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("tensor", "pipeline", "part"),
    [(2, 2, 1), (2, 1, 2), (3, 1, 2), (1, 2, 2)],
    ids=["tp2-pp2", "tp2", "tp3", "pp2"],
)
def test_through_ray(
    demo_model: Path, reference: Reference, tensor: int, pipeline: int, part: int
) -> None:
    """One of `part` prompts, the longest among them, and one of `part` tokens."""
    chosen = slice(part - 1, None, part)
    wanted = replace(
        reference, prompts=reference.prompts[chosen], outputs=reference.outputs[chosen]
    )
    with make_llm(
        demo_model,
        executor="ray",
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        check_integrity=True,
    ) as llm:
        sampling = GREEDY.model_copy(update={"max_tokens": NUM_TOKENS // part})
        outputs = llm.generate(prompt_token_ids=wanted.prompts, sampling_params=sampling)
        assert llm.report().pages_leaked == 0
    assert {len(ids) for ids in token_ids(outputs)} == {NUM_TOKENS // part}
    assert_greedy_parity(wanted, token_ids(outputs))
