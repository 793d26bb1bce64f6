"""Answers of the HTTP API, in OpenAI's shapes, made from the engine's outputs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saqqara.cluster.request import CompletionOutput, RequestOutput

from .errors import ApiError
from .logprobs import Entry, TextOffsets, chat_logprobs, completion_logprobs
from .tools.reader import PLAIN, AnswerFormat, AnswerReader
from .tools.shapes import delta, message

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What every piece of one answer begins with, and what it shows of the tokens.

    `num_logprobs` are the best tokens beside the sampled one; with `show_token_ids` the answer's
    tokens have their ids, too. `answers` is how the answers to a chat are read.
    """

    id: str
    created: int
    model: str
    is_chat: bool
    num_logprobs: int = 0
    show_token_ids: bool = False
    answers: AnswerFormat = PLAIN

    def json(self, *, is_chunk: bool) -> Json:
        """The fields that come before `choices`."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(slots=True)
class ChoiceProgress:
    """How much of one choice has been sent: characters, tokens, and where the next one begins."""

    num_chars: int = 0
    num_tokens: int = 0
    offsets: TextOffsets = field(default_factory=TextOffsets)
    has_started: bool = False
    has_finished: bool = False
    reader: AnswerReader | None = None  # of a chat


def full_reply(head: ReplyHead, outputs: Sequence[RequestOutput], num_choices: int) -> Json:
    """The answer to a request that is not streamed; `num_choices` is `n`."""
    choices = []
    for place, output in enumerate(outputs):
        for choice in output.outputs:
            index = place * num_choices + choice.index
            logprobs = _logprobs(head, choice.logprobs, TextOffsets())
            content: Json = {"text": choice.text}
            reason: str | None = choice.finish_reason
            if head.is_chat:
                answer = head.answers.read(choice.text)
                content = {"message": message(answer)}
                reason = head.answers.finish_reason(reason, has_calls=bool(answer.calls))
            if head.show_token_ids:
                content["token_ids"] = list(choice.token_ids)
            choices.append(_choice(index, content, logprobs, reason, choice.stop_reason))
    return {**head.json(is_chunk=False), "choices": choices, "usage": usage(outputs)}


def chunk_choice(
    head: ReplyHead, index: int, choice: CompletionOutput, sent: ChoiceProgress
) -> Json | None:
    """What is new of a choice since `sent`, which is brought up to date; None for nothing."""
    text = choice.text[sent.num_chars :]
    logprobs = None
    if choice.logprobs is not None and len(choice.logprobs) > sent.num_tokens:
        logprobs = _logprobs(head, choice.logprobs[sent.num_tokens :], sent.offsets)
    content: Json = {"text": text}
    reason: str | None = choice.finish_reason
    has_news = bool(text)
    if head.is_chat:
        sent.reader = sent.reader or AnswerReader(head.answers)
        new = sent.reader.read(choice.text, is_finished=choice.finished)
        has_news = bool(new)
        role = {} if sent.has_started else {"role": "assistant"}
        content = {"delta": {**role, **delta(new)}}
        reason = head.answers.finish_reason(reason, has_calls=sent.reader.has_calls)
    if not has_news and logprobs is None and not choice.finished:
        return None
    sent.num_chars = len(choice.text)
    sent.num_tokens = len(choice.token_ids)
    sent.has_started = True
    sent.has_finished = choice.finished
    return _choice(index, content, logprobs, reason, choice.stop_reason)


def usage(outputs: Iterable[RequestOutput]) -> Json:
    """Tokens of the prompts (each once) and of all their choices."""
    num_prompt = num_new = 0
    for output in outputs:
        num_prompt += len(output.prompt_token_ids)
        num_new += sum(len(choice.token_ids) for choice in output.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
    }


def check_served(output: RequestOutput) -> None:
    """Raise an `ApiError` if the engine gave a request up."""
    if output.error_code == "computation_failed":
        raise ApiError(500, output.error or "", None, output.error_code)
    if output.error_code == "deadline_exceeded":
        raise deadline_exceeded()
    if output.error is not None:
        raise ApiError(400, output.error, "prompt", "request_too_large")
    if any(choice.finish_reason == "abort" for choice in output.outputs):
        raise ApiError(503, "the server has ended the request", None, "aborted")


def deadline_exceeded() -> ApiError:
    """What a client is told whose request has run out of time.

    OpenAI's clients repeat a request that gets 408; what took too long once would again.
    """
    message = "the answer was not complete within the request's time (timeout_seconds)"
    headers = {"X-Should-Retry": "false"}
    return ApiError(408, message, "timeout_seconds", "deadline_exceeded", headers)


def to_bytes(data: Mapping[str, Any]) -> bytes:
    """Compact JSON."""
    return to_json(data).encode()


def to_json(data: Mapping[str, Any]) -> str:
    """Compact JSON; a number that JSON lacks is a mistake of ours."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _choice(
    index: int,
    content: Json,
    logprobs: Json | None,
    finish_reason: str | None,
    stop_reason: int | str | None,
) -> Json:
    return {
        "index": index,
        **content,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def _logprobs(
    head: ReplyHead, entries: Sequence[Entry] | None, offsets: TextOffsets
) -> Json | None:
    if entries is None:
        return None
    if head.is_chat:
        return chat_logprobs(entries, head.num_logprobs, head.show_token_ids)
    return completion_logprobs(entries, head.num_logprobs, offsets)
