"""Which path gives which reply, with which status."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from saqqara.cluster.live.snapshot import LiveStats

from .base import Error
from .batches import AFTER, ORDER, UPLOAD, BatchObject, BatchPage, DeletedFile, FileObject, FilePage
from .completions import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    EndedConversation,
)
from .operations import Health, Load, Model, Models, Text, TokenizerInfo, Tokens, Version
from .responses import ResponseEvent, ResponseObject

_OPEN = (403,)
_KEY = (401, *_OPEN)
_BODY = (400, *_KEY, 404, 408, 413, 415, 503)
_ANSWERS = (*_BODY, 429, 500)
_TURNS = (*_ANSWERS, 409)  # of a conversation, one at a time
_STORED = (*_KEY, 404, 503)
_LISTED = (400, *_STORED)


@dataclass(frozen=True, slots=True)
class Replies:
    """What a path answers.

    Attributes:
        reply: the type of what comes with status 200; None: a text.
        errors: the other statuses, each with an `Error`.
        event: the type of an event, where it may be a stream.
        last_event: what a stream ends with that is no JSON; its errors are `Error`s then.
        query: schemas of the parameters of the address.
        form: the schema of a body that is `multipart/form-data`.
        is_found: there may be such a thing; False: the answer is always one of `errors`.
        has_parts: a part of the answer may be asked for by `Range`, and comes with status 206.
    """

    reply: Any
    errors: tuple[int, ...] = _KEY
    event: Any = None
    last_event: str | None = "[DONE]"
    query: Mapping[str, Any] = field(default_factory=dict)
    form: Mapping[str, Any] | None = None
    is_found: bool = True
    has_parts: bool = False


REPLIES: Mapping[tuple[str, str], Replies] = {
    ("POST", "/v1/chat/completions"): Replies(ChatCompletion, _TURNS, ChatCompletionChunk),
    ("POST", "/v1/completions"): Replies(Completion, _TURNS, CompletionChunk),
    ("POST", "/v1/responses"): Replies(ResponseObject, _ANSWERS, ResponseEvent, None),
    ("GET", "/v1/responses/{response_id}"): Replies(None, (*_KEY, 404), is_found=False),
    ("DELETE", "/v1/responses/{response_id}"): Replies(None, (*_KEY, 404), is_found=False),
    ("DELETE", "/v1/conversations/{conversation_id}"): Replies(
        EndedConversation, (400, *_KEY, 404, 409, 503)
    ),
    ("POST", "/tokenize"): Replies(Tokens, _BODY),
    ("POST", "/detokenize"): Replies(Text, _BODY),
    ("GET", "/v1/models"): Replies(Models),
    ("GET", "/v1/models/{model}"): Replies(Model, (*_KEY, 404)),
    ("GET", "/health"): Replies(Health, (*_OPEN, 503)),
    ("GET", "/live"): Replies(Health, (*_OPEN, 503)),
    ("GET", "/load"): Replies(Load, _OPEN),
    ("GET", "/tokenizer_info"): Replies(TokenizerInfo),
    ("GET", "/version"): Replies(Version, _OPEN),
    ("GET", "/metrics"): Replies(None, _OPEN),
    ("GET", "/stats"): Replies(LiveStats, (*_KEY, 503)),
    ("POST", "/v1/files"): Replies(FileObject, (*_BODY, 429), form=UPLOAD),
    ("GET", "/v1/files"): Replies(
        FilePage,
        _LISTED,
        query={
            "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
            "after": AFTER,
            "order": ORDER,
            "purpose": {"type": "string", "maxLength": 256},
        },
    ),
    ("GET", "/v1/files/{file_id}"): Replies(FileObject, _STORED),
    ("GET", "/v1/files/{file_id}/content"): Replies(None, (*_STORED, 416), has_parts=True),
    ("DELETE", "/v1/files/{file_id}"): Replies(DeletedFile, _LISTED),
    ("POST", "/v1/batches"): Replies(BatchObject, _BODY),
    ("GET", "/v1/batches"): Replies(
        BatchPage,
        _LISTED,
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": AFTER},
    ),
    ("GET", "/v1/batches/{batch_id}"): Replies(BatchObject, _STORED),
    ("POST", "/v1/batches/{batch_id}/cancel"): Replies(BatchObject, _LISTED),
}
UNTOLD = Replies(dict[str, Any], _ANSWERS)  # of a path that is not in the table


def reply_schemas(replies: Mapping[tuple[str, str], Replies], template: str) -> tuple[Any, Any]:
    """JSON schemas of replies and events, and of an `Error`.

    Args:
        replies: by method and path.
        template: of references to definitions, with `{model}`.

    Returns:
        Schemas by (method, path, "reply" or "event"), and their definitions by name.
    """
    kinds = {
        (*key, what): kind
        for key, known in replies.items()
        for what, kind in (("reply", known.reply), ("event", known.event))
        if kind is not None
    }
    kinds["", "", "error"] = Error
    made, definitions = TypeAdapter.json_schemas(
        [(key, "validation", TypeAdapter(kind)) for key, kind in kinds.items()],
        ref_template=template,
    )
    return {key: schema for (key, _), schema in made.items()}, definitions.get("$defs", {})
