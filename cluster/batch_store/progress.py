"""What a batch's runner writes: which lines are under way, their results, and how it ends."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from .database import Database
from .files import FileStore
from .leases import Lease, LeaseStore
from .records import NO_USAGE, LineError, Status, StoredBatch, StoredFile, Usage

_PAGE = 256  # results that are read at once


@dataclass(frozen=True, slots=True)
class LineResult:
    """The result of one line: a record of the output file, or of the error file."""

    line: int
    record: bytes
    is_error: bool
    usage: Usage = NO_USAGE


class Progress:
    """The state of the batches that are run.

    Args:
        database: where it is.
        leases: who may write it.
        files: where outputs are named.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        leases: LeaseStore,
        files: FileStore,
        now: Callable[[], float],
    ) -> None:
        self._database = database
        self._leases = leases
        self._files = files
        self._now = now

    def fail(self, lease: Lease, errors: Sequence[LineError]) -> None:
        """End a batch whose input is no input of a batch."""
        listed = json.dumps([asdict(error) for error in errors], allow_nan=False)
        with self._leases.fenced(lease, "fail") as db:
            db.execute(
                "UPDATE batches SET status = 'failed', failed_at = ?, errors = ?, holder = NULL, "
                "lease_until = NULL WHERE id = ?",
                (self._now(), listed, lease.batch.id),
            )
            _forget(db, lease.batch.id)

    def begin(self, lease: Lease, num_lines: int) -> None:
        """Note that the input was read, and has so many lines."""
        with self._leases.fenced(lease, "begin") as db:
            db.execute("UPDATE batches SET num_lines = ? WHERE id = ?", (num_lines, lease.batch.id))
            db.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ? "
                "WHERE id = ? AND status = 'validating'",
                (self._now(), lease.batch.id),
            )

    def done_lines(self, batch_id: str) -> set[int]:
        """Lines that have their result."""
        with self._database.read() as db:
            rows = db.execute("SELECT line FROM results WHERE batch_id = ?", (batch_id,))
            return {row["line"] for row in rows}

    def num_bytes(self, batch_id: str) -> int:
        """Bytes of all results so far."""
        query = "SELECT ifnull(sum(length(record)), 0) FROM results WHERE batch_id = ?"
        with self._database.read() as db:
            return int(db.execute(query, (batch_id,)).fetchone()[0])

    def losses(self, batch_id: str) -> Mapping[int, int]:
        """Lines without a result whose process was lost with them, and how often."""
        query = "SELECT line, num_losses FROM started WHERE batch_id = ? AND num_losses > 0"
        with self._database.read() as db:
            return {row["line"]: row["num_losses"] for row in db.execute(query, (batch_id,))}

    def start(self, lease: Lease, lines: Iterable[int]) -> None:
        """Note that lines are under way, before they are."""
        with self._leases.fenced(lease, "start") as db:
            db.executemany(
                "INSERT INTO started (batch_id, line, epoch) VALUES (?, ?, ?) "
                "ON CONFLICT (batch_id, line) DO UPDATE SET epoch = excluded.epoch",
                [(lease.batch.id, line, lease.epoch) for line in lines],
            )

    def stop(self, lease: Lease, lines: Iterable[int]) -> None:
        """Note that lines are not under way any more, and have no result."""
        with self._leases.fenced(lease, "stop") as db:
            db.executemany(
                "UPDATE started SET epoch = NULL WHERE batch_id = ? AND line = ?",
                [(lease.batch.id, line) for line in lines],
            )

    def commit(self, lease: Lease, results: Sequence[LineResult]) -> None:
        """Keep results and count them, all together; a line that has one keeps that."""
        batch_id = lease.batch.id
        with self._leases.fenced(lease, "results") as db:
            for result in results:
                kept = db.execute(
                    "INSERT INTO results (batch_id, line, is_error, record) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT DO NOTHING",
                    (batch_id, result.line, result.is_error, result.record),
                ).rowcount
                if not kept:
                    continue
                name = "num_failed" if result.is_error else "num_completed"
                usage = asdict(result.usage)
                more = ", ".join(f"{key} = {key} + ?" for key in usage)
                db.execute(
                    f"UPDATE batches SET {name} = {name} + 1, {more} WHERE id = ?",
                    (*usage.values(), batch_id),
                )
            db.executemany(
                "DELETE FROM started WHERE batch_id = ? AND line = ?",
                [(batch_id, result.line) for result in results],
            )

    def begin_finalizing(self, lease: Lease) -> StoredBatch:
        """Note that no line will be run any more; the batch as it stands then."""
        with self._leases.fenced(lease, "finalizing") as db:
            db.execute(
                "UPDATE batches SET status = 'finalizing' "
                "WHERE id = ? AND status IN ('validating', 'in_progress')",
                (lease.batch.id,),
            )
            row = db.execute(
                "UPDATE batches SET finalizing_at = ifnull(finalizing_at, ?) WHERE id = ? "
                "RETURNING *",
                (self._now(), lease.batch.id),
            ).fetchone()
        return StoredBatch.of(row)

    def results(self, batch_id: str, *, is_error: bool) -> Iterator[tuple[int, bytes]]:
        """(Line, record) of the lines with a result of this kind, in order of the input."""
        query = (
            "SELECT line, record FROM results WHERE batch_id = ? AND is_error = ? AND line > ? "
            "ORDER BY line LIMIT ?"
        )
        line = 0
        while True:
            with self._database.read() as db:
                rows = db.execute(query, (batch_id, is_error, line, _PAGE)).fetchall()
            for row in rows:
                yield row["line"], row["record"]
            if not rows:
                return
            line = rows[-1]["line"]

    def finish(
        self,
        lease: Lease,
        status: Status,
        output: StoredFile | None,
        errors: StoredFile | None,
    ) -> None:
        """End a batch, with its files, whose contents are in place.

        Args:
            lease: of the runner.
            status: `completed`, `expired` or `cancelled`.
            output: the file of answers, if there are any.
            errors: the file of lines that have none.
        """
        batch_id = lease.batch.id
        with self._leases.fenced(lease, "finish") as db:
            for file in (output, errors):
                if file is not None:
                    self._files.insert(db, file)
            db.execute(
                f"UPDATE batches SET status = ?, {status}_at = ?, output_file_id = ?, "
                "error_file_id = ?, num_failed = num_lines - num_completed, holder = NULL, "
                "lease_until = NULL WHERE id = ?",
                (
                    *(status, self._now(), None if output is None else output.id),
                    *(None if errors is None else errors.id, batch_id),
                ),
            )
            _forget(db, batch_id)


def _forget(db: sqlite3.Connection, batch_id: str) -> None:
    """Delete what only the runner of a batch needs."""
    for table in ("started", "results"):
        db.execute(f"DELETE FROM {table} WHERE batch_id = ?", (batch_id,))
