"""Tool calls and thoughts in replies and streams, as the official client's types have them."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from saqqara.cluster.openai.events import event_stream
from saqqara.cluster.openai.replies import ReplyHead, full_reply
from saqqara.cluster.openai.tools.choice import read_tool_use
from saqqara.cluster.openai.tools.reader import AnswerFormat
from saqqara.cluster.openai.tools.style import ChatStyle
from saqqara.cluster.outcome import FinishReason
from saqqara.cluster.request import CompletionOutput, RequestMetrics, RequestOutput

Json = dict[str, Any]
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
HERMES = ChatStyle.of("<tool_call> </think>", "auto", "auto").answer_format(
    read_tool_use([TOOL], "auto", None)
)


def head(answers: AnswerFormat) -> ReplyHead:
    return ReplyHead("chatcmpl-1", 1, "m", is_chat=True, answers=answers)


def output(text: str, reason: FinishReason | None = None) -> RequestOutput:
    """What there is of an answer, a token for each character."""
    choice = CompletionOutput(0, text, tuple(range(len(text))), finish_reason=reason)
    return RequestOutput("r", None, (1, 2), (choice,), reason is not None, RequestMetrics(0.0))


def reply(text: str, answers: AnswerFormat = HERMES, reason: FinishReason = "stop") -> Json:
    """The whole reply, which the client's types take."""
    data = full_reply(head(answers), [output(text, reason)])
    ChatCompletion.model_validate(data, strict=True)
    (choice,) = data["choices"]
    return dict(choice)


def stream(pieces: list[str], answers: AnswerFormat = HERMES) -> list[Json]:
    """The choices of a stream's events, which the client's types take."""

    async def outputs() -> AsyncIterator[tuple[int, RequestOutput]]:
        text = ""
        for piece in pieces:
            text += piece
            yield 0, output(text)
        yield 0, output(text, "stop")

    async def collect() -> list[Json]:
        choices: list[Json] = []
        async for data in event_stream(head(answers), outputs(), include_usage=False):
            for line in data.decode().split("\n\n"):
                if line and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    ChatCompletionChunk.model_validate(event, strict=True)
                    choices += event["choices"]
        return choices

    return asyncio.run(collect())


def test_a_call_is_a_part_of_the_message() -> None:
    choice = reply(f"I look.\n{CALL}")
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["role"], message["content"]) == ("assistant", "I look.")
    (call,) = message["tool_calls"]
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Zürich"}'},
    }


def test_a_message_of_calls_alone_has_no_content() -> None:
    assert reply(CALL)["message"]["content"] is None
    assert reply("Hello")["message"] == {"role": "assistant", "content": "Hello", "refusal": None}


def test_an_answer_that_was_cut_says_so() -> None:
    choice = reply(CALL[:-20], reason="length")
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city": ')


def test_thoughts_have_both_names() -> None:
    message = reply("<think>\nhm\n</think>\n\nYes")["message"]
    assert (message["reasoning_content"], message["reasoning"]) == ("hm", "hm")
    assert message["content"] == "Yes"
    hidden = reply("<think>hm</think>Yes", replace(HERMES, shows_thoughts=False))["message"]
    assert hidden == {"role": "assistant", "content": "Yes", "refusal": None}


@pytest.mark.parametrize(
    ("choice", "text", "reason"),
    [
        ("required", '[{"name": "weather", "parameters": {}}]', "tool_calls"),
        (TOOL, '{"city": "Bern"}', "stop"),  # as OpenAI has it where the function is named
    ],
)
def test_a_call_that_was_asked_for_ends_as_with_openai(choice: Any, text: str, reason: str) -> None:
    answers = ChatStyle().answer_format(read_tool_use([TOOL], choice, None))
    found = reply(text, answers)
    assert found["finish_reason"] == reason
    assert len(found["message"]["tool_calls"]) == 1
    assert stream(list(text), answers)[-1]["finish_reason"] == reason


def test_a_stream_of_calls_adds_up_to_the_message() -> None:
    text = f"<think>hm</think>I look.\n{CALL}\n{CALL}"
    choices = stream(list(text))
    deltas = [choice["delta"] for choice in choices]
    assert [delta.get("role") for delta in deltas][:2] == ["assistant", None]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index in (0, 1):
        own = [call for call in calls if call["index"] == index]
        assert own[0]["id"].startswith("call_")
        assert (own[0]["type"], own[0]["function"]["name"]) == ("function", "weather")
        assert not any("id" in call for call in own[1:])
        arguments = "".join(call["function"]["arguments"] for call in own)
        assert arguments == '{"city": "Zürich"}'
    assert [choice["finish_reason"] for choice in choices][-2:] == [None, "tool_calls"]


def test_nothing_is_sent_while_nothing_is_certain() -> None:
    assert [c["delta"].get("content") for c in stream(["Hi", "<tool_", "call>", " no"])] == [
        "Hi",
        "<tool_call> no",
        "",
    ]
