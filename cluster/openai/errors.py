"""How a wrong request is answered, over HTTP and in the records of a batch job alike."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import ValidationError

from saqqara.cluster.errors import ContextLengthError, ConversationBusyError
from saqqara.cluster.sampling import SamplingParams

_WANTED = {
    "stop": "stop must be a string or a list of strings",
    "retention": "retention must be the name of a method or a mapping of its settings",
    "budget": "budget must be a number of tokens, or a share such as '25%'",
}
_FIELD = re.compile(r"[a-z_]+(\[\d+\])*(\.[a-z_]+(\[\d+\])*)*")
# Fields that messages start with; the other fields are named by where pydantic finds the fault.
_FIELDS = {
    *SamplingParams.model_fields,
    *("prompt", "prompt_token_ids", "messages", "retention", "budget", "priority"),
    *("timeout_seconds", "cache_salt", "conversation_id", "n", "prompt_logprobs"),
    *("stream_options", "max_completion_tokens", "top_logprobs"),
    *("tools", "tool_choice", "functions"),
    *("continue_final_message", "chat_template_kwargs", "best_of", "echo", "chat_template"),
    "reasoning_effort",
    "response_format",
}
_NESTED = {"stream_options", "response_format", "structured_outputs"}
_MAX_NAME_CHARS = 100  # longer than any field; what a client wrote may have megabytes
_MAX_MESSAGE_CHARS = 2000
_TYPES = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}


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
        super().__init__(_cut(message, _MAX_MESSAGE_CHARS))
        self.status = status
        self.param = None if param is None else _cut(param, _MAX_NAME_CHARS)
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
    def of(
        cls,
        error: ValueError,
        default_param: str | None = None,
        known: Iterable[str] = (),
        given: Any = None,
    ) -> Self:
        """The answer to a wrong value: names the field that the error does, else the default.

        `known` are the fields that there are, for a hint where an unknown one was given. With
        `given`, the body, a field is named however deep it lies.
        """
        if isinstance(error, ContextLengthError):
            return cls.rejected(str(error), is_too_long=True)
        if isinstance(error, ConversationBusyError):
            return cls(409, str(error), "conversation_id", "conversation_busy")
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            param = _param(first["loc"]) if given is None else _path(first["loc"], given)
            if first["type"] == "extra_forbidden":
                return cls.unknown(param or "", known)
            message = _message(param, first["type"], first["msg"], first["input"])
        else:
            return cls.rejected(str(error), default_param)
        param = param or _field_in_front(message) or default_param
        return cls(400, message, param, "invalid_value")

    @classmethod
    def unknown(cls, name: str, known: Iterable[str]) -> Self:
        """The answer to a field that there is not; `known` are those that there are."""
        name = _cut(name, _MAX_NAME_CHARS)
        close = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        message = f"{name} is not a field that is known here{hint}"
        return cls(400, message, name, "unknown_parameter")

    @classmethod
    def rejected(
        cls, message: str, default_param: str | None = None, *, is_too_long: bool = False
    ) -> Self:
        """The answer to a request that the engine does not take."""
        code = "context_length_exceeded" if is_too_long else "invalid_value"
        return cls(400, message, _field_in_front(message) or default_param, code)

    def reworded(self, old: str, new: str) -> "ApiError":
        """The same, with other words in its message."""
        message = str(self).replace(old, new)
        return ApiError(self.status, message, self.param, self.code, self.headers)

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same, speaking of the fields that the client has used instead of the engine's."""
        field = re.match(r"[a-z_]*", self.param or "")
        old = "" if field is None else field[0]
        if self.param is None or names.get(old, old) == old:
            return self
        message = str(self)
        if message.startswith(old):
            message = names[old] + message[len(old) :]
        param = names[old] + self.param[len(old) :]
        return ApiError(self.status, message, param, self.code, self.headers)


def a_type(value: Any) -> str:
    """What JSON calls the type of a value, with its article."""
    name = _TYPES.get(type(value), "number")
    return f"{'an' if name == 'object' else 'a'} {name}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _field_in_front(message: str) -> str | None:
    """The field that a message starts with, if it is one of a request."""
    found = _FIELD.match(message)
    if found is None or re.split(r"[.\[]", found.group())[0] not in _FIELDS:
        return None
    return found.group()


def _param(location: tuple[int | str, ...]) -> str | None:
    """A field as the client wrote it: `stop[1]`, `stream_options.include_usage`.

    Pydantic puts the member of a union that it tried, which is no part of it, among the names.
    """
    if not location:
        return None
    name = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif location[0] in _NESTED:
            name += f".{part}"
    return name


def _path(location: tuple[int | str, ...], given: Any) -> str | None:
    """A field as the client wrote it, of any depth: `input[2].content[0].text`.

    Names that are neither in the body nor the last one are members of unions; the last one is
    none, because an error within a union lies in what its member has.
    """
    path, value = "", given
    for place, part in enumerate(location):
        is_last = place == len(location) - 1
        if isinstance(part, int) and isinstance(value, list):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(part, str) and isinstance(value, Mapping) and (part in value or is_last):
            path, value = f"{path}.{part}" if path else part, value.get(part)
    return path or None


def _message(param: str | None, kind: str, message: str, given: Any) -> str:
    message = message.removeprefix("Value error, ")
    message = message.replace("Tuple should", "List should").replace(" after validation", "")
    if param is None:
        return message
    if kind == "missing":
        return f"{param} is required"
    if param.partition("[")[0] == "prompt":
        what = f"{given!r:.80}" if isinstance(given, list | dict) else a_type(given)
        return (
            f"{param} must be a string or a list of token ids, not {what}; "
            "several prompts are a list of those"
        )
    if param in _WANTED:
        return _WANTED[param]
    return f"{param}: {message[:1].lower()}{message[1:]}"
