"""The SQLite file that files and batches are kept in, for several processes of one machine."""

import fcntl
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUSY_SECONDS = 60.0  # for another process to end its transaction
VERSION = 1
_SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    blob TEXT NOT NULL
);
CREATE INDEX files_by_owner ON files (owner, seq);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT,
    output_seconds INTEGER,
    status TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    in_progress_at REAL,
    finalizing_at REAL,
    completed_at REAL,
    failed_at REAL,
    expired_at REAL,
    cancelling_at REAL,
    cancelled_at REAL,
    num_lines INTEGER NOT NULL DEFAULT 0,
    num_completed INTEGER NOT NULL DEFAULT 0,
    num_failed INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    output_file_id TEXT,
    error_file_id TEXT,
    errors TEXT,
    holder TEXT,
    lease_until REAL,
    epoch INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_by_owner ON batches (owner, seq);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE results (
    batch_id TEXT NOT NULL,
    line INTEGER NOT NULL,
    is_error INTEGER NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
);
CREATE TABLE started (
    batch_id TEXT NOT NULL,
    line INTEGER NOT NULL,
    epoch INTEGER,
    num_losses INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch_id, line)
);
"""


class StoreBusyError(RuntimeError):
    """The folder does not serve now: it is full, damaged, or held by another for too long."""


def _no_fault(point: str) -> None:
    """Nothing goes wrong."""


class Database:
    """One connection, for any thread of this process.

    Args:
        path: the file; made where it is not there.
        at_commit: called with `before NAME` and `after NAME` around the commit of each transaction;
            what it raises ends the work there, as a crash would.

    Raises:
        ValueError: the file cannot be opened, or is of another version.
    """

    def __init__(self, path: Path, at_commit: Callable[[str], None] = _no_fault) -> None:
        self._lock = threading.RLock()
        self._at_commit = at_commit
        self._connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        # To become WAL, a database must be nobody else's; SQLite does not wait for that.
        with path.with_name(path.name + ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._prepare(path)

    def _prepare(self, path: Path) -> None:
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._connection.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA user_version={VERSION}; COMMIT;"
                )
                version = VERSION
        except sqlite3.Error as error:
            self._connection.close()
            raise ValueError(f"batch_dir: {path} cannot be used: {error}") from None
        if version != VERSION:
            self._connection.close()
            raise ValueError(
                f"batch_dir: {path} was written by another version of Saqqara (its format is "
                f"{version}, here it is {VERSION}); use another folder"
            )

    @contextmanager
    def write(self, name: str) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer runs beside; all of it or nothing is kept.

        Raises:
            StoreBusyError: it cannot be written now.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._at_commit(f"before {name}")
                    self._connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # a full disk has ended it already
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.IntegrityError:  # a mistake of ours
                raise
            except sqlite3.DatabaseError as error:
                raise StoreBusyError(f"the batch folder cannot be written now: {error}") from error
        self._at_commit(f"after {name}")

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """The connection, for single queries."""
        with self._lock:
            try:
                yield self._connection
            except sqlite3.DatabaseError as error:
                raise StoreBusyError(f"the batch folder cannot be read now: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()
