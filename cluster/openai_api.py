"""Requests of the HTTP API as clients write them, and how a wrong one is answered.

Names and meaning are OpenAI's; beyond those there are vLLM's sampling extensions and our own
`retention` and `budget`. Fields that are neither are errors, so that nothing is dropped silently.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saqqara.configs.schema import ServerLimits
from saqqara.configs.yaml_files import CONFIG_DIR

from .request import SamplingParams

_UNIONS = {
    "prompt": "prompt must be a text, a list of texts, token ids, or a list of those",
    "stop": "stop must be a string or a list of strings",
    "retention": "retention must be the name of a method or a mapping of its settings",
    "budget": "budget must be a number of tokens, or a share such as '25%'",
    "tools": "tools are not supported by this server",
}
_FIELD = re.compile(r"[a-z_]+(\[\d+\])*(\.[a-z_]+(\[\d+\])*)*")

# Passed through to the sampler under the same name where the client sets them.
_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens"),
    *("skip_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens"),
)


class ApiError(Exception):
    """What a client is told, in OpenAI's shape.

    Args:
        status: HTTP status.
        message: what is wrong and what would be right.
        param: the field of the request that is wrong.
        code: a name for programs.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @classmethod
    def of(cls, error: ValueError, default_param: str | None = None) -> Self:
        """The answer to a wrong value: names the field that the error does, else the default."""
        code = "invalid_value"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            param = _param(first["loc"])
            code = "unknown_parameter" if first["type"] == "extra_forbidden" else code
            message = _message(param, first["type"], first["msg"])
        else:
            param, message = None, str(error)
        return cls(400, message, param or _field_in_front(message) or default_param, code)


class StreamOptions(BaseModel):
    """Settings of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class ResponseFormat(BaseModel):
    """Only plain text is supported."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class GenerationRequest(BaseModel):
    """What completions and chats have in common; None stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    retention: str | dict[str, Any] | None = None
    budget: int | str | None = None

    # For the client's own book-keeping; they change nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_limits(self, limits: ServerLimits) -> None:
        """Raise an `ApiError` if the request asks for more than this server gives."""
        _check_limit("n", self.n or 1, limits.max_n)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        _check_limit("stop", len(stops), limits.max_stop, " strings")
        _check_limit(self.logprobs_field, self.num_logprobs or 0, limits.max_logprobs)
        _check_profile(self.retention)

    @property
    def logprobs_field(self) -> str:
        """The field that says how many log-probabilities are wanted."""
        return "logprobs"

    @property
    def num_logprobs(self) -> int | None:
        """Best tokens wanted beside the sampled one; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value."""
        return "max_tokens", self.max_tokens

    def sampling_params(self) -> SamplingParams:
        """How the request is sampled.

        Raises:
            ApiError: a value is out of range; names its field.
        """
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        max_tokens_field, given["max_tokens"] = self.max_new_tokens
        given["logprobs"] = self.num_logprobs
        if self.logit_bias:
            given["logit_bias"] = _token_ids(self.logit_bias)
        names = {"max_tokens": max_tokens_field, "logprobs": self.logprobs_field}
        try:
            return SamplingParams(**given)
        except ValidationError as error:
            answer = ApiError.of(error)
            if answer.param in names:
                message = str(answer).replace(answer.param, names[answer.param], 1)
                raise ApiError(400, message, names[answer.param], answer.code) from None
            raise answer from None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return self.logprobs

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """See `GenerationRequest`; OpenAI's default is 16."""
        return "max_tokens", 16 if self.max_tokens is None else self.max_tokens

    def prompts(self, max_prompts: int) -> list[str | list[int]]:
        """The prompts one by one.

        Raises:
            ApiError: there are none or too many.
        """
        if not self.prompt:
            message = "prompt is empty; it needs a text or token ids"
            raise ApiError(400, message, "prompt", "invalid_value")
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[Any] = list(self.prompt)
        if isinstance(prompts[0], int):
            return [prompts]
        _check_limit("prompt", len(prompts), max_prompts, " prompts")
        return prompts


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`. Messages are checked by the tokenizer, which reads them."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        return self

    @property
    def logprobs_field(self) -> str:
        """See `GenerationRequest`."""
        return "top_logprobs"

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """See `GenerationRequest`; the default is what the model's context leaves."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: a text, or a chat as its template writes it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        return self


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[int]


def _field_in_front(message: str) -> str | None:
    """The field that a message starts with, if it is one of a request."""
    found = _FIELD.match(message)
    known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    if found is None or re.split(r"[.\[]", found.group())[0] not in known:
        return None
    return found.group()


def _check_limit(name: str, value: int, limit: int, what: str = "") -> None:
    if value > limit:
        raise ApiError(
            400, f"{name} may be at most {limit}{what} here, not {value}", name, "limit_exceeded"
        )


def _check_profile(retention: str | dict[str, Any] | None) -> None:
    """A client names a shipped profile or sends its content; it reads no files of the server."""
    profile = retention.get("profile") if isinstance(retention, dict) else None
    shipped = {file.stem for file in (CONFIG_DIR / "profiles").glob("*.json")}
    is_shipped = isinstance(profile, str) and profile in shipped
    if profile is not None and not isinstance(profile, dict) and not is_shipped:
        raise ApiError(
            400,
            f"retention: profile must be one of {sorted(shipped)} or the measured scores",
            "retention",
            "invalid_value",
        )


def _token_ids(bias: Mapping[str, float]) -> dict[int, float]:
    for key in bias:
        if not key.isascii() or not key.isdigit():
            raise ApiError(
                400, f"logit_bias: {key!r:.80} is no token id", "logit_bias", "invalid_value"
            )
    return {int(key): value for key, value in bias.items()}


def _param(location: tuple[int | str, ...]) -> str | None:
    """A field as the client wrote it: `stop[1]`, `stream_options.include_usage`.

    Pydantic puts the member of a union that it tried, which is no part of it, among the names.
    """
    if not location:
        return None
    name = str(location[0])
    nested = {"stream_options", "response_format"}
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif location[0] in nested or part == "[key]":
            name += f".{part}" if part != "[key]" else ""
    return name


def _message(param: str | None, kind: str, message: str) -> str:
    message = message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{param} is not a field that this server knows"
    if kind == "missing":
        return f"{param} is required"
    if param in _UNIONS:
        return _UNIONS[param]
    if kind == "json_invalid":
        return f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}"
    return message if param is None else f"{param}: {message[:1].lower()}{message[1:]}"
