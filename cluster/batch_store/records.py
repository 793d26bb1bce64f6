"""What the store holds: a file and a batch as they are, and how much of them there may be."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]
ACTIVE: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
"""What a runner still has to do something for."""
CANCELLABLE: tuple[Status, ...] = ("validating", "in_progress")


class NotFoundError(LookupError):
    """There is no such file or batch, or it is another owner's."""


class StoreLimitError(ValueError):
    """An owner has as much as an owner may have, or a file is too large; the message says it."""


class NotPossibleError(ValueError):
    """What is asked does not go with the state that a file or a batch is in."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file; `blob` is what its content is called within the folder."""

    id: str
    owner: str
    purpose: str
    filename: str
    num_bytes: int
    created_at: float
    expires_at: float | None
    blob: str

    @classmethod
    def of(cls, row: sqlite3.Row) -> "StoredFile":
        """The file of a row."""
        return cls(**{name: row[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the answers of a batch."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with a line of an input; `line` is None where it is the file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch. Times are Unix, in seconds; `num_lines` is 0 until the input was read."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_seconds: int | None
    status: Status
    created_at: float
    expires_at: float
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    expired_at: float | None
    cancelling_at: float | None
    cancelled_at: float | None
    num_lines: int
    num_completed: int
    num_failed: int
    usage: Usage
    output_file_id: str | None
    error_file_id: str | None
    errors: tuple[LineError, ...]

    @classmethod
    def of(cls, row: sqlite3.Row) -> "StoredBatch":
        """The batch of a row."""
        made: dict[str, Any] = {
            "usage": Usage(**{name: row[name] for name in Usage.__slots__}),
            "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
            "errors": tuple(LineError(**error) for error in json.loads(row["errors"] or "[]")),
        }
        plain = {name: row[name] for name in cls.__slots__ if name not in made}
        return cls(**plain, **made)

    @property
    def num_done(self) -> int:
        """Lines that have their result."""
        return self.num_completed + self.num_failed


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What a client asks for."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_seconds: float
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Which of an owner's files or batches are listed: so many after one of them."""

    limit: int
    after: str | None = None
    ascending: bool = False
