"""Responses of a real server with the official client: what it sends and reads."""

from typing import Any

import pytest
from openai import APIStatusError, OpenAI
from support.api_server import MODEL

Json = dict[str, Any]
USER: Json = {"role": "user", "content": "hi"}
SAID: Json = {"role": "assistant", "content": "hello"}
CALL: Json = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT: Json = {"type": "function_call_output", "call_id": "c1", "output": "4"}
PART: Json = {"type": "input_text", "text": "hi"}
TOOL: Json = {"type": "function", "name": "f", "parameters": {"type": "object"}}
SCHEMA: Json = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
SCHEMA |= {"additionalProperties": False}
FORMAT: Json = {"type": "json_schema", "name": "box", "schema": SCHEMA, "strict": True}

ANSWERED: dict[str, Json] = {
    "a text": {},
    "instructions": {"instructions": "Be brief."},
    "a message": {"input": [USER]},
    "parts": {"input": [{"role": "user", "content": [PART, PART]}]},
    "a message of the developer": {"input": [{"role": "developer", "content": "x"}, USER]},
    "a turn before": {"input": [USER, SAID, USER]},
    "a call and its output": {"input": [USER, CALL, RESULT]},
    "sampling": {"temperature": 0.5, "top_p": 0.9},
    "a schema": {"text": {"format": FORMAT}, "max_output_tokens": 40},
    "any object": {"text": {"format": {"type": "json_object"}}},
    "tools that are not called": {"tools": [TOOL], "tool_choice": "none"},
    "metadata": {"metadata": {"a": "b"}, "user": "u", "service_tier": "auto"},
    "store": {"store": True},
    "truncation": {"truncation": "auto"},
    "our own fields": {"extra_body": {"retention": "snapkv", "budget": 64, "seed": 1}},
    "log-probabilities": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
}
REFUSED: dict[str, tuple[Json, str]] = {
    "a response before": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "the background": ({"background": True}, "background"),
    "a built-in tool": ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0]",
    ),
    "an item of another type": ({"input": [{"type": "computer_call"}]}, "input[0]"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "too hot": ({"temperature": -1}, "temperature"),
    "best tokens alone": ({"top_logprobs": 3}, "top_logprobs"),
    "no schema": ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
}


def ask(client: OpenAI, **fields: Any) -> Any:
    asked = {"model": MODEL, "input": "hi", "max_output_tokens": 4, **fields}
    return client.responses.create(**asked)


@pytest.mark.parametrize("name", ANSWERED)
def test_it_is_answered(client: OpenAI, name: str) -> None:
    answer = ask(client, **ANSWERED[name])
    assert answer.status in ("completed", "incomplete")
    assert answer.output[0].type == "message"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(client: OpenAI, name: str) -> None:
    fields, param = REFUSED[name]
    with pytest.raises(APIStatusError) as caught:
        ask(client, **fields)
    assert (caught.value.status_code, getattr(caught.value, "param", None)) == (400, param)


def test_it_is_streamed(client: OpenAI) -> None:
    events = list(ask(client, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    whole = ask(client, temperature=0)
    assert "".join(deltas) == events[-1].response.output_text == whole.output_text


def test_no_response_is_kept(client: OpenAI) -> None:
    answer = ask(client, store=True)
    with pytest.raises(APIStatusError) as caught:
        client.responses.retrieve(answer.id)
    assert caught.value.status_code == 404
