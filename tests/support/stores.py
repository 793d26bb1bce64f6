"""A store of files and batches with a clock that tests turn, and crashes where they say."""

from pathlib import Path
from typing import Any

from saqqara.cluster.batch_store.leases import Lease
from saqqara.cluster.batch_store.records import NewBatch, StoredBatch, StoredFile
from saqqara.cluster.batch_store.store import Store
from saqqara.configs.schema import BatchLimits

from .batch_lines import completion_line, jsonl

ME, YOU = "owner-me", "owner-you"
DAY = 24 * 3600.0


class CrashError(BaseException):
    """The process has ended here: nobody handles it, so nothing is tidied up."""


class Stores:
    """Stores over one folder, as processes have them.

    Attributes:
        time: what their clocks say.
        crash_at: the commit that does not come, or is the last thing that does.
        commits: the names of all commits so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.time = 1_000_000.0
        self.crash_at: str | None = None
        self.commits: list[str] = []
        self._opened: list[Store] = []

    def open(self, **limits: Any) -> Store:
        """Another process."""
        store = Store(self.folder, BatchLimits(**limits), lambda: self.time, self._at_commit)
        self._opened.append(store)
        return store

    def close(self) -> None:
        """End them all."""
        for store in self._opened:
            store.close()

    def _at_commit(self, point: str) -> None:
        self.commits.append(point)
        if point == self.crash_at:
            self.crash_at = None
            raise CrashError(point)


def upload(
    store: Store, content: bytes, owner: str = ME, purpose: str = "batch", name: str = "in.jsonl"
) -> StoredFile:
    """A file in the store."""
    with store.files.begin(owner) as file:
        file.write(content)
        return file.finish(purpose, name)


def new_batch(store: Store, num_lines: int = 3, owner: str = ME, **more: Any) -> StoredBatch:
    """A batch over a file of so many lines."""
    lines = [completion_line(f"row-{i}", f"text {i}") for i in range(1, num_lines + 1)]
    file = upload(store, jsonl(lines), owner)
    return store.batches.create(owner, NewBatch(file.id, "/v1/completions", "24h", DAY, **more))


def claimed(store: Store, holder: str = "one") -> Lease:
    """The lease of a batch that nobody runs."""
    lease = store.leases.claim(holder, most_of_an_owner=4)
    assert lease is not None
    return lease


def content_of(store: Store, file_id: str | None, owner: str = ME) -> bytes:
    """What is in a file; nothing if there is none."""
    if file_id is None:
        return b""
    with store.files.open(store.files.get(owner, file_id)) as file:
        return file.read()
