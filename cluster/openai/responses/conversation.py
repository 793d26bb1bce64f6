"""From the items of an `input` to the messages of a chat."""

from collections.abc import Sequence
from typing import Any

from .items import FunctionCall, FunctionCallOutput, Item, Message, Reasoning, plain

Json = dict[str, Any]


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[Json]:
    """The messages of a chat, in order, the instructions first.

    What the model said at one go, thoughts, a text and calls, is one message of the assistant, as
    chat templates have it. Messages of the developer are those of the system.
    """
    messages: list[Json] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    answer: Json | None = None  # the assistant's message that may go on
    for item in items:
        if isinstance(item, FunctionCallOutput):
            text = plain(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
            answer = None
        elif isinstance(item, Message) and item.role != "assistant":
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": plain(item.content)})
            answer = None
        else:
            if answer is None or not _goes_on(answer, item):
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            _add(answer, item)
    return messages


def without_oldest(items: Sequence[Item], num_dropped: int) -> list[Item]:
    """The items but the oldest; with a call its output goes, too, wherever it stands."""
    gone = {item.call_id for item in items[:num_dropped] if isinstance(item, FunctionCall)}
    return [
        item
        for item in items[num_dropped:]
        if not (isinstance(item, FunctionCallOutput) and item.call_id in gone)
    ]


def _goes_on(answer: Json, item: Message | FunctionCall | Reasoning) -> bool:
    """Whether an item comes after those that the message has: thoughts, text, calls."""
    if isinstance(item, FunctionCall):
        return True
    has_text = bool(answer["content"]) or "tool_calls" in answer
    return not has_text and not (isinstance(item, Reasoning) and "reasoning_content" in answer)


def _add(answer: Json, item: Message | FunctionCall | Reasoning) -> None:
    if isinstance(item, Reasoning):
        answer["reasoning_content"] = item.text
    elif isinstance(item, Message):
        answer["content"] = plain(item.content)
    else:
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        answer.setdefault("tool_calls", []).append(call)
