"""The official OpenAI client gets from a real server what the API promises."""

import asyncio
import math
import time
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from support.api_server import MODEL
from support.server import Server

HELLO: Any = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 0}


def complete(client: OpenAI, prompt: Any = "hello", **settings: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **settings)


def chat(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=HELLO, **settings)


def raw(**extra: Any) -> dict[str, Any]:
    return {"extra_body": {"ignore_eos": True, **extra}}


def test_a_completion_has_its_text_reason_and_usage(client: OpenAI) -> None:
    answer = complete(client, max_tokens=7, **raw())
    [choice] = answer.choices
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert choice.finish_reason == "length"
    assert choice.text
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 7, 12)


def test_a_chat_goes_through_the_template(client: OpenAI) -> None:
    answer = chat(client, max_completion_tokens=3, **raw(), **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    templated = complete(client, "user: hello\nassistant: ", max_tokens=3, **raw(), **GREEDY)
    assert answer.choices[0].message.content == templated.choices[0].text
    assert answer.usage.prompt_tokens == len("user: hello\nassistant: ")


def test_prompts_may_be_token_ids(client: OpenAI, server: Server) -> None:
    ids = tokenize(client, server, prompt="hello")["tokens"]
    texts = [complete(client, p, max_tokens=5, **raw(), **GREEDY) for p in ("hello", ids)]
    assert texts[0].choices[0].text == texts[1].choices[0].text


def test_several_prompts_answer_in_order(client: OpenAI) -> None:
    both = complete(client, ["one", "two!"], max_tokens=4, **raw(), temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    for prompt, choice in zip(("one", "two!"), both.choices, strict=True):
        alone = complete(client, prompt, max_tokens=4, **raw(), temperature=0)
        assert choice.text == alone.choices[0].text
    assert both.usage.prompt_tokens == 7


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_stream_adds_up_to_the_answer_and_ends_with_the_usage(
    client: OpenAI, is_chat: bool
) -> None:
    settings = {"max_tokens": 9, **raw(), **GREEDY}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text, reasons, usages = "", [], []
    if is_chat:
        expected = chat(client, **settings).choices[0].message.content
        chunks = list(chat(client, **settings, **options))
        assert chunks[0].choices[0].delta.role == "assistant"
    else:
        expected = complete(client, **settings).choices[0].text
        chunks = list(complete(client, **settings, **options))
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content if is_chat else choice.text
            reasons.append(choice.finish_reason)
        usages.append(chunk.usage)
    assert text == expected
    assert [reason for reason in reasons if reason is not None] == ["length"]
    assert chunks[-1].choices == []
    assert usages[-1].completion_tokens == 9
    assert set(usages[:-1]) == {None}
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_options_has_no_usage(client: OpenAI) -> None:
    chunks = list(complete(client, max_tokens=3, stream=True, **raw()))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_streams_of_several_choices_add_up(client: OpenAI) -> None:
    settings = {"max_tokens": 6, "n": 2, "seed": 5, **raw()}
    whole = [choice.text for choice in complete(client, ["a", "b"], **settings).choices]
    texts = [""] * 4
    for chunk in complete(client, ["a", "b"], stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == whole


async def test_async_streams_run_side_by_side(async_client: AsyncOpenAI) -> None:
    async def one(prompt: str) -> str:
        stream = await async_client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=20, stream=True, **raw(), **GREEDY
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    texts = await asyncio.gather(*(one(p) for p in ("a", "b", "c", "a")))
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


async def test_async_answers_equal_sync_ones(async_client: AsyncOpenAI, client: OpenAI) -> None:
    answer = await async_client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, **raw(), **GREEDY
    )
    expected = chat(client, max_tokens=5, **raw(), **GREEDY)
    assert answer.choices[0].message.content == expected.choices[0].message.content


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    # The bias leaves two letters to choose from, so that the stop string must come.
    bias = {str(letter_id(client, letter)): 100 for letter in "xy"}
    settings = {"max_tokens": 64, "seed": 1, "logit_bias": bias, **raw()}
    whole = complete(client, **settings).choices[0].text
    assert set(whole) == {"x", "y"}
    answer = complete(client, stop=["xyx", "never"], **settings).choices[0]
    assert answer.text == whole[: whole.index("xyx")]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == "xyx"
    streamed = complete(client, stop="xyx", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.text


def test_a_seed_makes_answers_repeat(client: OpenAI) -> None:
    def text(**settings: Any) -> str:
        answer: str = complete(client, max_tokens=16, **settings, **raw()).choices[0].text
        return answer

    assert text(seed=7) == text(seed=7)
    assert text(seed=7) != text(seed=8)
    assert text() != text(), "without a seed every answer is its own"


def test_choices_of_a_request_differ(client: OpenAI) -> None:
    answer = complete(client, n=3, max_tokens=12, seed=3, **raw())
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 36)


def test_completion_logprobs_are_those_of_the_best(client: OpenAI) -> None:
    logprobs = complete(client, max_tokens=4, logprobs=3, **raw(), **GREEDY).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 4
    for token, logprob, best in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert best[token] == logprob == max(best.values()) <= 0
        assert len(best) <= 3  # bytes that are no characters share one name


def test_chat_logprobs_come_in_order_whole_and_streamed(client: OpenAI) -> None:
    settings = {"max_tokens": 4, "logprobs": True, "top_logprobs": 5, **raw(), **GREEDY}
    whole = chat(client, **settings).choices[0].logprobs.content
    assert len(whole) == 4
    for token in whole:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert token.logprob == values[0]
        assert sum(math.exp(value) for value in values) < 1
    streamed = []
    for chunk in chat(client, stream=True, **settings):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == whole


def test_logprobs_without_top_have_the_sampled_token_only(client: OpenAI) -> None:
    content = chat(client, max_tokens=2, logprobs=True, **raw()).choices[0].logprobs.content
    assert [token.top_logprobs for token in content] == [[], []]


@pytest.mark.parametrize("extra", [{"min_p": 1.0}, {"top_k": 1}])
def test_filters_that_leave_one_token_are_greedy(client: OpenAI, extra: dict[str, Any]) -> None:
    greedy = complete(client, max_tokens=10, temperature=0, **raw()).choices[0].text
    filtered = complete(client, max_tokens=10, temperature=1, seed=1, **raw(**extra))
    assert filtered.choices[0].text == greedy


def test_a_bias_of_100_decides(client: OpenAI) -> None:
    bias = {str(letter_id(client, "Q")): 100}
    assert complete(client, max_tokens=5, logit_bias=bias).choices[0].text == "QQQQQ"


def test_penalties_keep_tokens_from_coming_again(client: OpenAI) -> None:
    bias = {str(letter_id(client, letter)): 50 for letter in "pqr"}
    settings = {"max_tokens": 3, "temperature": 0, "logit_bias": bias}
    same = complete(client, **settings, **raw()).choices[0].text
    others = complete(client, presence_penalty=2.0, **settings, **raw(repetition_penalty=5.0))
    assert set(same) <= set("pqr")
    assert sorted(others.choices[0].text) == ["p", "q", "r"]


def test_ignore_eos_goes_on_where_else_the_answer_ends(client: OpenAI) -> None:
    bias = {"0": 100}  # the end token
    assert complete(client, max_tokens=6, logit_bias=bias).usage.completion_tokens == 1
    answer = complete(client, max_tokens=6, logit_bias=bias, **raw())
    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "extra",
    [
        {"retention": {"method": "streaming", "budget": 64}},
        {"retention": "streaming", "budget": 64},
    ],
)
def test_retention_is_chosen_per_request(
    client: OpenAI, server: Server, extra: dict[str, Any]
) -> None:
    """300 tokens at 64 per row: the server's default drops nothing, this request 236 a row."""
    name = 'saqqara:dropped_tokens_total{layer="0",method="streaming"'
    before = server.metric(name)
    complete(client, "x" * 300, max_tokens=2, **raw(**extra))
    wait_for_metric(server, name, before + 2 * (300 - 64))


def wait_for_metric(server: Server, name: str, value: float) -> None:
    """Wait for a counter that is published twice a second."""
    deadline = time.monotonic() + 5
    while server.metric(name) != value:
        assert time.monotonic() < deadline, f"{name} is {server.metric(name)}, not {value}"
        time.sleep(0.05)


def tokenize(client: OpenAI, server: Server, **body: Any) -> Any:
    return client.post(f"{server.url}/tokenize", body=body, cast_to=object)


def letter_id(client: OpenAI, letter: str) -> int:
    """The token id of a letter."""
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    answer: Any = client.post(url, body={"prompt": letter}, cast_to=object)
    [token] = answer["tokens"]
    return int(token)
