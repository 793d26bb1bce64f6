"""What an answer says in the shapes of a chat's message and of the deltas of a stream."""

from typing import Any

from saqqara.cluster.openai.formats.deltas import Answer, AnswerDelta

Json = dict[str, Any]


def message(answer: Answer) -> Json:
    """A whole answer as a message; fields that it has nothing for are left out."""
    shown: Json = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning is not None:
        shown |= _thoughts(answer.reasoning)
    if answer.calls:
        shown["tool_calls"] = [call.json() for call in answer.calls]
    return shown


def delta(new: AnswerDelta) -> Json:
    """What is new; the content is there, if empty, unless there is something else."""
    shown: Json = {}
    if new.content or not new:
        shown["content"] = new.content
    if new.reasoning:
        shown |= _thoughts(new.reasoning)
    if new.calls:
        shown["tool_calls"] = [call.json() for call in new.calls]
    return shown


def _thoughts(text: str) -> Json:
    """Under the name that vLLM had first, and under its later one."""
    return {"reasoning_content": text, "reasoning": text}
