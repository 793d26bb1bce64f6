"""A request is checked when it is made: a bad value costs that request and names its field."""

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from saqqara.cluster.request import CompletionOutput, RequestMetrics, ScoreOutput
from saqqara.cluster.sampling import SamplingParams, derived_seed, scoring_params
from saqqara.cluster.scheduling.sequence import Sequence, TokenRequest
from saqqara.compression.retention import Retention

DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "max_tokens": 16,
    "min_tokens": 0,
    "stop": (),
    "stop_token_ids": (),
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "ignore_eos": False,
    "logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "truncate_prompt_tokens": None,
    "truncation_side": "left",
    "prompt_logprobs": None,
    "structured_outputs": None,
}


def test_names_and_defaults_are_those_of_vllm() -> None:
    assert SamplingParams().model_dump() == DEFAULTS


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("n", 0, "greater than or equal to 1"),
        ("n", 129, "less than or equal to 128"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", float("nan"), "finite"),
        ("temperature", float("inf"), "finite"),
        ("top_p", -0.1, "greater than or equal to 0"),
        ("top_p", 1.1, "less than or equal to 1"),
        ("top_k", -2, "greater than or equal to -1"),
        ("min_p", 1.5, "less than or equal to 1"),
        ("temperature", 1.1e6, "less than or equal to 1000000"),
        ("repetition_penalty", 0.0, "greater than or equal to 0.01"),
        ("repetition_penalty", 1e-46, "greater than or equal to 0.01"),
        ("repetition_penalty", 1e30, "less than or equal to 100"),
        ("top_k", 2**31, "less than 2147483648"),
        ("max_tokens", 2**63, "less than 2147483648"),
        ("min_tokens", 2**31, "less than 2147483648"),
        ("truncate_prompt_tokens", 2**70, "less than 2147483648"),
        ("stop", ["a"] * 257, "at most 256 items"),
        ("stop", ["a", "b" * 1025], "at most 1024 characters"),
        ("stop_token_ids", [2**31], "less than 2147483648"),
        ("stop_token_ids", [1] * 1025, "at most 1024 items"),
        ("logit_bias", dict.fromkeys(range(1025), 1.0), "at most 1024 items"),
        ("logit_bias", {1: float("nan")}, "finite"),
        ("allowed_token_ids", [], "at least 1 item"),
        ("bad_words", ["a"] * 257, "at most 256 items"),
        ("presence_penalty", 2.5, "less than or equal to 2"),
        ("frequency_penalty", -2.5, "greater than or equal to -2"),
        ("seed", 2**63, "less than 9223372036854775808"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("min_tokens", -1, "greater than or equal to 0"),
        ("stop_token_ids", [-1], "greater than or equal to 0"),
        ("logprobs", 21, "less than or equal to 20"),
        ("prompt_logprobs", -1, "greater than or equal to 0"),
        ("prompt_logprobs", 21, "less than or equal to 20"),
        ("truncate_prompt_tokens", -2, "greater than or equal to -1"),
        ("stop", 3, "valid tuple"),
        ("best_of", 2, "Extra inputs are not permitted"),
    ],
)
def test_a_bad_value_names_field_and_limit(field: str, value: object, limit: str) -> None:
    with pytest.raises(ValueError, match=limit) as caught:
        SamplingParams(**{field: value})
    assert isinstance(caught.value, ValidationError)
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop": ["a", ""]}, "stop: every string must have at least one character"),
        ({"bad_words": ["a", ""]}, "bad_words: every string must have at least one character"),
        ({"stop": "a", "detokenize": False}, "stop needs detokenize=True"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens=4, not 5"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be at least 1, or -1"),
    ],
)
def test_values_that_do_not_go_together(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


def test_stop_may_be_one_string_or_several() -> None:
    assert SamplingParams.model_validate({"stop": "end"}).stop == ("end",)
    assert SamplingParams.model_validate({"stop": ["a", "b"]}).stop == ("a", "b")
    assert SamplingParams.model_validate({"stop": None, "stop_token_ids": None}).stop == ()


def test_parameters_are_values() -> None:
    params = SamplingParams(temperature=0.5, stop=("a",))
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(SamplingParams(temperature=0.5, stop=("a",)))
    with pytest.raises(ValidationError, match="frozen"):
        params.temperature = 1.0  # type: ignore[misc]


def test_the_workers_get_what_they_need() -> None:
    params = SamplingParams(top_k=-1, min_tokens=2, stop_token_ids=(7, 5), logprobs=0)
    spec = params.spec(seed=-1, eos_token_ids=(5, 6))
    assert spec.top_k == 0
    assert spec.seed == 2**63 - 1
    assert spec.blocked_token_ids == (5, 6, 7)
    assert spec.num_logprobs == 0
    assert SamplingParams(ignore_eos=True, min_tokens=1).spec(0, (5,)).blocked_token_ids == ()
    assert SamplingParams(stop_token_ids=(7,)).spec(0, (5,)).blocked_token_ids == ()


def test_the_workers_get_allowed_tokens_and_bad_words_as_ids() -> None:
    params = SamplingParams(allowed_token_ids=(5, 7), min_tokens=1)
    spec = params.spec(0, eos_token_ids=(5,), bad_words=((1, 2), (3,)))
    assert np.frombuffer(spec.allowed_token_ids, np.int32).tolist() == [5, 7]
    assert spec.bad_words == ((1, 2), (3,))
    assert SamplingParams().spec(0).allowed_token_ids == b""
    with pytest.raises(ValueError, match="allowed_token_ids has nothing but tokens that end"):
        params.spec(0, eos_token_ids=(5, 7))


def test_no_prompt_logprobs_ask_for_nothing() -> None:
    assert SamplingParams.model_validate({"prompt_logprobs": None}) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop_token_ids", (5, 100)), ("logit_bias", {100: 1.0}), ("allowed_token_ids", (100, 5))],
)
def test_tokens_that_the_model_lacks_name_their_field(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    params.check_vocabulary(101)
    with pytest.raises(ValueError, match=f"^{field}: 100 is no token of the model; they are 0 to"):
        params.check_vocabulary(100)


def make_sequence(score: tuple[int, ...] | None = None) -> Sequence:
    request = TokenRequest("r", (1, 2, 3), SamplingParams(), Retention(), score_continuation=score)
    sequence = Sequence(request, 0, 0, SamplingParams().spec(0), frozenset(), frozenset(), 4)
    sequence.slot = 9
    return sequence


def test_a_resumed_sequence_brings_its_tokens_along() -> None:
    sequence = make_sequence()
    sequence.output_token_ids += [4, 5]
    new = sequence.new_sequence()
    assert (new.slot, new.prompt_tokens, new.score) == (9, 3, False)
    assert new.tokens().dtype == np.int32
    assert new.tokens().tolist() == [1, 2, 3, 4, 5]
    sequence.position = 3
    assert sequence.num_to_feed == 2
    sequence.position = 5
    sequence.num_sampling = 1  # the sixth token is in the making
    assert sequence.num_to_feed == 1
    assert sequence.wants_sample
    sequence.num_sampling = 2
    assert not sequence.wants_sample


def test_a_scored_continuation_is_known_but_its_last_token_is_not_fed() -> None:
    sequence = make_sequence(score=(4, 5, 6))
    assert sequence.new_sequence().tokens().tolist() == [1, 2, 3, 4, 5, 6]
    sequence.position = 3
    assert sequence.num_to_feed == 2
    assert not sequence.wants_sample


def test_scores_list_up_to_twenty_tokens_in_each_place() -> None:
    assert scoring_params(None).spec(seed=0).num_logprobs is None
    assert scoring_params(20).spec(seed=0).num_logprobs == 20
    for wrong in (-1, 21):
        with pytest.raises(ValueError, match=f"top_logprobs: must be from 0 to 20, not {wrong}"):
            scoring_params(wrong)


def test_outputs_say_what_they_add_up_to() -> None:
    metrics = RequestMetrics(0.0)
    score = ScoreOutput("r", None, (1,), (2, 3), (-1.0, -0.5), (1, 1), metrics)
    assert (score.sum, score.is_greedy, score.finished) == (-1.5, True, True)
    aborted = ScoreOutput("r", None, (1,), (2, 3), (-1.0,), (1,), metrics, "abort")
    assert not aborted.is_greedy
    assert not CompletionOutput(0, "", ()).finished
    assert pickle.loads(pickle.dumps(score)) == score


def test_no_choice_of_one_seed_is_one_of_another_seed_or_prompt() -> None:
    """A sum would make the second choice of seed 7 the first of seed 8."""
    seeds = {
        derived_seed(seed, prompt=prompt, choice=choice)
        for seed in range(-20, 20)
        for prompt in range(8)
        for choice in range(8)
    }
    assert len(seeds) == 40 * 8 * 8
    assert derived_seed(7) == 7, "a request with one choice has its own seed"
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    params = SamplingParams(seed=7)
    assert params.for_prompt(0) == params
    assert params.for_prompt(2).seed == derived_seed(7, prompt=2)
    assert SamplingParams().for_prompt(2).seed is None
