"""The messages of a conversation, as clients write them."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from saqqara.configs.json_text import parse_json

from .tools import check_tool_name

MAX_CALLS_OF_MESSAGE = 128
_MAX_ID_CHARS = 256
_REASONING = ("reasoning_content", "reasoning")
_FORMER = {
    "function_call": "write tool_calls, OpenAI's later form",
    "role": "write the role 'tool' with a tool_call_id, OpenAI's later form",
}


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check a conversation and return it with plain-text contents.

    Each message is a mapping with `role` and `content`, and maybe `name`. Content is a string, or
    a list of `{"type": "text", "text": ...}` parts, which are joined by line breaks. One of the
    assistant may have `tool_calls`, whose arguments come back as objects (templates want these),
    and `reasoning_content`; its content may then be null. What it refused with, in a part or as
    `refusal` instead of content, is its content. One with the role `tool` has the
    `tool_call_id` that it answers. What comes back may be checked again.

    Raises:
        ValueError: naming the field, e.g. `messages[2].content`.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; it needs at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_content(content: Any, field: str, kinds: Collection[str] = ("text",)) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"{field} must be a string or a list of text parts, not {type(content).__name__}"
        )
    texts = []
    for index, part in enumerate(content):
        name = f"{field}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(part, Mapping) or kind not in kinds:
            raise ValueError(
                f'{name} must be {{"type": "text", "text": ...}}, not of type {kind!r:.80}'
            )
        text = part.get(kind)  # the text of a part has the name of its type
        if not isinstance(text, str):
            raise ValueError(f"{name}.{kind} must be a string, not {text!r:.80}")
        texts.append(text)
    return "\n".join(texts)


def _check_message(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{field} must be a mapping with role and content, not {message!r:.80}")
    if "role" not in message:
        raise ValueError(f"{field}.role is missing")
    role = message["role"]
    more = {  # clients send unset fields along
        key: value
        for key, value in message.items()
        if key != "content" and (key == "role" or value not in (None, [], {}))
    }
    if role == "assistant" and "refusal" in more:
        message = _with_refusal(message, more.pop("refusal"), field)
    checked: dict[str, Any] = {"content": ""}
    is_call = role == "assistant" and bool({"tool_calls", *_REASONING} & more.keys())
    if "content" not in message and not is_call:
        raise ValueError(f"{field}.content is missing")
    if message.get("content") is not None or not is_call:
        kinds = ("text", "refusal") if role == "assistant" else ("text",)
        checked["content"] = _check_content(message["content"], f"{field}.content", kinds)
    for key, value in more.items():
        if key == "type" and value in ("text", "message"):
            continue  # lm-eval and the Responses API mark messages so
        checked_key, checked_value = _check_field(key, value, role, field)
        checked[checked_key] = checked_value
    if role == "tool" and "tool_call_id" not in checked:
        raise ValueError(f"{field}.tool_call_id is missing; it is the id of the call it answers")
    return checked


def _with_refusal(message: Mapping[str, Any], refusal: Any, field: str) -> Mapping[str, Any]:
    """A message of the assistant whose refusal, if there is one, is its content."""
    if not isinstance(refusal, str):
        raise ValueError(f"{field}.refusal must be a string, not {refusal!r:.80}")
    if refusal and message.get("content"):
        raise ValueError(f"{field}.refusal stands in the place of content; give one of them")
    return {**message, "content": refusal} if refusal else message


def _check_field(key: str, value: Any, role: Any, field: str) -> tuple[str, Any]:
    """One more field of a message, as it is handed on."""
    name = f"{field}.{key}"
    if key in ("role", "name"):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} must be a non-empty string, not {value!r:.80}")
        if key == "role" and value == "function":
            raise ValueError(f"{name}: 'function' is not supported; {_FORMER[key]}")
        return key, value
    if key == "tool_calls" and role == "assistant":
        return key, _check_calls(value, name)
    if key in _REASONING and role == "assistant":
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, not {value!r:.80}")
        return _REASONING[0], value
    if key == "tool_call_id" and role == "tool":
        return key, _check_id(value, name)
    hint = _FORMER.get(key, "use role, content and name")
    raise ValueError(f"{name} is not supported; {hint}")


def _check_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{field} must be a list of calls, not {calls!r:.80}")
    if len(calls) > MAX_CALLS_OF_MESSAGE:
        raise ValueError(f"{field}: there may be {MAX_CALLS_OF_MESSAGE} at most, not {len(calls)}")
    return [_check_call(call, f"{field}[{i}]") for i, call in enumerate(calls)]


def _check_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f'{field} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}, '
            f"not {call!r:.80}"
        )
    if call.get("type", "function") != "function":
        raise ValueError(f"{field}.type must be 'function', not {call['type']!r:.80}")
    check_tool_name(function.get("name"), f"{field}.function.name")
    arguments = _check_arguments(function.get("arguments"), f"{field}.function.arguments")
    return {
        "id": _check_id(call.get("id"), f"{field}.id"),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _check_arguments(given: Any, field: str) -> dict[str, Any]:
    """Arguments as an object; clients send it as text."""
    value = given
    if isinstance(given, str):
        try:
            value = parse_json(given) if given.strip() else {}
        except ValueError as error:
            raise ValueError(f"{field} is not JSON: {error}") from None
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} must be a JSON object as text, not {given!r:.80}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field} is not JSON: {error}") from None
    return dict(value)


def _check_id(value: Any, field: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_ID_CHARS:
        raise ValueError(
            f"{field} must be a string of 1 to {_MAX_ID_CHARS} characters, not {value!r:.80}"
        )
    return value
