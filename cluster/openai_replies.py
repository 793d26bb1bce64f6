"""Answers of the HTTP API, in OpenAI's shapes, made from the engine's outputs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .openai_errors import ApiError
from .request import CompletionOutput, Logprob, RequestOutput
from .tokenizer import BROKEN

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What every piece of one answer begins with, and what it shows of the tokens.

    `num_logprobs` are the best tokens beside the sampled one; with `show_token_ids` the answer's
    tokens have their ids, too.
    """

    id: str
    created: int
    model: str
    is_chat: bool
    num_logprobs: int = 0
    show_token_ids: bool = False

    def json(self, *, is_chunk: bool) -> Json:
        """The fields that come before `choices`."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(slots=True)
class ChoiceProgress:
    """How much of one choice has been sent: characters, tokens, and characters of its tokens."""

    num_chars: int = 0
    num_tokens: int = 0
    text_offset: int = 0
    has_started: bool = False
    has_finished: bool = False


def full_reply(head: ReplyHead, outputs: Sequence[RequestOutput], num_choices: int) -> Json:
    """The answer to a request that is not streamed; `num_choices` is `n`."""
    choices = []
    for place, output in enumerate(outputs):
        for choice in output.outputs:
            index = place * num_choices + choice.index
            logprobs = _logprobs(head, choice.logprobs, 0)
            content: Json = {"text": choice.text}
            if head.is_chat:
                message = {"role": "assistant", "content": choice.text, "refusal": None}
                content = {"message": message}
            if head.show_token_ids:
                content["token_ids"] = list(choice.token_ids)
            choices.append(_choice(index, content, logprobs, choice))
    return {**head.json(is_chunk=False), "choices": choices, "usage": usage(outputs)}


def chunk_choice(
    head: ReplyHead, index: int, choice: CompletionOutput, sent: ChoiceProgress
) -> Json | None:
    """What is new of a choice since `sent`, which is brought up to date; None for nothing."""
    text = choice.text[sent.num_chars :]
    logprobs = None
    if choice.logprobs is not None and len(choice.logprobs) > sent.num_tokens:
        fresh = choice.logprobs[sent.num_tokens :]
        logprobs = _logprobs(head, fresh, sent.text_offset)
        sent.text_offset += sum(len(_chosen(entry)[1].decoded_token or "") for entry in fresh)
    if not text and logprobs is None and not choice.finished:
        return None
    content: Json = {"text": text}
    if head.is_chat:
        role = {} if sent.has_started else {"role": "assistant"}
        content = {"delta": {**role, "content": text}}
    sent.num_chars = len(choice.text)
    sent.num_tokens = len(choice.token_ids)
    sent.has_started = True
    sent.has_finished = choice.finished
    return _choice(index, content, logprobs, choice)


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
    if output.error is not None:
        raise ApiError(400, output.error, "prompt", "request_too_large")
    if any(choice.finish_reason == "abort" for choice in output.outputs):
        raise ApiError(503, "the server has ended the request", None, "aborted")


def to_bytes(data: Mapping[str, Any]) -> bytes:
    """Compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _choice(index: int, content: Json, logprobs: Json | None, choice: CompletionOutput) -> Json:
    return {
        "index": index,
        **content,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _logprobs(
    head: ReplyHead, entries: Sequence[Mapping[int, Logprob]] | None, text_offset: int
) -> Json | None:
    if entries is None:
        return None
    count = head.num_logprobs
    if head.is_chat:
        content = [_chat_entry(entry, count, head.show_token_ids) for entry in entries]
        return {"content": content, "refusal": None}
    chosen = [_chosen(entry)[1] for entry in entries]
    offsets = []
    for token in chosen:
        offsets.append(text_offset)
        text_offset += len(token.decoded_token or "")
    return {
        "tokens": [token.decoded_token for token in chosen],
        "token_logprobs": [token.logprob for token in chosen],
        "top_logprobs": [
            {token.decoded_token: token.logprob for token in _best(entry, count)}
            for entry in entries
        ],
        "text_offset": offsets,
    }


def _chat_entry(entry: Mapping[int, Logprob], count: int, show_token_id: bool) -> Json:
    token_id, token = _chosen(entry)
    return {
        **_chat_token(token),
        **({"token_id": token_id} if show_token_id else {}),
        "top_logprobs": [_chat_token(token) for token in _best(entry, count)],
    }


def _chat_token(token: Logprob) -> Json:
    text = token.decoded_token or ""
    # A token that is a part of a character has no text of its own.
    data = None if BROKEN in text else list(text.encode())
    return {"token": text, "logprob": token.logprob, "bytes": data}


def _chosen(entry: Mapping[int, Logprob]) -> tuple[int, Logprob]:
    """The sampled token, which comes first."""
    return next(iter(entry.items()))


def _best(entry: Mapping[int, Logprob], count: int) -> list[Logprob]:
    """The `count` best tokens in order; the sampled one only if it is among them."""
    best = [(token.rank, token) for token in entry.values() if token.rank is not None]
    return [token for rank, token in sorted(best, key=lambda pair: pair[0]) if rank <= count]
