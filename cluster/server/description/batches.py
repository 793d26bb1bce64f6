"""Replies of `/v1/files` and `/v1/batches`, and the form that uploads a file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Count, Reply, UnixTime

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
UPLOAD: Mapping[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch", "batch_output"]},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
AFTER = {"type": "string", "maxLength": 256, "description": "The last id of the page before."}
ORDER = {"enum": ["asc", "desc"]}


class FileObject(Reply):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: Count
    created_at: UnixTime
    expires_at: UnixTime | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None


class DeletedFile(Reply):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class _Page(Reply):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FilePage(_Page):
    """A part of the files."""

    data: list[FileObject]


class BatchLineError(Reply):
    """What is wrong with a line of the input."""

    code: str | None
    message: str
    line: int | None
    param: str | None


class BatchErrors(Reply):
    """Why a batch has failed."""

    object: Literal["list"]
    data: Annotated[list[BatchLineError], Field(min_length=1)]


class RequestCounts(Reply):
    """Lines of a batch."""

    total: Count
    completed: Count
    failed: Count


class CachedTokens(Reply):
    """Of the input's tokens."""

    cached_tokens: Count


class ReasoningTokens(Reply):
    """Of the output's tokens."""

    reasoning_tokens: Count


class BatchUsage(Reply):
    """Tokens of all lines."""

    input_tokens: Count
    input_tokens_details: CachedTokens
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class BatchObject(Reply):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: UnixTime
    in_progress_at: UnixTime | None
    expires_at: UnixTime
    finalizing_at: UnixTime | None
    completed_at: UnixTime | None
    failed_at: UnixTime | None
    expired_at: UnixTime | None
    cancelling_at: UnixTime | None
    cancelled_at: UnixTime | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchPage(_Page):
    """A part of the batches."""

    data: list[BatchObject]
