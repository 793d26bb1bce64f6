"""The input lines of a batch job, checked and turned into requests; no I/O.

Simple lines hold the prompt and any settings side by side:
`{"prompt": "...", "max_tokens": 32}`, `{"messages": [...], "custom_id": "a", "budget": "25%"}`.
OpenAI batch lines wrap a request: `{"custom_id": "a", "method": "POST", "url": ..., "body": ...}`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from .client import EngineRequest
from .request import SamplingParams
from .settings import check_keys, validation_message
from .tokenizer import check_messages

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
WRAPPER_KEYS = ("custom_id", "method", "url", "body")
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
CHAT_KEYS = ("messages", "max_completion_tokens", "top_logprobs")
COMPLETIONS_KEYS = ("prompt",)
RETENTION_KEYS = ("retention", "budget")
SAMPLING_KEYS = frozenset(SamplingParams.model_fields)
# OpenAI clients may send these; they say who asks, not what to compute.
LABEL_KEYS = ("user", "metadata")


class RowError(ValueError):
    """Something is wrong with one input line; `field` is the key it is about, if there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class BadLine:
    """An input line that is not a request, and why. `url` is None unless it is an OpenAI line."""

    line: int
    custom_id: str | None
    url: str | None
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One request of the input file. `url` is None for a simple line."""

    line: int
    custom_id: str | None
    url: str | None
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class RowParser:
    """Turns input lines into rows.

    Args:
        model: the name that OpenAI bodies may give, besides its last path component.
        sampling: settings of lines that bring none of their own.
    """

    model: str
    sampling: Mapping[str, Any]

    def parse(self, line: int, text: str) -> Row | BadLine:
        """One line of input; whatever is wrong with it comes back as a `BadLine`."""
        custom_id: str | None = None
        url: str | None = None
        try:
            data = _load(text)
            url = _url_of(data)
            custom_id = _custom_id(data, required=url is not None)
            fields = data if url is None else _body(data)
            request = self._request(line, url, fields)
        except RowError as error:
            return BadLine(line, custom_id, url, str(error), error.field)
        return Row(line, custom_id, url, request)

    def _request(self, line: int, url: str | None, fields: Mapping[str, Any]) -> EngineRequest:
        if url is None:
            _check_known(fields, {"custom_id", *PROMPT_KEYS, *RETENTION_KEYS, *SAMPLING_KEYS})
            prompt = _prompt(fields, PROMPT_KEYS)
            own = {k: v for k, v in fields.items() if k in SAMPLING_KEYS}
        else:
            own = _openai_sampling(url, fields, self.model)
            prompt = _prompt(fields, ("messages",) if url == CHAT_URL else ("prompt",))
        return EngineRequest(
            request_id=f"line-{line}",
            sampling_params=_sampling({**self.sampling, **own}),
            retention=_checked(fields, "retention", (str, dict), "a method's name or an object"),
            budget=_checked(fields, "budget", (str, int), "a number of tokens or a share ('25%')"),
            **prompt,
        )


def _load(text: str) -> Mapping[str, Any]:
    def no_constant(name: str) -> Any:
        raise RowError(f"not JSON: {name} is no JSON number")

    try:
        data = json.loads(text, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"not JSON that can be read: {error}") from None
    if not isinstance(data, dict):
        raise RowError(f"a line must be a JSON object, not {_type_name(data)}")
    if "\\ud" in text.lower():
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RowError("the line has half of a surrogate pair (\\udXXX alone)") from None
    return data


def _url_of(data: Mapping[str, Any]) -> str | None:
    """The endpoint of an OpenAI batch line; None for a simple line."""
    if not any(key in data for key in ("method", "url", "body")):
        return None
    url = data.get("url")
    return url if isinstance(url, str) else ""


def _custom_id(data: Mapping[str, Any], required: bool) -> str | None:
    custom_id = data.get("custom_id")
    if custom_id is None and not required:
        return None
    if not isinstance(custom_id, str):
        wrong = "missing" if custom_id is None else f"a {_type_name(custom_id)}"
        raise RowError(f"custom_id is {wrong}; it must be a string", "custom_id")
    return custom_id


def _body(data: Mapping[str, Any]) -> Mapping[str, Any]:
    _check_known(data, WRAPPER_KEYS)
    if data.get("method") != "POST":
        raise RowError(f"method must be 'POST', not {data.get('method')!r}", "method")
    if data.get("url") not in (CHAT_URL, COMPLETIONS_URL):
        raise RowError(
            f"url must be {CHAT_URL!r} or {COMPLETIONS_URL!r}, not {data.get('url')!r}", "url"
        )
    body = data.get("body")
    if not isinstance(body, dict):
        wrong = "missing" if body is None else f"a {_type_name(body)}"
        raise RowError(f"body is {wrong}; it must be an object with the request", "body")
    return body


def _prompt(fields: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The one prompt of a line, as keyword arguments of `EngineRequest`."""
    given = [key for key in keys if fields.get(key) is not None]
    if len(given) != 1:
        names = " or ".join(repr(key) for key in keys)
        wrong = "none" if not given else " and ".join(repr(key) for key in given)
        raise RowError(f"a line needs exactly one of {names}; it has {wrong}", keys[0])
    key, value = given[0], fields[given[0]]
    if key == "messages":
        return {"messages": _messages(value)}
    if key == "prompt" and isinstance(value, str):
        if not value:
            raise RowError("prompt is empty; it needs at least one character", "prompt")
        return {"prompt": value}
    if not _is_token_list(value):
        wanted = "a list of token ids" if key != "prompt" else "a string or a list of token ids"
        raise RowError(f"{key} must be {wanted}, not empty", key)
    return {"prompt_token_ids": tuple(value)}


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    try:
        return tuple(check_messages(value))
    except ValueError as error:
        raise RowError(str(error), "messages") from None


