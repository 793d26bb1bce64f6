"""The input lines of a batch job, checked and turned into requests; no I/O.

Simple lines hold the prompt and any settings side by side:
`{"prompt": "...", "max_tokens": 32}`, `{"messages": [...], "custom_id": "a", "budget": "25%"}`.
OpenAI batch lines wrap a request: `{"custom_id": "a", "method": "POST", "url": ..., "body": ...}`.
Both are read as requests of the HTTP API, with its fields, defaults, bounds and errors.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from saqqara.cluster.chat import check_messages
from saqqara.cluster.openai.batches import (
    CHAT_URL,
    COMPLETIONS_URL,
    check_no_turn,
    check_not_streamed,
    read_custom_id,
    read_url_and_body,
)
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import (
    ChatRequest,
    CompletionRequest,
    check_model,
    read_object,
    read_request,
)
from saqqara.cluster.openai.shown import ANSWER_ONLY, Shown
from saqqara.cluster.openai.tools.reader import PLAIN, AnswerFormat
from saqqara.cluster.openai.tools.reading import ChatReading
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import MAX_CHOICES
from saqqara.compression.retention import Retention
from saqqara.configs.schema import MAX_TIMEOUT_SECONDS, ServerLimits

logger = logging.getLogger(__name__)

URLS = (CHAT_URL, COMPLETIONS_URL)
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
# A server's limits are for its clients; a job's rows are its owner's.
LIMITS = ServerLimits(
    max_n=MAX_CHOICES, max_stop=1024, max_prompts=65536, max_timeout_seconds=MAX_TIMEOUT_SECONDS
)


@dataclass(frozen=True, slots=True)
class BadLine:
    """An input line that is not a request, and why. `url` is None unless it is an OpenAI line."""

    line: int
    custom_id: str | None
    url: str | None
    message: str
    field: str | None = None
    code: str | None = "invalid_value"


@dataclass(frozen=True, slots=True)
class Row:
    """The requests of one input line, one for each prompt. `url` is None for a simple line.

    `names` are what the line calls the fields that the engine's messages name; `answers` is how the
    answers to a chat are read.
    """

    line: int
    custom_id: str | None
    url: str | None
    requests: tuple[Request, ...]
    is_chat: bool = False
    shown: Shown = ANSWER_ONLY
    answers: AnswerFormat = PLAIN
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowParser:
    """Turns input lines into rows.

    Args:
        model: the name that OpenAI bodies may give, besides its last path component.
        sampling: settings of lines that bring none of their own.
        retention: the engine's, for lines that give a budget only.
        served_model_name: another name that OpenAI bodies may give.
        ignore_model: let OpenAI bodies give any name.
        file: the input's name where a job has several: part of the requests' ids, which noise
            follows where no seed is given.
        chats: how the answers to chats are read.
    """

    model: str
    sampling: Mapping[str, Any]
    retention: Retention = field(default_factory=lambda: Retention.parse("full"))
    served_model_name: str | None = None
    ignore_model: bool = False
    file: str | None = None
    chats: ChatReading = field(default_factory=ChatReading)

    def parse(self, line: int, text: str) -> Row | BadLine:
        """One line of input; whatever is wrong with it comes back as a `BadLine`."""
        custom_id: str | None = None
        url: str | None = None
        try:
            data = read_object(text, "the line")
            url = url_of(data)
            custom_id = read_custom_id(data, required=url is not None)
            if url is None:
                return self._simple_row(line, custom_id, data)
            body_url, body = read_url_and_body(data, URLS)
            request = self._request(_given(body), is_chat=body_url == CHAT_URL)
            return self._row(line, custom_id, url, request, {})
        except ApiError as error:
            return BadLine(line, custom_id, url, str(error), error.param, error.code)
        except Exception as error:  # a fault of ours, but no row may end its job
            logger.exception("line %d of the input could not be read", line)
            message = f"the line could not be read: {type(error).__name__}: {error}"
            return BadLine(line, custom_id, url, message, None, "server_error")

    def _simple_row(self, line: int, custom_id: str | None, data: Mapping[str, Any]) -> Row:
        body = {k: v for k, v in _given(data).items() if k != "custom_id"}
        given = [key for key in PROMPT_KEYS if key in body]
        nulls = [key for key in PROMPT_KEYS if key in data and data[key] is None]
        if nulls and not given:
            verb = "is" if len(nulls) == 1 else "are"
            message = f"{' and '.join(nulls)} {verb} null, so the line has no prompt"
            raise _invalid(message, nulls[0])
        if len(given) != 1:
            wanted = " or ".join(repr(key) for key in PROMPT_KEYS)
            found = "none" if not given else " and ".join(repr(key) for key in given)
            message = f"prompt: a line needs exactly one of {wanted}; it has {found}"
            raise _invalid(message, "prompt")
        names: dict[str, str] = {}
        if given == ["prompt_token_ids"]:
            body["prompt"] = _token_list(body.pop("prompt_token_ids"))
            names["prompt"] = "prompt_token_ids"
        is_chat = given == ["messages"]
        if is_chat:
            _split_logprobs(body)
        request = self._request(body, is_chat=is_chat)
        return self._row(line, custom_id, None, request, names)

    def _request(
        self, fields: Mapping[str, Any], *, is_chat: bool
    ) -> ChatRequest | CompletionRequest:
        fields = {"model": self.model, **fields}
        if is_chat:
            return read_request(ChatRequest, fields)
        return read_request(CompletionRequest, fields)

    def _row(
        self,
        line: int,
        custom_id: str | None,
        url: str | None,
        request: ChatRequest | CompletionRequest,
        names: Mapping[str, str],
    ) -> Row:
        if not self.ignore_model:
            check_model(request.model, self._model_names())
        check_not_streamed(request.stream, "a batch job")
        check_no_turn(request.conversation_id)
        request.check_limits(LIMITS)
        request.check_profile()
        sampling = request.sampling_params(self.sampling)
        retention = request.read_retention(self.retention)
        whole = Request(
            request_id=f"line-{line}" if self.file is None else f"{self.file}:{line}",
            sampling_params=sampling,
            retention=retention,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            timeout_seconds=request.timeout_seconds,
            echo=request.shown.echo,
            must_fit=True,
        )
        is_chat, answers = isinstance(request, ChatRequest), PLAIN
        if isinstance(request, ChatRequest):
            answers = self._answers(request)
            whole = replace(whole, visible_tokens=self.chats.style.markers(request.tool_use))
        requests = _one_each(whole, request)
        return Row(
            line,
            custom_id,
            url,
            requests,
            is_chat,
            request.shown,
            answers,
            {**request.names, **names},
        )

    def _answers(self, request: ChatRequest) -> AnswerFormat:
        try:
            return self.chats.answers(
                request.messages,
                request.chat_options(),
                request.tool_use,
                is_held=request.structure is not None,
                shows_thoughts=request.include_reasoning is not False,
            )
        except ValueError as error:
            raise ApiError.of(error) from None

    def _model_names(self) -> list[str]:
        own = [self.model, self.model.rstrip("/").rsplit("/", 1)[-1]]
        return own if self.served_model_name is None else [self.served_model_name, *own]


def url_of(data: Mapping[str, Any]) -> str | None:
    """The endpoint of an OpenAI batch line; None for a simple line."""
    if not any(key in data for key in ("method", "url", "body")):
        return None
    url = data.get("url")
    return url if isinstance(url, str) else ""


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that ask for something: a null asks for nothing."""
    return {key: value for key, value in fields.items() if value is not None}


