"""Completions through the official client: echoes, log-probabilities, ids, usage, errors."""

import math
from itertools import pairwise
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from support.api_server import MAX_MODEL_LEN, MODEL

ROWS = 4 * 2  # layers and kv heads of the model
PROMPT = "hello"


def complete(client: OpenAI, prompt: Any = PROMPT, **settings: Any) -> Any:
    """A completion of exactly `max_tokens` tokens; what is no field of the client goes beside."""
    extra = {"ignore_eos": True, **settings.pop("extra", {})}
    usual = {"max_tokens": 5, "temperature": 0, **settings}
    return client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **usual)


def streamed(client: OpenAI, prompt: Any = PROMPT, **settings: Any) -> list[Any]:
    return list(complete(client, prompt, stream=True, **settings))


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = (choice for chunk in chunks for choice in chunk.choices)
    return "".join(choice.text for choice in choices if choice.index == index)


# Echoes


def test_an_echo_begins_with_the_prompt(client: OpenAI) -> None:
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain


def test_an_echo_of_token_ids_is_their_text(client: OpenAI) -> None:
    ids = complete(client, extra={"return_token_ids": True}).choices[0].prompt_token_ids
    assert complete(client, ids, echo=True).choices[0].text.startswith(PROMPT)


def test_a_stream_begins_with_its_echo(client: OpenAI) -> None:
    chunks = streamed(client, echo=True)
    assert chunks[0].choices[0].text.startswith(PROMPT)
    assert text_of(chunks) == complete(client, echo=True).choices[0].text


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_echo_has_the_prompts_logprobs(client: OpenAI, count: int) -> None:
    logprobs = complete(client, echo=True, logprobs=count).choices[0].logprobs
    num_tokens = len(PROMPT) + 5
    assert len(logprobs.tokens) == len(logprobs.text_offset) == num_tokens
    assert logprobs.tokens[: len(PROMPT)] == list(PROMPT)
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    for token, own, best in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert best[token] == own <= 0
        assert max(count, 1) <= len(best) <= count + 1


def test_an_echo_alone_writes_nothing(client: OpenAI) -> None:
    answer = complete(client, echo=True, logprobs=2, max_tokens=0)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert len(choice.logprobs.tokens) == len(PROMPT)
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (0, len(PROMPT))
    assert text_of(streamed(client, echo=True, max_tokens=0)) == PROMPT


def test_streamed_echoes_have_the_logprobs_of_whole_ones(client: OpenAI) -> None:
    whole = complete(client, echo=True, logprobs=2).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in streamed(client, echo=True, logprobs=2)]
    for name in ("tokens", "text_offset"):
        assert [x for p in parts if p for x in getattr(p, name)] == getattr(whole, name)
    values = [x for p in parts if p for x in p.token_logprobs]
    assert values[0] is None
    assert values[1:] == pytest.approx(whole.token_logprobs[1:], abs=1e-4)


