"""Answers of the HTTP API, in OpenAI's shapes, made from the engine's outputs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from saqqara.cluster.outcome import KVUsage
from saqqara.cluster.request import CompletionOutput, RequestOutput

from .errors import ApiError
from .logprobs import (
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from .shown import ANSWER_ONLY, Shown
from .tools.reader import PLAIN, AnswerFormat, AnswerReader
from .tools.shapes import delta, message

Json = dict[str, Any]

MANY_LOGPROBS = 2_000  # more take milliseconds to spell and write
_PIECE_ITEMS = 256  # of a list that is encoded at once


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What every piece of one answer begins with, and what it shows of the tokens.

    `answers` is how the answers to a chat are read.
    """

    id: str
    created: int
    model: str
    is_chat: bool
    shown: Shown = ANSWER_ONLY
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


def full_reply(head: ReplyHead, outputs: Sequence[RequestOutput]) -> Json:
    """The answer to a request that is not streamed."""
    shown, choices = head.shown, []
    for place, output in enumerate(outputs):
        for choice in shown.choices(output.outputs):
            index = place * shown.num_choices + choice.index
            progress = ChoiceProgress()
            logprobs = _logprobs(head, output, choice, progress)
            text = (output.prompt or "") + choice.text if shown.echo else choice.text
            content: Json = {"text": text}
            reason: str | None = choice.finish_reason
            if head.is_chat:
                answer = head.answers.read(text)
                content = {"message": message(answer)}
                reason = head.answers.finish_reason(reason, has_calls=bool(answer.calls))
            if shown.token_ids:
                content["token_ids"] = list(choice.token_ids)
            if not head.is_chat:
                content |= _of_prompt(head, output)
            choices.append(_choice(index, content, logprobs, reason, choice.stop_reason))
    reply = {**head.json(is_chunk=False), "choices": choices, "usage": usage(outputs, shown)}
    return {**reply, **_of_prompt(head, outputs[0])} if head.is_chat else reply


def chunk_choice(
    head: ReplyHead,
    index: int,
    output: RequestOutput,
    choice: CompletionOutput,
    sent: ChoiceProgress,
) -> Json | None:
    """What is new of a choice since `sent`, which is brought up to date; None for nothing."""
    shown, choice = head.shown, head.shown.choice(choice)
    if _waits_for_prompt(shown, output) and not sent.has_started:
        return None
    text = choice.text[sent.num_chars :]
    if shown.echo and not sent.has_started:
        text = (output.prompt or "") + text
    new_ids = choice.token_ids[sent.num_tokens :]
    logprobs = None
    if new_ids or (shown.echo and not sent.has_started):
        logprobs = _logprobs(head, output, choice, sent)
    has_ids = shown.token_ids and bool(new_ids)
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
    if not has_news and logprobs is None and not choice.finished and not has_ids:
        return None
    if shown.token_ids:
        content["token_ids"] = list(new_ids)
    if shown.prompt_token_ids and not head.is_chat and not sent.has_started:
        content["prompt_token_ids"] = list(output.prompt_token_ids)
    sent.num_chars = len(choice.text)
    sent.num_tokens = len(choice.token_ids)
    sent.has_started = True
    sent.has_finished = choice.finished
    return _choice(index, content, logprobs, reason, choice.stop_reason)


def usage(outputs: Iterable[RequestOutput], shown: Shown = ANSWER_ONLY) -> Json:
    """Tokens of the prompts (each once, and those not computed) and of all their choices.

    Once all have finished, also how many keys and values they kept, and would have kept in full.
    """
    num_prompt = num_new = num_cached = 0
    kept: KVUsage | None = KVUsage()
    for output in outputs:
        num_prompt += len(output.prompt_token_ids)
        num_cached += output.num_cached_tokens
        num_new += sum(len(shown.choice(choice).token_ids) for choice in output.outputs)
        kept = kept + output.kv_cache if kept and output.kv_cache else None
    counts: Json = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    return counts if kept is None else {**counts, "kv_cache": asdict(kept)}


