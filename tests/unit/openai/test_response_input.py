"""What a request for a response asks for, as a chat; and what is wrong, named where it stands."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.responses.conversation import messages_of, without_oldest
from saqqara.cluster.openai.responses.items import (
    MAX_ITEMS,
    FunctionCall,
    FunctionCallOutput,
    Item,
    Message,
)
from saqqara.cluster.openai.responses.request import LOGPROBS, MAX_METADATA, read_response

Json = dict[str, Any]
FUNCTION = {"type": "function", "name": "f", "parameters": {}}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def chat(**fields: Any) -> Json:
    """The chat of a request beside its defaults."""
    read = read_response({"model": "m", "input": "hi", **fields})
    return read.chat().model_dump(exclude_none=True)


def messages(*items: Json, **fields: Any) -> list[Json]:
    """The messages of a chat, without a check of what chats may have."""
    read = read_response({"model": "m", "input": list(items), **fields})
    return messages_of(read.instructions, read.items)


def test_an_input_is_a_message_of_the_user_after_the_instructions() -> None:
    assert chat(instructions="Be brief.", max_output_tokens=3) == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, user("hi")],
        "max_completion_tokens": 3,
    }


def test_what_the_model_said_at_one_go_is_one_message() -> None:
    thoughts: Json = {"type": "reasoning", "id": "rs_1", "summary": []}
    thoughts["content"] = [{"type": "reasoning_text", "text": "hm"}]
    part: Json = {"type": "output_text", "text": "Wait.", "annotations": [], "logprobs": None}
    said = {"type": "message", "id": "msg_1", "role": "assistant", "content": [part]}
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "4"}
    assert messages(user("a"), thoughts, said, call, result) == [
        user("a"),
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]


def test_what_it_said_twice_is_two_messages() -> None:
    said = {"role": "assistant", "content": "x"}
    thoughts = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    assert messages(said, said) == [said, said]
    found = messages(call, thoughts, said)
    assert [sorted(message) for message in found] == [
        ["content", "role", "tool_calls"],
        ["content", "reasoning_content", "role"],
    ]


def test_parts_are_joined_and_the_developer_speaks_for_the_system() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    given = {"type": "message", "role": "developer", "content": parts}
    assert messages(given) == [{"role": "system", "content": "a\nb"}]


def test_a_refusal_is_what_the_assistant_said() -> None:
    part = {"type": "refusal", "refusal": "no"}
    said = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert messages(user("a"), said)[1] == {"role": "assistant", "content": "no"}


def test_what_openai_says_by_default_is_taken() -> None:
    direct: Json = {"caller": {"type": "direct"}, "namespace": None}
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "4"}
    given = [{**call, **direct, "async": False}, {**result, **direct, "name": "f"}]
    assert messages(*given) == messages(call, result)
    more = {"defer_loading": False, "allowed_callers": ["direct"], "async": False}
    assert chat(tools=[{**FUNCTION, **more}]) == chat(tools=[FUNCTION])


def test_log_probabilities_and_the_format_are_those_of_chats() -> None:
    asked = chat(include=[LOGPROBS], top_logprobs=3, text={"format": {"type": "text"}})
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 3)
    assert "response_format" not in asked
    assert "top_logprobs" not in chat(include=["reasoning.encrypted_content"])


def test_of_allowed_tools_the_others_are_not_offered() -> None:
    other = {**FUNCTION, "name": "g", "description": "G."}
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "g"}],
    }
    read = read_response(
        {"model": "m", "input": "hi", "tools": [FUNCTION, other], "tool_choice": allowed}
    )
    assert read.tool_fields() == {
        "tools": [
            {"type": "function", "function": {"name": "g", "description": "G.", "parameters": {}}}
        ],
        "tool_choice": "auto",
    }


def test_a_call_is_dropped_with_its_output() -> None:
    items: list[Item] = [
        FunctionCall(type="function_call", call_id="c1", name="f", arguments="{}"),
        Message(role="user", content="a"),
        FunctionCallOutput(type="function_call_output", call_id="c1", output="1"),
        FunctionCallOutput(type="function_call_output", call_id="c2", output="2"),
    ]
    assert without_oldest(items, 0) == items
    assert without_oldest(items, 1) == [items[1], items[3]]
    assert without_oldest(items, 3) == [items[3]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ...}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [user("a"), {"type": "computer_call"}]}, "input[1]"),
        ({"input": [user("a")] * (MAX_ITEMS + 1)}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "bob", "content": "x"}]}, "input[0].role"),
        ({"input": [{**user("x"), "mood": 1}]}, "input[0].mood"),
        ({"input": [user([{"type": "input_image", "image_url": "x"}])]}, "input[0].content[0]"),
        ({"input": [user([{"type": "input_text", "text": 5}])]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id"),
        ({"input": [{**CALL, "namespace": "n"}]}, "input[0].namespace"),
        ({"input": [{**CALL, "async": True}]}, "input[0].async"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
            "input[0].encrypted_content",
        ),
        ({"inputs": "x"}, "inputs"),
        ({"background_options": {"completion_window": "2h"}}, "background_options"),
        ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"instructions": 5}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [FUNCTION] * 200}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        (
            {
                "tools": [FUNCTION],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "g"}],
                },
            },
            "tool_choice",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"stream_options": {}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            "stream_options.include_usage",
        ),
        ({"metadata": {str(i): "x" for i in range(MAX_METADATA + 1)}}, "metadata"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"truncation": "some"}, "truncation"),
        ({"priority": 2**40}, "priority"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_output_tokens": 1.5}, "max_output_tokens"),
    ],
)
def test_a_wrong_field_is_named(fields: Json, param: str) -> None:
    body = {"model": "m", "input": "hi", **fields}
    with pytest.raises(ApiError) as caught:
        read_response({name: value for name, value in body.items() if value is not ...}).chat()
    assert (caught.value.status, caught.value.param) == (400, param)


TEXT = st.text(max_size=5)
ITEMS = st.lists(
    st.one_of(
        st.builds(user, TEXT),
        st.builds(lambda text: {"role": "assistant", "content": text}, TEXT),
        st.builds(
            lambda call: {"type": "function_call", "call_id": call, "name": "f", "arguments": "{}"},
            st.sampled_from("abc"),
        ),
        st.builds(
            lambda call: {"type": "function_call_output", "call_id": call, "output": "x"},
            st.sampled_from("abc"),
        ),
        st.just({"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}),
    ),
    min_size=1,
    max_size=12,
)


@given(ITEMS)
def test_nothing_that_was_said_is_lost(items: list[Json]) -> None:
    """Every text, call and thought is in the messages once, in its order."""
    expected: list[Any] = []
    for item in items:
        kind = item.get("type")
        if kind == "function_call":
            expected.append(("call", item["call_id"]))
        elif kind == "function_call_output":
            expected.append(("output", item["call_id"]))
        elif kind == "reasoning":
            expected.append(("thought", "hm"))
        elif item["content"]:
            expected.append((item["role"], item["content"]))
    found: list[Any] = []
    for message in messages(*items):
        if "reasoning_content" in message:
            found.append(("thought", message["reasoning_content"]))
        if message["role"] == "tool":
            found.append(("output", message["tool_call_id"]))
        elif message["content"]:
            found.append((message["role"], message["content"]))
        found += [("call", call["id"]) for call in message.get("tool_calls", ())]
    assert found == expected
