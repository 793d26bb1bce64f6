"""Tools and thoughts through the official client, against the server.

A model of random weights calls no tool by itself: a grammar makes it, by `tool_choice`, or because
`structured_outputs` gives it its answer word for word.
"""

import json
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI, pydantic_function_tool
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel, Field
from support.api_server import MODEL
from support.tool_models import CALL, CLOCK, NAMED, PARIS, WEATHER, answering

Json = dict[str, Any]
USER: Any = {"role": "user", "content": "Paris?"}
ONE = [("weather", PARIS)]


def settings(**fields: Any) -> Any:
    """Arguments of a call of the client; what it has no field for goes beside."""
    beside = {name: fields.pop(name) for name in BESIDE if name in fields}
    usual = {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 400}
    return {**usual, **fields, "extra_body": beside}


BESIDE = ("structured_outputs", "include_reasoning", "chat_template_kwargs", "ignore_eos")


def ask(client: OpenAI, **fields: Any) -> Any:
    """The first choice of an answer."""
    return client.chat.completions.create(**settings(**fields)).choices[0]


def calls(choice: Any) -> list[tuple[str, str]]:
    found = choice.message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in found]


def streamed(client: OpenAI, **fields: Any) -> tuple[Any, list[str]]:
    """The choice that the client's own helper makes of a stream, and pieces of arguments."""
    with client.chat.completions.stream(**settings(**fields)) as stream:
        pieces = [
            event.arguments_delta
            for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        return stream.get_final_completion().choices[0], pieces


# What the model writes


def test_an_answer_without_calls(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], **answering("Nice."))
    assert (choice.message.content, choice.message.tool_calls) == ("Nice.", None)
    assert choice.finish_reason == "stop"


def test_a_call(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], **answering(CALL))
    assert calls(choice) == ONE
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert choice.message.tool_calls[0].id.startswith("call_")
    assert choice.message.tool_calls[0].type == "function"


def test_text_beside_a_call(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], tool_choice="auto", **answering(f"I look.\n{CALL}"))
    assert (choice.message.content, calls(choice)) == ("I look.", ONE)


def test_several_calls(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], **answering(f"{CALL}\n{CALL}"))
    assert calls(choice) == 2 * ONE
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_one_call_where_several_are_not_wanted(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], parallel_tool_calls=False, **answering(CALL + CALL))
    assert calls(choice) == ONE


def test_no_call_is_read_where_none_is_wanted(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], tool_choice="none", **answering(CALL))
    assert (choice.message.content, choice.message.tool_calls) == (CALL, None)


def test_what_is_no_call_stays_content(client: OpenAI) -> None:
    text = '<tool_call>{"city": "Paris"}</tool_call>'
    choice = ask(client, tools=[WEATHER], **answering(text))
    assert (choice.message.content, choice.finish_reason) == (text, "stop")


def test_a_call_that_is_cut(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], **{**answering(CALL), "max_tokens": len(CALL) - 20})
    assert choice.finish_reason == "length"
    assert PARIS.startswith(calls(choice)[0][1])


def test_each_answer_has_its_calls(client: OpenAI) -> None:
    answer = client.chat.completions.create(**settings(tools=[WEATHER], n=2, **answering(CALL)))
    assert [calls(choice) for choice in answer.choices] == [ONE, ONE]


def test_logprobs_are_those_of_all_tokens(client: OpenAI) -> None:
    fields = settings(tools=[WEATHER], logprobs=True, **answering(CALL))
    answer = client.chat.completions.create(**fields)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in entries).startswith(CALL)


def test_a_streamed_call(client: OpenAI) -> None:
    choice, pieces = streamed(client, tools=[WEATHER], **answering(f"I look. {CALL}"))
    assert (choice.message.content, calls(choice)) == ("I look.", ONE)
    assert choice.finish_reason == "tool_calls"
    assert "".join(pieces) == PARIS


def test_several_streamed_calls(client: OpenAI) -> None:
    choice, _ = streamed(client, tools=[WEATHER], **answering(f"{CALL}\n{CALL}\n"))
    assert calls(choice) == 2 * ONE
    assert not choice.message.content