def _openai_sampling(url: str, body: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Sampling settings of an OpenAI body; our own extra settings may stand beside theirs."""
    own = CHAT_KEYS if url == CHAT_URL else COMPLETIONS_KEYS
    _check_known(body, {"model", "stream", *own, *LABEL_KEYS, *RETENTION_KEYS, *SAMPLING_KEYS})
    if body.get("model") not in (None, model, model.rstrip("/").rsplit("/", 1)[-1]):
        raise RowError(f"model is {body['model']!r}; this job runs {model!r}", "model")
    if body.get("stream"):
        raise RowError("stream must be false: a batch job returns whole answers", "stream")
    settings = {k: v for k, v in body.items() if k in SAMPLING_KEYS and v is not None}
    if url == CHAT_URL:
        if body.get("max_completion_tokens") is not None:
            settings["max_tokens"] = body["max_completion_tokens"]
        settings.pop("logprobs", None)
        settings |= _chat_logprobs(body)
    return settings


def _chat_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    """Chat bodies say `logprobs: true` and how many in `top_logprobs`."""
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted not in (None, True, False):
        raise RowError(f"logprobs must be true or false, not {wanted!r}", "logprobs")
    if not wanted:
        if top:
            raise RowError("top_logprobs needs logprobs: true", "top_logprobs")
        return {}
    return {"logprobs": 0 if top is None else top}


def _sampling(settings: Mapping[str, Any]) -> SamplingParams:
    try:
        # Strict, so that "64" or true is not taken for a number; through JSON, so that lists pass.
        return SamplingParams.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        message = validation_message(error)
        raise RowError(message, leading_field(message)) from None


def _checked(fields: Mapping[str, Any], key: str, types: tuple[type, ...], wanted: str) -> Any:
    value = fields.get(key)
    if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
        raise RowError(f"{key} must be {wanted}, not {value!r}", key)
    return value


def _check_known(fields: Mapping[str, Any], known: Iterable[str]) -> None:
    known = set(known)
    try:
        check_keys(fields, known)
    except ValueError as error:
        raise RowError(str(error), next(key for key in fields if key not in known)) from None


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def leading_field(message: str) -> str | None:
    """The field that an error message starts with, as the house's messages do."""
    match = re.match(r"[a-z_]+", message)
    known = SAMPLING_KEYS.union(PROMPT_KEYS, RETENTION_KEYS)
    return match[0] if match and match[0] in known else None


def _type_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
