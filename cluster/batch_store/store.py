"""The folder of a server's files and batches."""

import time
from collections.abc import Callable
from pathlib import Path

from saqqara.configs.schema import BatchLimits

from .batches import BatchStore
from .database import Database
from .files import FileStore
from .leases import LeaseStore
from .progress import Progress


class Store:
    """Files and batches, and what their runners need; for any thread, and several processes.

    Args:
        folder: where all of it lies, on a file system of this machine; made where it is not there.
        limits: how much there may be.
        now: Unix time in seconds, the same for all processes.
        at_commit: see `Database`.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        limits: BatchLimits | None = None,
        now: Callable[[], float] = time.time,
        at_commit: Callable[[str], None] | None = None,
    ) -> None:
        self.limits = limits or BatchLimits()
        self.now = now
        contents = folder / "files"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            contents.mkdir(mode=0o700, exist_ok=True)  # what clients send is no other user's
        except OSError as error:
            raise ValueError(f"batch_dir: cannot use {folder}: {error.strerror}") from None
        path = folder / "batches.sqlite"
        self.database = Database(path) if at_commit is None else Database(path, at_commit)
        self.files = FileStore(contents, self.database, self.limits, now)
        self.batches = BatchStore(self.database, self.limits, now)
        self.leases = LeaseStore(self.database, self.limits.lease_seconds, now)
        self.progress = Progress(self.database, self.leases, self.files, now)

    def close(self) -> None:
        """Let go of the folder."""
        self.database.close()