def test_chunks_as_libraries_read_them(client: OpenAI) -> None:
    """LangChain and LiteLLM add up pieces by their index and take id and name from the first."""
    fields = settings(tools=[WEATHER, CLOCK], stream=True, **answering(CALL))
    fields["stream_options"] = {"include_usage": True}
    chunks = list(client.chat.completions.create(**fields))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens >= len(CALL)
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, [delta.role for delta in deltas[1:]]) == (
        "assistant",
        [None] * (len(deltas) - 1),
    )
    pieces = [call for delta in deltas for call in delta.tool_calls or []]
    assert {call.index for call in pieces} == {0}
    assert [bool(call.id) for call in pieces] == [True] + [False] * (len(pieces) - 1)
    assert pieces[0].function.name == "weather"
    assert "".join(call.function.arguments for call in pieces) == PARIS


async def test_a_call_for_asyncio(async_client: AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(
        **settings(tools=[WEATHER], **answering(CALL))
    )
    assert calls(answer.choices[0]) == ONE


# What the client wants


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_required_call(client: OpenAI, seed: int) -> None:
    choice = ask(
        client,
        tools=[WEATHER, CLOCK],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1,
        seed=seed,
    )
    ((name, arguments),) = calls(choice)
    assert set(json.loads(arguments)) <= {"weather": {"city", "days"}, "clock": set()}[name]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


def test_a_required_call_that_is_streamed(client: OpenAI) -> None:
    fields: Json = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 4}
    whole = ask(client, tools=[WEATHER], temperature=1, **fields)
    choice, pieces = streamed(client, tools=[WEATHER], temperature=1, **fields)
    assert calls(choice) == calls(whole)
    assert "".join(pieces) == calls(whole)[0][1]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_named_call(client: OpenAI, seed: int) -> None:
    choice = ask(client, tools=[WEATHER, CLOCK], tool_choice=NAMED, temperature=1, seed=seed)
    ((name, arguments),) = calls(choice)
    assert name == "weather"
    assert isinstance(json.loads(arguments)["city"], str)
    assert choice.finish_reason == "stop"  # as OpenAI's


def test_a_named_call_that_is_streamed(client: OpenAI) -> None:
    choice, pieces = streamed(client, tools=[WEATHER], tool_choice=NAMED, temperature=1, seed=1)
    assert "city" in json.loads("".join(pieces))
    assert choice.finish_reason == "stop"


def test_of_allowed_tools_one_is_called(client: OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice = ask(
        client,
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        parallel_tool_calls=False,
    )
    assert [name for name, _ in calls(choice)] == ["clock"]


class Forecast(BaseModel):
    """The weather to come."""

    city: str = Field(max_length=4)
    unit: Literal["C", "F"]


def test_the_client_parses_arguments(client: OpenAI) -> None:
    """With the tool that it makes of a class, which is strict and has its schema."""
    tool = pydantic_function_tool(Forecast)
    choice = {"type": "function", "function": {"name": "Forecast"}}
    fields = settings(tools=[tool], tool_choice=choice, temperature=1, seed=5)
    answer: Any = client.chat.completions.parse(**fields)
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Forecast)


# Conversations


def test_a_conversation_goes_on_with_the_clients_own_message(client: OpenAI) -> None:
    message: Any = ask(client, tools=[WEATHER], **answering(CALL)).message
    call_id = message.tool_calls[0].id
    assert isinstance(message, ChatCompletionMessage)
    result = {"role": "tool", "tool_call_id": call_id, "content": "sunny"}
    choice = ask(
        client, tools=[WEATHER], messages=[USER, message, result], **answering("It is sunny.")
    )
    assert choice.message.content == "It is sunny."


LANGCHAIN = {
    "content": None,
    "role": "assistant",
    "tool_calls": [
        {"type": "function", "id": "a", "function": {"name": "weather", "arguments": PARIS}}
    ],
}
LITELLM = {
    "content": "I look.",
    "role": "assistant",
    "tool_calls": [
        {"function": {"arguments": PARIS, "name": "weather"}, "id": "a", "type": "function"}
    ],
    "function_call": None,
    "provider_specific_fields": None,
}


