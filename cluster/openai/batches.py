"""Batches as clients write them: what asks for one, and the wrapper of each line of its input.

The wrapper, `{"custom_id": "a", "method": "POST", "url": ..., "body": {...}}`, is that of batch
jobs over files, too.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from saqqara.cluster.settings import check_keys

from .errors import ApiError, a_type

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
RESPONSES_URL = "/v1/responses"
URLS = (CHAT_URL, COMPLETIONS_URL, RESPONSES_URL)
WRAPPER_KEYS = ("custom_id", "method", "url", "body")
WINDOW_SECONDS = {"24h": 24 * 3600.0}
MIN_FILE_SECONDS = 3600
MAX_FILE_SECONDS = 30 * 24 * 3600

_MAX_METADATA = 16
_MetadataKey = Annotated[str, StringConstraints(max_length=64)]
_MetadataValue = Annotated[str, StringConstraints(max_length=512)]


def _check_metadata(metadata: Any) -> Any:
    if isinstance(metadata, Mapping) and len(metadata) > _MAX_METADATA:
        raise ValueError(f"should have at most {_MAX_METADATA} items, not {len(metadata)}")
    return metadata


# Counted before there is an error for each of them.
Metadata = Annotated[dict[_MetadataKey, _MetadataValue], BeforeValidator(_check_metadata)]


class ExpiresAfter(BaseModel):
    """How long a file is kept, from when it was made."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_FILE_SECONDS, le=MAX_FILE_SECONDS)]


class BatchRequest(BaseModel):
    """`POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


def read_wrapper(
    data: Mapping[str, Any], urls: Collection[str]
) -> tuple[str, str, Mapping[str, Any]]:
    """The custom id, url and body of a line.

    Raises:
        ApiError: the line is no request for one of `urls`; names the field.
    """
    custom_id = read_custom_id(data, required=True)
    assert custom_id is not None, "it was required"
    url, body = read_url_and_body(data, urls)
    return custom_id, url, body


def read_custom_id(data: Mapping[str, Any], required: bool) -> str | None:
    """What a line is called by whoever wrote it.

    Raises:
        ApiError: it is no string.
    """
    custom_id = data.get("custom_id")
    if custom_id is None and not required:
        return None
    if not isinstance(custom_id, str):
        wrong = "missing" if custom_id is None else a_type(custom_id)
        raise _invalid(f"custom_id is {wrong}; it must be a string", "custom_id")
    return custom_id


def read_url_and_body(
    data: Mapping[str, Any], urls: Collection[str]
) -> tuple[str, Mapping[str, Any]]:
    """The url and the body of a line.

    Raises:
        ApiError: the line is no request for one of `urls`; names the field.
    """
    try:
        check_keys(data, WRAPPER_KEYS)
    except ValueError as error:
        unknown = next(key for key in data if key not in WRAPPER_KEYS)
        raise ApiError(400, str(error), unknown, "unknown_parameter") from None
    if data.get("method") != "POST":
        raise _invalid(f"method must be 'POST', not {data.get('method')!r:.80}", "method")
    url = data.get("url")
    if url not in urls:
        wanted = " or ".join(map(repr, urls))
        raise _invalid(f"url must be {wanted}, not {url!r:.80}", "url")
    body = data.get("body")
    if not isinstance(body, dict):
        wrong = "missing" if body is None else a_type(body)
        raise _invalid(f"body is {wrong}; it must be an object with the request", "body")
    return str(url), body


def check_not_streamed(stream: Any, what: str) -> None:
    """Raise an `ApiError` if a line asks for a stream; `what` says what reads it."""
    if stream:
        raise _invalid(f"stream must be false: {what} writes whole answers", "stream")


def check_no_turn(conversation_id: Any) -> None:
    """Raise an `ApiError` if a line names a conversation: its turns have an order, lines none."""
    if conversation_id is not None:
        message = (
            "conversation_id: the lines of a batch have no order, so none is a turn of a "
            "conversation; leave it out"
        )
        raise _invalid(message, "conversation_id")


def _invalid(message: str, field: str) -> ApiError:
    return ApiError(400, message, field, "invalid_value")
