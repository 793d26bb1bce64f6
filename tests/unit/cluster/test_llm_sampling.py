"""How tokens are chosen, through a whole engine in this process.

The model is a tiny random one of bytes in which the embedding of the letter `x` is NaN, so that
nothing can be computed after it.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.byte_llama import save_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from saqqara import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("broken")
    save_tiny_llama(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    [letter] = AutoTokenizer.from_pretrained(folder).encode("x")
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] = math.nan
    model.save_pretrained(folder)
    with LLM(str(folder), dtype="float32", kv_memory_gib=0.05, check_integrity=True) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_sequence_fails_alone_and_says_why(llm: LLM, temperature: float) -> None:
    sampling = GREEDY.model_copy(update={"temperature": temperature, "seed": 3, "logprobs": 1})
    prompts = ["abc", "ab x", "hello"]
    before, broken, after = llm.generate(prompts, sampling)
    assert [output.outputs[0].finish_reason for output in (before, after)] == ["length"] * 2
    assert broken.outputs[0].finish_reason == "error"
    assert broken.error_code == "computation_failed"
    assert "the model's logits at position 4 are not finite (NaN or infinite)" in str(broken.error)
    alone = llm.generate([prompts[0], prompts[2]], sampling)
    assert [o.outputs[0].token_ids for o in alone] == [
        o.outputs[0].token_ids for o in (before, after)
    ]


def test_a_token_of_the_answer_fails_it_where_it_stands(llm: LLM) -> None:
    """The prompt is sound; the answer is led to `x`, after which nothing can be computed."""
    [letter] = llm.get_tokenizer().encode("x")
    led = GREEDY.model_copy(update={"allowed_token_ids": (letter,)})
    [output] = llm.generate("abc", led)
    assert output.outputs[0].token_ids == (letter,)
    assert output.outputs[0].text == "x"
    assert output.outputs[0].finish_reason == "error"
    assert "position 4" in str(output.error)


def test_scores_of_a_broken_text_are_an_error(llm: LLM) -> None:
    good, bad = llm.score(["abc", "abc"], ["def", "dxf"])
    assert good.finish_reason == "stop"
    assert all(math.isfinite(value) for value in good.logprobs)
    assert bad.finish_reason == "error"
    assert "not finite" in str(bad.error)


def test_only_allowed_tokens_are_written(llm: LLM) -> None:
    """Each request of a batch has its own, or none."""
    letters = llm.get_tokenizer().encode("abcdefgh")
    sampling = [
        GREEDY.model_copy(update={"temperature": 1.0, "max_tokens": 40, "allowed_token_ids": ids})
        for ids in [*pairwise(letters), None]
    ]
    outputs = llm.generate(["abc"] * len(sampling), sampling)
    for output, params in zip(outputs, sampling, strict=True):
        assert len(output.outputs[0].token_ids) == 40 or params.allowed_token_ids is None
        if params.allowed_token_ids is not None:
            assert {*output.outputs[0].token_ids} <= {*params.allowed_token_ids}


def test_bad_words_are_not_written(llm: LLM) -> None:
    letters = tuple(llm.get_tokenizer().encode("ab"))
    sampling = SamplingParams(max_tokens=200, seed=1, allowed_token_ids=letters)
    [free] = llm.generate("a", sampling)
    assert "aba" in free.outputs[0].text
    [limited] = llm.generate("a", sampling.model_copy(update={"bad_words": ("aba", "bbb")}))
    assert len(limited.outputs[0].text) == 200
    assert "aba" not in limited.outputs[0].text
    assert "bbb" not in limited.outputs[0].text
    assert "ab" in limited.outputs[0].text


def test_no_text_is_made_where_none_is_wanted(llm: LLM) -> None:
    [plain] = llm.generate("abc", GREEDY)
    [silent] = llm.generate("abc", GREEDY.model_copy(update={"detokenize": False}))
    assert silent.outputs[0].token_ids == plain.outputs[0].token_ids
    assert silent.outputs[0].text == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"stop_token_ids": [257], "min_tokens": 1},
            "stop_token_ids: 257 is no token",
        ),
        ({"logit_bias": {257: 1.0}}, "logit_bias: 257 is no token"),
        ({"allowed_token_ids": [3, 257]}, "allowed_token_ids: 257 is no token"),
        ({"allowed_token_ids": [0], "min_tokens": 1}, "allowed_token_ids has nothing but tokens"),
    ],
)
def test_tokens_that_the_model_lacks_cost_the_call_alone(llm: LLM, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts\[0\]: {said}"):
        llm.generate("abc", SamplingParams(**given))
    assert llm.generate("abc", GREEDY)[0].finished


def test_a_request_without_a_profile_is_told_so_by_its_field(llm: LLM) -> None:
    """And not where on the server models and profiles lie."""
    asked = {"method": "headkv", "budget": 64, "profile": "auto"}
    with pytest.raises(ValueError, match="retention: profile: the profile store has none") as told:
        llm.generate("abc", retention=asked)
    assert "/" not in str(told.value)