@pytest.mark.parametrize("message", [LANGCHAIN, LITELLM], ids=["LangChain", "LiteLLM"])
def test_messages_as_libraries_write_them(client: OpenAI, message: Json) -> None:
    result = {"role": "tool", "tool_call_id": "a", "name": "weather", "content": "sunny"}
    choice = ask(
        client,
        messages=[USER, message, result],
        tools=[WEATHER],
        parallel_tool_calls=True,
        **answering("It is sunny."),
    )
    assert choice.message.content == "It is sunny."


def test_the_prompt_has_tools_calls_and_results(client: OpenAI) -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": "sunny"}
    root = str(client.base_url).removesuffix("/v1/")
    body = {"messages": [USER, LANGCHAIN, result], "tools": [WEATHER]}
    ids = json.loads(client.post(f"{root}/tokenize", body=body, cast_to=str))["tokens"]
    text = json.loads(client.post(f"{root}/detokenize", body={"tokens": ids}, cast_to=str))
    assert text["prompt"] == (
        f"tools: {json.dumps([WEATHER])}\nuser: Paris?\n"
        "assistant: <tool_call>weather Paris</tool_call>\ntool: sunny\nassistant: "
    )


# Thoughts

THINKING = {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 6, "ignore_eos": True}


def test_thoughts_that_the_prompt_begins(client: OpenAI) -> None:
    message = ask(client, **THINKING).message
    assert message.reasoning_content == message.reasoning != ""
    assert message.content is None
    assert ask(client, **{**THINKING, "chat_template_kwargs": {}}).message.content


def test_streamed_thoughts(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(**settings(stream=True, **THINKING)))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    text = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert text == ask(client, **THINKING).message.reasoning_content
    assert not any(delta.content for delta in deltas)


def test_thoughts_that_are_not_wanted(client: OpenAI) -> None:
    message = ask(client, include_reasoning=False, **THINKING).message
    assert not hasattr(message, "reasoning_content")
    assert not message.content


# What is wrong


def tool(**function: Any) -> Json:
    return {"type": "function", "function": function}


def calling(**function: Any) -> list[Any]:
    call = {"id": "a", "type": "function", "function": {"name": "weather", **function}}
    return [USER, {"role": "assistant", "tool_calls": [call]}]


ERRORS: dict[str, tuple[Json, str]] = {
    "a built-in tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a name of two words": ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
    "a name that is there": ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
    "parameters of text": (
        {"tools": [tool(name="a", parameters={"type": "string"})]},
        "tools[0].function.parameters",
    ),
    "too many tools": ({"tools": [tool(name=f"t{i}") for i in range(129)]}, "tools"),
    "a choice that is none": ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice"),
    "a choice of another": ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice"),
    "a choice of nothing": ({"tool_choice": "required"}, "tool_choice"),
    "a form beside": (
        {
            "tools": [CLOCK],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "tool_choice",
    ),
    "a keyword that cannot be held": (
        {
            "tools": [tool(name="a", parameters={"type": "object", "not": {}})],
            "tool_choice": "required",
        },
        "tools",
    ),
    "the earlier form": ({"functions": [{"name": "a"}]}, "functions"),
    "broken arguments": (
        {"messages": calling(arguments="{")},
        "messages[1].tool_calls[0].function.arguments",
    ),
    "arguments that are a list": (
        {"messages": calling(arguments="[]")},
        "messages[1].tool_calls[0].function.arguments",
    ),
    "a result of no call": (
        {"messages": [USER, {"role": "tool", "content": "x"}]},
        "messages[1].tool_call_id",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_field(client: OpenAI, name: str) -> None:
    fields, param = ERRORS[name]
    with pytest.raises(BadRequestError) as caught:
        ask(client, **fields)
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")
    assert param.partition(".")[0] in str(caught.value)
