"""Chats through the official client: parts, templates, log-probabilities, ids, usage, tokens."""

import json
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, OpenAI
from support.api_server import MODEL

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def chat(client: OpenAI, messages: Any = HELLO, **settings: Any) -> Any:
    """A chat of exactly `max_tokens` tokens; what is no field of the client goes beside."""
    extra = {"ignore_eos": True, **settings.pop("extra", {})}
    usual = {"max_tokens": 5, "temperature": 0, **settings}
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **usual)


def post(client: OpenAI, path: str, **body: Any) -> Any:
    """The answer of a path that is no part of OpenAI's API."""
    root = str(client.base_url).removesuffix("/v1/")
    return json.loads(client.post(root + path, body=body, cast_to=str))


def content(answer: Any) -> str:
    text: str = answer.choices[0].message.content
    return text


# Messages


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        [{"role": "user", "content": "hello", "type": "text"}],
        [{"role": "user", "content": "hello", "tool_calls": None, "name": None}],
    ],
)
def test_a_text_may_be_written_in_several_ways(client: OpenAI, messages: Any) -> None:
    assert content(chat(client, messages)) == content(chat(client))


def test_parts_of_a_message_are_lines(client: OpenAI) -> None:
    parts = [{"type": "text", "text": text} for text in ("one", "two")]
    joined = chat(client, [{"role": "user", "content": "one\ntwo"}])
    assert content(chat(client, [{"role": "user", "content": parts}])) == content(joined)


def test_the_answer_may_go_on_with_the_last_message(client: OpenAI) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    extra = {"continue_final_message": True, "prompt_logprobs": 0, "return_token_ids": True}
    answer = chat(client, messages, extra=extra)
    prompt = post(client, "/detokenize", tokens=answer.prompt_token_ids)["prompt"]
    assert prompt == "user: hello\nassistant: Well"


def test_the_head_of_the_answer_may_be_left_out(client: OpenAI) -> None:
    extra = {"add_generation_prompt": False, "return_token_ids": True}
    answer = chat(client, extra=extra)
    assert len(answer.prompt_token_ids) == len("user: hello\n")


# Log-probabilities and ids


@pytest.mark.parametrize("count", [0, 2])
def test_logprobs_of_the_messages_stand_beside_the_choices(client: OpenAI, count: int) -> None:
    answer = chat(client, extra={"prompt_logprobs": count, "return_token_ids": True})
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    assert answer.prompt_logprobs[0] is None
    names = [next(iter(entry.values()))["decoded_token"] for entry in answer.prompt_logprobs[1:]]
    assert "".join(names) == "user: hello\nassistant: "[1:]
    assert len(answer.choices[0].token_ids) == 5


def test_streamed_ids_add_up_and_the_prompts_come_once(client: OpenAI) -> None:
    whole = chat(client, extra={"return_token_ids": True})
    chunks = list(chat(client, stream=True, extra={"return_token_ids": True}))
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    assert all("prompt_token_ids" not in chunk.model_extra for chunk in chunks[1:])
    ids = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    assert ids == whole.choices[0].token_ids


def test_tokens_may_be_named_by_their_ids(client: OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    [choice] = chat(client, logprobs=True, top_logprobs=2, extra=extra).choices
    names = [token.token for token in choice.logprobs.content]
    assert names == [f"token_id:{token_id}" for token_id in choice.token_ids]
    for token in choice.logprobs.content:
        assert all(top.token.startswith("token_id:") for top in token.top_logprobs)


@pytest.mark.parametrize("n", [1, 2])
def test_streams_of_choices_have_a_role_each(client: OpenAI, n: int) -> None:
    chunks = list(chat(client, n=n, stream=True, temperature=1.3, seed=5))
    for index in range(n):
        deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == index]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert sum(len(delta.content or "") > 0 for delta in deltas) > 0


# Usage


def test_usage_of_a_chat_says_what_was_kept(client: OpenAI) -> None:
    usage = chat(client, max_tokens=3).usage
    tokens = 8 * (usage.prompt_tokens + 2)
    assert usage.kv_cache["kept_tokens"] == usage.kv_cache["full_tokens"] == tokens


def test_a_budget_shows_in_the_usage(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "x" * 300}]
    extra = {"retention": {"method": "streaming", "budget": 50}}
    kept = chat(client, messages, extra=extra).usage.kv_cache
    assert kept["kept_tokens"] == 8 * (50 + 4)
    assert kept["kept_bytes"] < kept["full_bytes"] / 4


def test_usage_may_come_with_every_chunk(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


# What clients send for themselves


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "safety_identifier": "x", "prompt_cache_key": "y"},
        {"metadata": {"run": "7"}, "store": False, "service_tier": "auto"},
        {"extra": {"metadata": {"variables": {"{{USER}}": "me"}, "files": [{"a": [1, 2]}]}}},
        {"parallel_tool_calls": True, "tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"extra": {"spaces_between_special_tokens": False, "skip_special_tokens": True}},
        {"extra": {"include_reasoning": True, "best_of": 1, "use_beam_search": False}},
    ],
)
def test_book_keeping_changes_nothing(client: OpenAI, fields: dict[str, Any]) -> None:
    assert content(chat(client, **fields)) == content(chat(client))


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("chat_template", {"extra": {"chat_template": "{{ 1 }}"}}),
        ("echo", {"extra": {"echo": True}}),
        ("prompt_logprobs", {"extra": {"prompt_logprobs": 30}}),
        ("best_of", {"extra": {"best_of": 2}, "n": 4}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("store", {"store": True}),
        ("metadata", {"extra": {"metadata": {str(i): i for i in range(2000)}}}),
        ("chat_template_kwargs", {"extra": {"chat_template_kwargs": {"tokenize": True}}}),
        ("continue_final_message", {"extra": {"continue_final_message": 1}}),
        ("max_completion_token", {"extra": {"max_completion_token": 5}}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "x"}]}]}),
    ],
)
def test_a_mistake_is_named(client: OpenAI, field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == field


# Tokens


def test_tokens_of_a_text_and_back(client: OpenAI) -> None:
    tokens = post(client, "/tokenize", prompt="hello", return_token_strs=True)
    assert tokens["token_strs"] == list("hello")
    assert tokens["count"] == 5
    assert post(client, "/detokenize", tokens=tokens["tokens"])["prompt"] == "hello"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "user: hello\nassistant: "),
        ({"add_generation_prompt": False}, "user: hello\n"),
        ({"add_special_tokens": True}, "user: hello\nassistant: "),
        ({"chat_template_kwargs": {"mood": "calm"}}, "user: hello\nassistant: "),
    ],
)
def test_tokens_of_a_chat_are_as_its_template_writes_it(
    client: OpenAI, options: dict[str, Any], text: str
) -> None:
    tokens = post(client, "/tokenize", messages=HELLO, **options)["tokens"]
    assert post(client, "/detokenize", tokens=tokens)["prompt"] == text


def test_the_tokens_of_a_chat_are_its_prompt(client: OpenAI) -> None:
    answer = chat(client, extra={"return_token_ids": True})
    assert answer.prompt_token_ids == post(client, "/tokenize", messages=HELLO)["tokens"]


def test_a_wrong_request_for_tokens_is_named(client: OpenAI) -> None:
    for body, field in (
        ({"messages": HELLO, "chat_template": "x"}, "chat_template"),
        ({"prompt": "x", "return_token_strings": True}, "return_token_strings"),
    ):
        with pytest.raises(APIStatusError) as caught:
            post(client, "/tokenize", **body)
        assert caught.value.status_code == 400
        assert field in caught.value.message