def check_served(output: RequestOutput) -> None:
    """Raise an `ApiError` if the engine gave a request up."""
    if output.error_code == "computation_failed":
        raise ApiError(500, output.error or "", None, output.error_code)
    if output.error_code == "constraint_failed":
        message = output.error or ""
        raise ApiError(400, message, ApiError.rejected(message).param, output.error_code)
    if output.error_code == "deadline_exceeded":
        raise deadline_exceeded()
    if output.error is not None:
        raise ApiError(400, output.error, "prompt", "request_too_large")
    if any(choice.finish_reason == "abort" for choice in output.outputs):
        raise ApiError(503, "the server has ended the request", None, "aborted")


def in_pieces(data: Any) -> Iterator[bytes]:
    """The JSON of `to_bytes` a little at a time: while it encodes, no other thread can run."""
    if isinstance(data, Mapping) and data:
        for place, (name, value) in enumerate(data.items()):
            yield b"," if place else b"{"
            yield json.dumps(name, ensure_ascii=False, allow_nan=False).encode() + b":"
            yield from in_pieces(value)
        yield b"}"
    elif isinstance(data, list) and len(data) > _PIECE_ITEMS:
        for start in range(0, len(data), _PIECE_ITEMS):
            yield b"," if start else b"["
            yield to_json(data[start : start + _PIECE_ITEMS])[1:-1].encode()
        yield b"]"
    elif isinstance(data, list) and data:
        for place, value in enumerate(data):
            yield b"," if place else b"["
            yield from in_pieces(value)
        yield b"]"
    else:
        yield to_json(data).encode()


def num_logprobs(outputs: Iterable[RequestOutput]) -> int:
    """How many log-probabilities there are in outputs, of prompts and answers."""
    count = 0
    for output in outputs:
        kinds = [output.prompt_logprobs, *(choice.logprobs for choice in output.outputs)]
        for entries in kinds:
            count += len(entries) * len(entries[-1] or ()) if entries else 0
    return count


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


def to_json(data: Any) -> str:
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


def _of_prompt(head: ReplyHead, output: RequestOutput) -> Json:
    """What is shown of the prompt's tokens."""
    shown = head.shown
    of_prompt: Json = {}
    if shown.prompt_token_ids:
        of_prompt["prompt_token_ids"] = list(output.prompt_token_ids)
    if shown.num_prompt_logprobs is not None and output.prompt_logprobs is not None:
        entries = output.prompt_logprobs
        of_prompt["prompt_logprobs"] = prompt_logprobs(
            entries, shown.num_prompt_logprobs, shown.tokens_as_ids
        )
    return of_prompt


def _waits_for_prompt(shown: Shown, output: RequestOutput) -> bool:
    """Whether the answer begins with log-probabilities that have not come yet."""
    return shown.echo and shown.num_logprobs is not None and output.prompt_logprobs is None


def _logprobs(
    head: ReplyHead, output: RequestOutput, choice: CompletionOutput, sent: ChoiceProgress
) -> Json | None:
    """The log-probabilities of a choice's tokens since `sent`, and of the prompt's before them."""
    shown, count = head.shown, head.shown.num_logprobs
    if count is None or choice.logprobs is None:
        return None
    entries = choice.logprobs[sent.num_tokens :]
    if head.is_chat:
        return chat_logprobs(entries, count, shown.token_ids, shown.tokens_as_ids)
    prompt = output.prompt_logprobs
    if not shown.echo or sent.has_started or prompt is None:
        return completion_logprobs(entries, count, sent.offsets, shown.tokens_as_ids)
    first_id = output.prompt_token_ids[0]
    before = echoed_logprobs(prompt, first_id, count, sent.offsets, shown.tokens_as_ids)
    after = completion_logprobs(entries, count, sent.offsets, shown.tokens_as_ids)
    return {name: items + after[name] for name, items in before.items()}