def _one_each(whole: Request, given: ChatRequest | CompletionRequest) -> tuple[Request, ...]:
    """A line's request, which has all but the prompt, once for each of the prompts given."""
    if isinstance(given, ChatRequest):
        try:
            messages = tuple(check_messages(given.messages))
            return (replace(whole, messages=messages, chat_options=given.chat_options()),)
        except ValueError as error:
            raise ApiError.of(error, "messages") from None
    prompts = given.prompts(LIMITS.max_prompts)
    whole = replace(whole, add_special_tokens=given.add_special_tokens is not False)
    if len(prompts) == 1:
        return (replace(whole, prompt=prompts[0]),)
    return tuple(
        replace(
            whole,
            request_id=f"{whole.request_id}-{place}",
            prompt=prompt,
            sampling_params=whole.sampling_params.for_prompt(place),
        )
        for place, prompt in enumerate(prompts)
    )


def _token_list(value: Any) -> list[int]:
    is_list = isinstance(value, list) and all(type(token) is int for token in value)
    if not is_list or not value:
        raise _invalid(
            f"prompt_token_ids must be a list of token ids, not {value!r:.80}", "prompt_token_ids"
        )
    return list(value)


def _split_logprobs(body: dict[str, Any]) -> None:
    """Let a simple line say `logprobs: 5` for a chat, too, as it does for a prompt."""
    wanted = body.get("logprobs")
    if isinstance(wanted, int) and not isinstance(wanted, bool) and "top_logprobs" not in body:
        body |= {"logprobs": True, "top_logprobs": wanted}


def _invalid(message: str, field: str) -> ApiError:
    return ApiError(400, message, field, "invalid_value")
