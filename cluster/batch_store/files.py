"""Files: written beside their place, put there whole, and owned by whoever uploaded them.

A name that a client gives is kept as text and never is a path: content lies under names of ours.
"""

import os
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from saqqara.configs.schema import BatchLimits

from .database import Database, StoreBusyError
from .records import ACTIVE, NotFoundError, NotPossibleError, Page, StoredFile, StoreLimitError

STALE_SECONDS = 24 * 3600.0  # content that no file names by then is of a writer that has died


class FileStore:
    """The files of all owners.

    Args:
        folder: where contents lie.
        database: where the files are named.
        limits: how much there may be.
        now: Unix time in seconds.
    """

    def __init__(
        self, folder: Path, database: Database, limits: BatchLimits, now: Callable[[], float]
    ) -> None:
        self._folder = folder
        self._database = database
        self._now = now
        self.limits = limits

    def begin(self, owner: str) -> "Upload":
        """Start a file of an owner.

        Raises:
            StoreLimitError: the owner has as many files, or bytes, as may be.
            StoreBusyError: the disk does not take it.
        """
        num_files, num_bytes = self._used(owner)
        if num_files >= self.limits.max_files:
            raise StoreLimitError(
                f"file: there are {num_files} files already, the most that a key may have "
                "(batches.max_files); delete some"
            )
        return Upload(self, owner, self.limits.max_stored_bytes - num_bytes)

    def get(self, owner: str, file_id: str) -> StoredFile:
        """A file.

        Raises:
            NotFoundError: the owner has none of this id.
        """
        query = "SELECT * FROM files WHERE id = ? AND owner = ? AND ifnull(expires_at, ?) >= ?"
        now = self._now()
        with self._database.read() as db:
            row = db.execute(query, (file_id, owner, now, now)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no file {file_id!r:.100}")
        return StoredFile.of(row)

    def list(
        self, owner: str, page: Page, purpose: str | None = None
    ) -> tuple[list[StoredFile], bool]:
        """Files of an owner, and whether there are more of them.

        Raises:
            NotFoundError: the owner has no file `page.after`.
        """
        now = self._now()
        where, values = "owner = ? AND ifnull(expires_at, ?) >= ?", [owner, now, now]
        if purpose is not None:
            where += " AND purpose = ?"
            values.append(purpose)
        with self._database.read() as db:
            rows, has_more = list_rows(db, "files", page, owner, where, values)
        return [StoredFile.of(row) for row in rows], has_more

    def open(self, file: StoredFile) -> BinaryIO:
        """The content of a file, which stays readable when the file is deleted meanwhile.

        Raises:
            NotFoundError: it was deleted.
            StoreBusyError: the disk does not give it.
        """
        try:
            return (self._folder / file.blob).open("rb")
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {file.id!r:.100}") from None
        except OSError as error:
            raise StoreBusyError(f"the file cannot be read: {error.strerror}") from error

    def delete(self, owner: str, file_id: str) -> None:
        """Delete a file.

        Raises:
            NotFoundError: the owner has none of this id.
            NotPossibleError: a batch that is not done reads it.
        """
        file = self.get(owner, file_id)
        marks = ", ".join("?" * len(ACTIVE))
        with self._database.write("delete file") as db:
            used = db.execute(
                f"SELECT id FROM batches WHERE input_file_id = ? AND status IN ({marks})",
                (file_id, *ACTIVE),
            ).fetchone()
            if used is not None:
                raise NotPossibleError(
                    f"file_id: {file_id} is the input of {used['id']}, which is not done; cancel "
                    "that first"
                )
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        (self._folder / file.blob).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Delete what has expired, and contents that no file names; how many were deleted."""
        now = self._now()
        marks = ", ".join("?" * len(ACTIVE))
        with self._database.write("sweep files") as db:
            gone = db.execute(
                "DELETE FROM files WHERE expires_at < ? AND id NOT IN "
                f"(SELECT input_file_id FROM batches WHERE status IN ({marks})) RETURNING blob",
                (now, *ACTIVE),
            ).fetchall()
            named = {row["blob"] for row in db.execute("SELECT blob FROM files")}
        blobs = [self._folder / row["blob"] for row in gone]
        for path in self._folder.iterdir():
            is_stale = path.name not in named and _age(path, now) > STALE_SECONDS
            if is_stale and path not in blobs:
                blobs.append(path)
        for path in blobs:
            path.unlink(missing_ok=True)
        return len(blobs)

    def insert(self, db: sqlite3.Connection, file: StoredFile) -> None:
        """Name a file whose content is in place, within a transaction."""
        names = StoredFile.__slots__
        marks = ", ".join("?" * len(names))
        db.execute(
            f"INSERT INTO files ({', '.join(names)}) VALUES ({marks})",
            [getattr(file, name) for name in names],
        )

    def path(self, blob: str) -> Path:
        """Where a content lies."""
        return self._folder / blob

    def add(self, upload: "Upload", file: StoredFile) -> None:
        """Name an uploaded file.

        Raises:
            StoreLimitError: meanwhile others have filled the owner's room.
        """
        with self._database.write("add file") as db:
            num_files, num_bytes = self._count(db, file.owner)
            if num_files >= self.limits.max_files:
                raise StoreLimitError("file: others have just filled the room for files")
            if num_bytes + file.num_bytes > self.limits.max_stored_bytes:
                raise upload.no_room
            self.insert(db, file)

    def now(self) -> float:
        """Unix time in seconds."""
        return self._now()

    def _used(self, owner: str) -> tuple[int, int]:
        with self._database.read() as db:
            return self._count(db, owner)

    def _count(self, db: sqlite3.Connection, owner: str) -> tuple[int, int]:
        query = "SELECT count(*), ifnull(sum(num_bytes), 0) FROM files WHERE owner = ?"
        num_files, num_bytes = db.execute(query, (owner,)).fetchone()
        return int(num_files), int(num_bytes)


class Upload:
    """A file that is being written; what is not finished is removed.

    Args:
        store: where it is to be.
        owner: whose it is.
        room: bytes that the owner may still store.
    """

    def __init__(self, store: FileStore, owner: str, room: int) -> None:
        self._store = store
        self._owner = owner
        self._room = room
        self._id = new_file_id()
        self._part = store.path(f".{self._id}.part")
        try:
            self._file = self._part.open("xb")
        except OSError as error:
            raise StoreBusyError(f"the file cannot be written: {error.strerror}") from error
        self.num_bytes = 0

    @property
    def no_room(self) -> StoreLimitError:
        """What is said when the owner's files would be too many bytes."""
        return StoreLimitError(
            f"file: the files of a key may have {self._store.limits.max_stored_bytes} bytes in all "
            "(batches.max_stored_bytes); delete some"
        )

    def write(self, data: bytes) -> None:
        """Append to it.

        Raises:
            StoreLimitError: it gets too large.
            StoreBusyError: the disk does not take it.
        """
        self.num_bytes += len(data)
        if self.num_bytes > self._store.limits.max_file_bytes:
            raise StoreLimitError(
                f"file: it may have at most {self._store.limits.max_file_bytes} bytes "
                "(batches.max_file_bytes)"
            )
        if self.num_bytes > self._room:
            raise self.no_room
        try:
            self._file.write(data)
        except OSError as error:
            raise StoreBusyError(f"the file cannot be written: {error.strerror}") from error

    def finish(self, purpose: str, filename: str, seconds: int | None = None) -> StoredFile:
        """Put the file in place, on the disk, and name it.

        Args:
            purpose: what it is for.
            filename: what the client calls it.
            seconds: how long it is kept; None: until it is deleted.
        """
        try:
            put_in_place(self._file, self._part, self._store.path(self._id))
        except OSError as error:
            raise StoreBusyError(f"the file cannot be written: {error.strerror}") from error
        now = self._store.now()
        expires_at = None if seconds is None else now + seconds
        size = self.num_bytes
        file = StoredFile(
            self._id, self._owner, purpose, filename, size, now, expires_at, blob=self._id
        )
        try:
            self._store.add(self, file)
        except Exception:
            self._store.path(self._id).unlink(missing_ok=True)
            raise
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


def put_in_place(file: BinaryIO, part: Path, place: Path) -> None:
    """Have a file's content on the disk under its last name, all at once."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(part, place)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def new_file_id() -> str:
    """An id that no file has."""
    return f"file-{secrets.token_hex(12)}"


def list_rows(
    db: sqlite3.Connection, table: str, page: Page, owner: str, where: str, values: list[object]
) -> tuple[list[sqlite3.Row], bool]:
    """Rows of a table on a page, and whether there are more.

    Raises:
        NotFoundError: the owner has no `page.after`.
    """
    if page.after is not None:
        query = f"SELECT seq FROM {table} WHERE id = ? AND owner = ?"
        found = db.execute(query, (page.after, owner)).fetchone()
        if found is None:
            raise NotFoundError(f"after: there is no {page.after!r:.100} in this list")
        where += f" AND seq {'>' if page.ascending else '<'} ?"
        values = [*values, found["seq"]]
    order = "ASC" if page.ascending else "DESC"
    query = f"SELECT * FROM {table} WHERE {where} ORDER BY seq {order} LIMIT ?"
    rows = db.execute(query, (*values, page.limit + 1)).fetchall()
    return rows[: page.limit], len(rows) > page.limit


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
