"""Batches as their owners see them: made, listed, looked at and cancelled."""

import json
import secrets
import sqlite3
from collections.abc import Callable

from saqqara.configs.schema import BatchLimits

from .database import Database
from .files import list_rows
from .records import (
    ACTIVE,
    CANCELLABLE,
    NewBatch,
    NotFoundError,
    NotPossibleError,
    Page,
    StoredBatch,
    StoreLimitError,
)


class BatchStore:
    """The batches of all owners.

    Args:
        database: where they are.
        limits: how many there may be.
        now: Unix time in seconds.
    """

    def __init__(self, database: Database, limits: BatchLimits, now: Callable[[], float]) -> None:
        self._database = database
        self._limits = limits
        self._now = now

    def create(self, owner: str, new: NewBatch) -> StoredBatch:
        """Queue a batch over a file of its owner.

        Raises:
            NotFoundError: there is no such file.
            NotPossibleError: the file is for something else.
            StoreLimitError: the owner has as many batches as may be.
        """
        now = self._now()
        batch_id = f"batch_{secrets.token_hex(12)}"
        metadata = None if new.metadata is None else json.dumps(new.metadata, allow_nan=False)
        marks = ", ".join("?" * len(ACTIVE))
        with self._database.write("create batch") as db:
            file = db.execute(
                "SELECT purpose FROM files "
                "WHERE id = ? AND owner = ? AND ifnull(expires_at, ?) >= ?",
                (new.input_file_id, owner, now, now),
            ).fetchone()
            if file is None:
                raise NotFoundError(f"input_file_id: there is no file {new.input_file_id!r:.100}")
            if file["purpose"] != "batch":
                raise NotPossibleError(
                    f"input_file_id: {new.input_file_id} has the purpose {file['purpose']!r}; it "
                    "must be uploaded with purpose='batch'"
                )
            (num_active,) = db.execute(
                f"SELECT count(*) FROM batches WHERE owner = ? AND status IN ({marks})",
                (owner, *ACTIVE),
            ).fetchone()
            if num_active >= self._limits.max_active:
                raise StoreLimitError(
                    f"{num_active} batches are not done yet, the most that a key may have "
                    "(batches.max_active)"
                )
            db.execute(
                "INSERT INTO batches (id, owner, endpoint, input_file_id, completion_window, "
                "metadata, output_seconds, status, created_at, expires_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?)",
                (
                    *(batch_id, owner, new.endpoint, new.input_file_id, new.completion_window),
                    *(metadata, new.output_seconds, now, now + new.window_seconds),
                ),
            )
            self._forget_oldest(db, owner)
        return self.get(owner, batch_id)

    def get(self, owner: str, batch_id: str) -> StoredBatch:
        """A batch.

        Raises:
            NotFoundError: the owner has none of this id.
        """
        with self._database.read() as db:
            query = "SELECT * FROM batches WHERE id = ? AND owner = ?"
            row = db.execute(query, (batch_id, owner)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no batch {batch_id!r:.100}")
        return StoredBatch.of(row)

    def list(self, owner: str, page: Page) -> tuple[list[StoredBatch], bool]:
        """Batches of an owner, and whether there are more of them.

        Raises:
            NotFoundError: the owner has no batch `page.after`.
        """
        with self._database.read() as db:
            rows, has_more = list_rows(db, "batches", page, owner, "owner = ?", [owner])
        return [StoredBatch.of(row) for row in rows], has_more

    def cancel(self, owner: str, batch_id: str) -> StoredBatch:
        """Have a batch end with what is done; whoever runs it sees it within a moment.

        Raises:
            NotFoundError: the owner has none of this id.
            NotPossibleError: it has ended, or all of its lines have.
        """
        marks = ", ".join("?" * len(CANCELLABLE))
        with self._database.write("cancel batch") as db:
            db.execute(
                "UPDATE batches SET status = 'cancelling', cancelling_at = ? "
                f"WHERE id = ? AND owner = ? AND status IN ({marks})",
                (self._now(), batch_id, owner, *CANCELLABLE),
            )
        batch = self.get(owner, batch_id)
        if batch.cancelling_at is None:
            raise NotPossibleError(f"a batch that is {batch.status} cannot be cancelled")
        return batch

    def _forget_oldest(self, db: sqlite3.Connection, owner: str) -> None:
        """Drop what has ended of an owner and is older than so many others; its files stay."""
        marks = ", ".join("?" * len(ACTIVE))
        db.execute(
            f"DELETE FROM batches WHERE owner = ? AND status NOT IN ({marks}) AND seq <= "
            "(SELECT seq FROM batches WHERE owner = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)",
            (owner, *ACTIVE, owner, self._limits.max_batches),
        )
