"""Log-probabilities of prompts are those of a model that sees the whole text before each token."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.byte_llama import save_tiny_llama

from saqqara import LLM, SamplingParams
from saqqara.cluster.request import RequestOutput

LENGTHS = (1, 2, 40, 300)  # the last is scored in several pieces
ATOL = 1e-4  # fp32, over sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_llama(folder, max_position=512)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    settings: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "device": "cpu"}
    with LLM(str(folder), kv_memory_gib=0.05, max_num_seqs=4, **settings) as llm:
        yield llm


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 250, length).tolist() for length in LENGTHS]


def generate(llm: LLM, given: list[list[int]], **more: Any) -> list[RequestOutput]:
    sampling = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    return llm.generate(prompt_token_ids=given, sampling_params=sampling, use_tqdm=False, **more)


def check(output: RequestOutput, llm: LLM) -> None:
    """Against teacher forcing after the first token alone, by another way through the engine."""
    ids, entries = list(output.prompt_token_ids), output.prompt_logprobs
    assert entries is not None
    assert len(entries) == len(ids)
    assert entries[0] is None
    if len(ids) == 1:
        return
    score = llm.score(ids[:1], ids[1:], retention="full", top_logprobs=3, use_tqdm=False)
    for place, entry in enumerate(entries[1:]):
        assert entry is not None
        chosen = entry[ids[place + 1]]
        assert next(iter(entry)) == ids[place + 1]
        assert chosen.logprob == pytest.approx(score.logprobs[place], abs=ATOL)
        assert chosen.rank == score.ranks[place]
        best = {token: item.logprob for token, item in entry.items() if (item.rank or 9) <= 3}
        assert best == pytest.approx(score.top_logprobs[place], abs=ATOL)


@pytest.mark.parametrize("retention", ["full", "snapkv", "knorm"])
def test_they_are_those_of_the_whole_text_whatever_is_retained(llm: LLM, retention: str) -> None:
    budget = None if retention == "full" else 40
    for output in generate(llm, prompts(), retention=retention, budget=budget):
        check(output, llm)


def test_who_asks_changes_nobodys_answer(llm: LLM) -> None:
    """Beside prompts of the same group that are not scored, and one that is shared."""
    given = [prompts()[2], prompts()[2], prompts()[1]]
    plain = SamplingParams(temperature=0, max_tokens=4)
    scored = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1)
    alone = llm.generate(prompt_token_ids=given, sampling_params=plain, use_tqdm=False)
    mixed = llm.generate(
        prompt_token_ids=given, sampling_params=[plain, scored, plain], use_tqdm=False
    )
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in mixed]
    assert [o.prompt_logprobs is None for o in mixed] == [True, False, True]
    check_sums(mixed[1])


def check_sums(output: RequestOutput) -> None:
    """The best token of a place is no less likely than the prompt's own."""
    assert output.prompt_logprobs is not None
    for entry in output.prompt_logprobs[1:]:
        assert entry is not None
        values = [item.logprob for item in entry.values()]
        assert all(value <= 0 for value in values)
        assert max(values) == max(item.logprob for item in entry.values() if item.rank == 1)


def test_what_is_sampled_after_a_prompt_is_the_best_of_the_next_place(llm: LLM) -> None:
    """And what a longer prompt says of its beginning is what the beginning says itself."""
    prompt = prompts()[2]
    outputs = [generate(llm, [prompt[:n]])[0] for n in (10, 25, 40)]
    for shorter, longer in pairwise(outputs):
        assert shorter.prompt_logprobs is not None
        assert longer.prompt_logprobs is not None
        num_tokens = len(shorter.prompt_token_ids)
        for ours, theirs in zip(
            shorter.prompt_logprobs, longer.prompt_logprobs[:num_tokens], strict=True
        ):
            assert (ours or {}).keys() == (theirs or {}).keys()
        entry = longer.prompt_logprobs[num_tokens]
        assert entry is not None
        best = next(token for token, item in entry.items() if item.rank == 1)
        assert shorter.outputs[0].token_ids[0] == best