def test_the_likelihood_of_a_text_does_not_depend_on_the_retention(client: OpenAI) -> None:
    text = "the quick brown fox jumps over the lazy dog, " * 3
    kinds: list[dict[str, Any]] = [{}, {"retention": {"method": "snapkv", "budget": 40}}]
    both = [
        complete(client, text, echo=True, logprobs=0, max_tokens=0, extra=kind) for kind in kinds
    ]
    values = [answer.choices[0].logprobs.token_logprobs[1:] for answer in both]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_what_is_written_is_as_likely_as_when_it_is_read(client: OpenAI) -> None:
    """The log-probabilities of generated tokens are those of the same text as a prompt."""
    settings = {"logprobs": 0, "max_tokens": 8}
    written = complete(client, extra={"return_token_ids": True}, **settings).choices[0]
    whole = [*written.prompt_token_ids, *written.token_ids]
    read = complete(client, whole, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    values = read.token_logprobs[len(written.prompt_token_ids) :]
    assert values == pytest.approx(written.logprobs.token_logprobs, abs=1e-3)


def test_several_prompts_are_echoed_in_their_places(client: OpenAI) -> None:
    answer = complete(client, ["one", "three"], n=2, echo=True, logprobs=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    starts = [choice.text[:5] for choice in answer.choices]
    assert [start.startswith("one") for start in starts] == [True, True, False, False]
    assert starts[2:] == ["three", "three"]
    lengths = [len(choice.logprobs.tokens) for choice in answer.choices]
    assert lengths == [8, 8, 10, 10]


# Log-probabilities of prompts


@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs_are_by_token_id(client: OpenAI, count: int) -> None:
    extra = {"prompt_logprobs": count, "return_token_ids": True}
    choice = complete(client, extra=extra).choices[0]
    assert choice.text == complete(client).choices[0].text
    assert len(choice.prompt_logprobs) == len(choice.prompt_token_ids) == len(PROMPT)
    assert choice.prompt_logprobs[0] is None
    for token_id, entry in zip(
        choice.prompt_token_ids[1:], choice.prompt_logprobs[1:], strict=True
    ):
        assert next(iter(entry)) == str(token_id)
        assert max(count, 1) <= len(entry) <= count + 1
        assert {"logprob", "rank", "decoded_token"} == {*entry[str(token_id)]}
        ranks = {item["rank"] for item in entry.values()}
        assert {*range(1, count + 1)} <= ranks


def test_prompt_logprobs_name_the_prompts_tokens(client: OpenAI) -> None:
    entries = complete(client, extra={"prompt_logprobs": 0}).choices[0].prompt_logprobs
    names = [next(iter(entry.values()))["decoded_token"] for entry in entries[1:]]
    assert "".join(names) == PROMPT[1:]


def test_a_prompt_of_one_token_has_a_null(client: OpenAI) -> None:
    assert complete(client, "x", extra={"prompt_logprobs": 2}).choices[0].prompt_logprobs == [None]


def test_a_long_prompt_has_all_of_its_logprobs(client: OpenAI) -> None:
    """More than are written at once."""
    text = "abcdefgh" * 100
    choice = complete(client, text, max_tokens=1, extra={"prompt_logprobs": 5}).choices[0]
    assert len(choice.prompt_logprobs) == len(text)
    assert all(len(entry) >= 5 for entry in choice.prompt_logprobs[1:])


# Ids


def test_token_ids_are_those_of_prompt_and_answer(client: OpenAI) -> None:
    choice = complete(client, extra={"return_token_ids": True}, max_tokens=7).choices[0]
    assert len(choice.prompt_token_ids) == len(PROMPT)
    assert len(choice.token_ids) == 7
    again = complete(client, choice.prompt_token_ids, max_tokens=7).choices[0]
    assert again.text == choice.text


def test_streamed_token_ids_add_up(client: OpenAI) -> None:
    whole = complete(client, extra={"return_token_ids": True}).choices[0]
    chunks = streamed(client, extra={"return_token_ids": True})
    assert chunks[0].choices[0].prompt_token_ids == whole.prompt_token_ids
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == whole.token_ids
    assert all("prompt_token_ids" not in c.choices[0].model_extra for c in chunks[1:])


def test_nobody_who_does_not_ask_gets_ids(client: OpenAI) -> None:
    assert "token_ids" not in complete(client).choices[0].model_extra


@pytest.mark.parametrize("echo", [False, True])
def test_tokens_may_be_named_by_their_ids(client: OpenAI, echo: bool) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = complete(client, logprobs=2, echo=echo, extra=extra).choices[0]
    ids = [*choice.prompt_token_ids, *choice.token_ids] if echo else choice.token_ids
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in ids]
    for best in choice.logprobs.top_logprobs:
        assert all(name.startswith("token_id:") for name in best or {})


# Choices


def test_the_best_of_several_is_the_likeliest(client: OpenAI) -> None:
    settings = {"temperature": 1.5, "seed": 3, "max_tokens": 6, "logprobs": 0}
    every = complete(client, n=4, **settings)
    sums = [sum(choice.logprobs.token_logprobs) for choice in every.choices]
    best = complete(client, best_of=4, **settings)
    [choice] = best.choices
    assert choice.index == 0
    assert choice.text == every.choices[sums.index(max(sums))].text
    assert best.usage.completion_tokens == every.usage.completion_tokens == 24


def test_the_best_two_come_in_order(client: OpenAI) -> None:
    settings = {"temperature": 1.5, "seed": 3, "max_tokens": 6, "logprobs": 0}
    answer = complete(client, n=2, best_of=4, **settings)
    sums = [sum(choice.logprobs.token_logprobs) for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert sums == sorted(sums, reverse=True)


def test_a_best_of_shows_no_logprobs_unasked(client: OpenAI) -> None:
    answer = complete(client, best_of=2, temperature=1.5, seed=3)
    assert answer.choices[0].logprobs is None


def test_a_best_of_n_is_all_of_them(client: OpenAI) -> None:
    settings = {"temperature": 1.5, "seed": 3, "n": 2}
    texts = [choice.text for choice in complete(client, **settings).choices]
    assert [c.text for c in complete(client, best_of=2, **settings).choices] == texts
    chunks = streamed(client, best_of=2, **settings)
    assert [text_of(chunks, index) for index in (0, 1)] == texts


@pytest.mark.parametrize("seed", [1, 2**62])
def test_choices_are_those_of_the_seed(client: OpenAI, seed: int) -> None:
    settings = {"n": 3, "temperature": 1.2, "seed": seed, "max_tokens": 12}
    first, second = (complete(client, **settings) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.text for choice in second.choices] == texts
    assert len({*texts}) > 1


# Prompts


def test_a_prompt_is_cut_at_its_beginning_or_its_end(client: OpenAI) -> None:
    def kept(**extra: Any) -> str:
        text: str = complete(client, "abcdef", echo=True, max_tokens=0, extra=extra).choices[0].text
        return text

    assert kept(truncate_prompt_tokens=2) == "ef"
    assert kept(truncate_prompt_tokens=2, truncation_side="left") == "ef"
    assert kept(truncate_prompt_tokens=2, truncation_side="right") == "ab"
    assert kept(truncate_prompt_tokens=20) == "abcdef"


def test_special_tokens_may_be_left_out(client: OpenAI) -> None:
    """This tokenizer adds none, so the answer is the same."""
    answers = [complete(client, extra={"add_special_tokens": a}) for a in (True, False)]
    assert answers[0].choices[0].text == answers[1].choices[0].text


@pytest.mark.parametrize("prompt", ["é", "日本語", "🙂", "\x00", " ", "a\nb"])
def test_any_text_is_echoed_as_it_is(client: OpenAI, prompt: str) -> None:
    answer = complete(client, prompt, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == prompt
    offsets = answer.choices[0].logprobs.text_offset
    assert all(before <= after for before, after in pairwise(offsets))
    assert answer.usage.prompt_tokens == len(prompt.encode())


# What may be sampled


def test_only_allowed_tokens_are_sampled(client: OpenAI) -> None:
    ids = complete(client, "xyz", extra={"return_token_ids": True}).choices[0].prompt_token_ids
    text = complete(client, max_tokens=12, extra={"allowed_token_ids": ids}).choices[0].text
    assert {*text} <= {*"xyz"}


def test_bad_words_are_not_written(client: OpenAI) -> None:
    ids = complete(client, "xyz", extra={"return_token_ids": True}).choices[0].prompt_token_ids
    extra = {"allowed_token_ids": ids, "bad_words": ["xy", "z"]}
    answer = complete(client, max_tokens=40, temperature=1.5, seed=2, extra=extra)
    assert {*answer.choices[0].text} <= {*"xy"}
    assert "xy" not in answer.choices[0].text


def test_a_stop_token_ends_the_answer(client: OpenAI) -> None:
    ids = complete(client, "xy", extra={"return_token_ids": True}).choices[0].prompt_token_ids
    extra = {"allowed_token_ids": ids, "stop_token_ids": [ids[1]]}
    choice = complete(client, max_tokens=64, temperature=1.5, seed=4, extra=extra).choices[0]
    assert {*choice.text} <= {"x"}
    assert (choice.finish_reason, choice.stop_reason) == ("stop", ids[1])


# Usage


@pytest.mark.parametrize("n", [1, 3])
def test_usage_says_what_full_retention_keeps(client: OpenAI, n: int) -> None:
    """All but the last token of each choice, in every row."""
    usage = complete(client, n=n, seed=1, max_tokens=6).usage
    kept = usage.kv_cache
    assert kept["kept_tokens"] == kept["full_tokens"] == n * ROWS * (len(PROMPT) + 5)
    assert kept["kept_bytes"] == kept["full_bytes"] == kept["kept_tokens"] * 2 * 16 * 4


def test_usage_says_what_a_budget_keeps(client: OpenAI) -> None:
    extra = {"retention": {"method": "snapkv", "budget": 40, "window": 8}}
    kept = complete(client, "x" * 400, max_tokens=3, extra=extra).usage.kv_cache
    assert kept["kept_tokens"] == ROWS * (40 + 2)
    assert kept["full_tokens"] == ROWS * (400 + 2)


def test_usage_comes_at_the_end_of_a_stream(client: OpenAI) -> None:
    chunks = streamed(client, stream_options={"include_usage": True})
    assert chunks[-1].usage == complete(client).usage
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


def test_usage_may_come_with_every_chunk(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(client, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert all(chunk.usage.prompt_tokens == len(PROMPT) for chunk in chunks)


# Errors


@pytest.mark.parametrize(
    ("field", "settings", "message"),
    [
        ("suffix", {"suffix": "end"}, "do not fill in the middle"),
        ("best_of", {"best_of": 1, "n": 2}, "at least n=2"),
        ("best_of", {"best_of": 17}, "at most 16"),
        ("best_of", {"best_of": 2, "stream": True}, "cannot be streamed"),
        ("max_tokens", {"max_tokens": 0}, "greater than or equal to 1"),
        ("logprobs", {"logprobs": 21}, "at most 20"),
        ("max_tokens", {"max_tokens": MAX_MODEL_LEN}, "max_model_len"),
        ("prompt_logprobs", {"extra": {"prompt_logprobs": -1}}, "greater than or equal to 0"),
        ("prompt_logprobs", {"extra": {"prompt_logprobs": 21}}, "at most 20"),
        ("prompt_logprobs", {"extra": {"prompt_logprobs": 1}, "stream": True}, "be streamed"),
        ("prompt_logprobs", {"extra": {"prompt_logprobs": True}}, "valid integer"),
        ("truncation_side", {"extra": {"truncation_side": "up"}}, "'left' or 'right'"),
        ("truncate_prompt_tokens", {"extra": {"truncate_prompt_tokens": 0}}, "at least 1"),
        ("stream_options", {"stream_options": {"include_usage": True}}, "needs stream=true"),
        (
            "stream_options",
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "needs include_usage",
        ),
        (
            "stream_options.include_obfuscation",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "not padded",
        ),
        (
            "echo",
            {"echo": True, "logprobs": 1, "extra": {"retention": "pyramidinfer"}},
            "propagates",
        ),
        ("return_token_id", {"extra": {"return_token_id": True}}, "'return_token_ids'"),
        (
            "logprobs",
            {"n": 16, "logprobs": 20, "max_tokens": MAX_MODEL_LEN - 100, "seed": 1},
            "log-probabilities",
        ),
    ],
)
def test_a_mistake_is_named(
    client: OpenAI, field: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        complete(client, **settings)
    assert caught.value.param == field
    assert message in caught.value.message


def test_an_echo_without_logprobs_goes_with_any_retention(client: OpenAI) -> None:
    answer = complete(client, echo=True, extra={"retention": "pyramidinfer"})
    assert answer.choices[0].text.startswith(PROMPT)


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="there is 'tiny'"):
        client.completions.create(model="gpt-4o", prompt="x")


def test_models_are_listed_and_found(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    card: Any = client.models.retrieve(MODEL)
    assert (card.owned_by, card.max_model_len) == ("saqqara", MAX_MODEL_LEN)
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-4o")


def test_probabilities_are_at_most_one(client: OpenAI) -> None:
    for best in complete(client, logprobs=20).choices[0].logprobs.top_logprobs:
        assert sum(math.exp(value) for value in best.values()) <= 1 + 1e-4
