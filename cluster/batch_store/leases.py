"""Who runs a batch: one process at a time, for as long as it says so, fenced by an epoch.

A claim raises the batch's epoch. Everything that a runner writes is written only if the epoch is
still its own, in the same transaction, so that one which was stopped, and comes back after another
has taken over, changes nothing.
"""

import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .database import Database
from .records import ACTIVE, StoredBatch


class LeaseLostError(RuntimeError):
    """Another runner has the batch by now."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a batch: `epoch` is the number of its claims so far."""

    batch: StoredBatch
    holder: str
    epoch: int


class LeaseStore:
    """The leases of all batches.

    Args:
        database: where they are.
        lease_seconds: how long a claim or a renewal lasts.
        now: Unix time in seconds, the same for all processes.
    """

    def __init__(self, database: Database, lease_seconds: float, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now
        self.lease_seconds = lease_seconds

    def num_active(self) -> int:
        """Batches that have not come to their end."""
        marks = ", ".join("?" * len(ACTIVE))
        with self._database.read() as db:
            query = f"SELECT count(*) FROM batches WHERE status IN ({marks})"
            return int(db.execute(query, ACTIVE).fetchone()[0])

    def claim(
        self, holder: str, most_of_an_owner: int, running: Collection[str] = ()
    ) -> Lease | None:
        """Take a batch that nobody runs, if there is one.

        The oldest of the owner of whom the fewest batches are being run comes first. Lines that
        were under way when the last holder fell silent count as lost once more.

        Args:
            holder: a name that no other runner has.
            most_of_an_owner: so many batches of one owner a holder has at once.
            running: batches that this process still runs: if their leases have run out while it was
                stopped, it keeps them, unless others were faster.
        """
        now = self._now()
        marks = ", ".join("?" * len(ACTIVE))
        query = (
            "SELECT id, owner, holder FROM batches AS b WHERE "
            f"status IN ({marks}) AND (holder IS NULL OR lease_until < ?) AND "
            "(SELECT count(*) FROM batches AS c WHERE c.owner = b.owner AND c.holder = ?) < ? "
            f"AND id NOT IN ({', '.join('?' * len(running))}) "
            "ORDER BY (SELECT count(*) FROM batches AS d WHERE d.owner = b.owner "
            "AND d.lease_until >= ?), seq LIMIT 1"
        )
        with self._database.read() as db:  # most of the time there is none, and nobody is held up
            values = (*ACTIVE, now, holder, most_of_an_owner, *running, now)
            if db.execute(query, values).fetchone() is None:
                return None
        with self._database.write("claim") as db:
            found = db.execute(query, values).fetchone()
            if found is None:
                return None
            batch_id = found["id"]
            if found["holder"] is not None:
                self._count_losses(db, batch_id)
            row = db.execute(
                "UPDATE batches SET holder = ?, lease_until = ?, epoch = epoch + 1 WHERE id = ? "
                "RETURNING *",
                (holder, now + self.lease_seconds, batch_id),
            ).fetchone()
        return Lease(StoredBatch.of(row), holder, row["epoch"])

    def renew(self, lease: Lease) -> StoredBatch:
        """Keep a batch for longer, and see how it stands.

        Raises:
            LeaseLostError: another runner has it.
        """
        with self._database.write("renew") as db:
            row = db.execute(
                "UPDATE batches SET lease_until = ? WHERE id = ? AND epoch = ? AND holder = ? "
                "RETURNING *",
                (self._now() + self.lease_seconds, lease.batch.id, lease.epoch, lease.holder),
            ).fetchone()
        if row is None:
            raise LeaseLostError(f"another runner has {lease.batch.id}")
        return StoredBatch.of(row)

    def look(self, lease: Lease) -> StoredBatch:
        """How a batch stands.

        Raises:
            LeaseLostError: another runner has it.
        """
        with self._database.read() as db:
            row = db.execute(
                "SELECT * FROM batches WHERE id = ? AND epoch = ? AND holder = ?",
                (lease.batch.id, lease.epoch, lease.holder),
            ).fetchone()
        if row is None:
            raise LeaseLostError(f"another runner has {lease.batch.id}")
        return StoredBatch.of(row)

    def release(self, lease: Lease) -> None:
        """Hand a batch back, so that another runner takes it at once; nothing counts as lost."""
        with self._database.write("release") as db:
            if _is_held(db, lease):
                db.execute("UPDATE started SET epoch = NULL WHERE batch_id = ?", (lease.batch.id,))
                db.execute(
                    "UPDATE batches SET holder = NULL, lease_until = NULL WHERE id = ?",
                    (lease.batch.id,),
                )

    @contextmanager
    def fenced(self, lease: Lease, name: str) -> Iterator[sqlite3.Connection]:
        """A transaction of a batch's runner.

        Raises:
            LeaseLostError: another runner has the batch, and nothing was written.
        """
        with self._database.write(name) as db:
            if not _is_held(db, lease):
                raise LeaseLostError(f"another runner has {lease.batch.id}")
            yield db

    @staticmethod
    def _count_losses(db: sqlite3.Connection, batch_id: str) -> None:
        db.execute(
            "UPDATE started SET epoch = NULL, num_losses = num_losses + 1 "
            "WHERE batch_id = ? AND epoch IS NOT NULL",
            (batch_id,),
        )


def _is_held(db: sqlite3.Connection, lease: Lease) -> bool:
    row = db.execute("SELECT epoch, holder FROM batches WHERE id = ?", (lease.batch.id,)).fetchone()
    return row is not None and (row["epoch"], row["holder"]) == (lease.epoch, lease.holder)
