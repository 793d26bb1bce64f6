"""One replica of a job: an engine that is given parts, and commits each."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from saqqara.cluster.batch.answers import AnswerSettings, RowLoop, final_report
from saqqara.cluster.batch.fingerprint import resolved_settings
from saqqara.cluster.batch.records import Record
from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.engine.report import BatchRows, EngineReport
from saqqara.cluster.launch import launch_lasting

from .cutting import Part
from .folder import OutputFolder
from .job_file import settle
from .rows import rows_of
from .shared_engine import SharedEngine

PARTS_AT_ONCE = 2  # of one engine: the next one fills it while the last rows of another end
TELL_SECONDS = 1.0
_TURN_SECONDS = 0.1  # rows of one part wait at most so long for room that another leaves


@dataclass(frozen=True, slots=True)
class PartWork:
    """A part to answer, or rows of one to answer again.

    Attributes:
        part: what is answered, or, with `retried`, is there.
        retried: lines whose records an earlier run has left as errors; the others stay.
    """

    part: Part
    retried: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class PartCounts:
    """How far a part is.

    Attributes:
        index: of the part.
        answered, errors: records written in this run.
        kept: records of an earlier run that stay.
    """

    index: int
    answered: int = 0
    errors: int = 0
    kept: int = 0


@dataclass(frozen=True, slots=True)
class PartResult:
    """A part that is committed: its counts, and what its replica has measured so far.

    However often a part is run, its counts are those of this run of the job.
    """

    counts: PartCounts
    replica: str
    report: EngineReport


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What every replica of a job knows. Picklable."""

    answers: AnswerSettings
    folder: OutputFolder
    prompt_column: str | None = None
    mix_settings: bool = False


MakeClient = Callable[[], EngineClient]
Alone = Callable[[Callable[[], None]], None]
"""Calls a function, which is picklable, while no other replica of the job calls one."""


class Tell(Protocol):
    """Is told how far a replica is."""

    def __call__(
        self,
        replica: str,
        counts: PartCounts | None = None,
        report: EngineReport | None = None,
    ) -> None:
        """Take in what is new of a replica: of one of its parts, and of its engine.

        The first call, without both, says that the engine is up.
        """
        ...


class PartReplica:
    """Answers parts with one engine, several at once; methods may be called from any thread.

    Args:
        settings: of the job.
        name: of the replica, for reports.
        tell: is told how far each part is.
        alone: compares what engines have come to, one after another.
        client: the engine, which the replica shuts down; default: it starts one.

    Raises:
        ValueError: the engine comes to another device, dtype or backend than that of the answers
            that are there.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        name: str,
        tell: Tell,
        alone: Alone,
        client: EngineClient | None = None,
    ) -> None:
        self.name = name
        self._settings = settings
        self._tell = tell
        self._client = client or launch_lasting(settings.answers.config)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._num_given = self._num_done = 0
        try:
            workers = self._client.describe().workers
            resolved = resolved_settings(settings.answers.config, workers)
            alone(partial(settle, settings.folder, resolved, settings.mix_settings))
        except BaseException:
            self._client.shutdown()
            raise
        self._most_in_flight = settings.answers.most_in_flight(self._client)
        self._engine = SharedEngine(self._client, self._most_in_flight)
        tell(name)

    def run(self, work: PartWork) -> PartResult | None:
        """Answer a part and commit it; None if the replica was stopped before its end.

        Raises:
            ValueError: the input was changed.
            WriteError: the records cannot be written.
            EngineDeadError: the engine failed.
        """
        part, folder = work.part, self._settings.folder
        if not work.retried and folder.is_committed(part.index):
            # A replica was killed between that and its report.
            return self._result(_counted(part, folder))
        with folder.stage(part.index) as staged:
            writer = _PartWriter(self, work)
            writer.keep(staged.write)
            writer.run(staged.write)
            if self._stopped.is_set():
                return None
            counts = writer.counts()
            num_records = counts.answered + counts.errors + counts.kept
            assert num_records == part.num_rows, (num_records, part)
            staged.commit()
        return self._result(counts)

    def stop(self) -> None:
        """Let `run` return early; nothing of an unfinished part is committed."""
        self._stopped.set()

    def close(self) -> None:
        """Shut the engine down."""
        self._stopped.set()
        self._engine.close()
        self._client.shutdown()

    def note(self, num_given: int, num_answered: int, num_errors: int) -> None:
        """Show in the engine's metrics what it was given and what it has done."""
        with self._lock:
            self._num_given += num_given
            self._num_done += num_answered + num_errors
            rows = BatchRows(
                num_rows=self._num_given,
                num_left=self._num_given - self._num_done,
                num_answered=num_answered,
                num_errors=num_errors,
            )
        self._client.note_rows(rows)

    def _result(self, counts: PartCounts) -> PartResult:
        busy = self._engine.room() < self._most_in_flight
        report = self._client.report() if busy else final_report(self._client)
        self._tell(self.name, counts, report)
        return PartResult(counts, self.name, report)


class _PartWriter:
    """Runs the rows of one part and counts their records."""

    def __init__(self, replica: PartReplica, work: PartWork) -> None:
        self._replica = replica
        self._work = work
        self._left = set(work.retried)
        self._answered = self._errors = self._kept = 0
        self._noted = (0, 0)
        self._told = time.monotonic()

    def keep(self, write: Callable[[Record], None]) -> None:
        """Write the records that stay, one at a time.

        A good one on a retried line is of this run: a replica was killed after its commit.
        """
        if not self._work.retried:
            return
        for record in self._replica._settings.folder.records(self._work.part.index):
            line = int(record["line"])
            if line not in self._work.retried:
                self._kept += 1
            elif record["error"] is None:
                self._answered += 1
                self._left.remove(line)
            else:
                continue
            write(record)

    def run(self, write: Callable[[Record], None]) -> None:
        """Run the rows that have no record that stays."""
        replica, part = self._replica, self._work.part
        settings = replica._settings
        parser = settings.answers.parser(part.label)
        rows = rows_of(part, parser, settings.prompt_column)
        self._note(part.num_rows - self._kept)
        engine, share = replica._engine, replica._engine.share()

        def write_named(record: Record) -> None:
            write(_named(record, part.label))
            self._answered += record["error"] is None
            self._errors += record["error"] is not None

        try:
            RowLoop(
                share,
                settings.answers,
                write_named,
                self._tick,
                replica._stopped.is_set,
                room=lambda _: engine.room(),
                gate=engine.gate,
                poll_seconds=_TURN_SECONDS,
            ).run(row for row in rows if not self._work.retried or row.line in self._left)
        finally:
            share.shutdown()

    def counts(self) -> PartCounts:
        """How far the part is."""
        return PartCounts(self._work.part.index, self._answered, self._errors, self._kept)

    def _tick(self, is_last: bool) -> None:
        now = time.monotonic()
        if not is_last and now - self._told < TELL_SECONDS:
            return
        self._told = now
        self._note(0)
        replica = self._replica
        replica._tell(replica.name, self.counts(), replica._client.report())

    def _note(self, num_given: int) -> None:
        answered, errors = self._noted
        self._noted = (self._answered, self._errors)
        self._replica.note(num_given, self._answered - answered, self._errors - errors)


def _named(record: Record, label: str) -> Record:
    """A record that says which file its line is of."""
    if "id" in record:
        record = {**record, "id": f"batch_req_{label}:{record['line']}"}
    return {"file": label, **record}


def _counted(part: Part, folder: OutputFolder) -> PartCounts:
    """The counts of a part that is there, read from its records."""
    errors: list[Any] = [record["error"] for record in folder.records(part.index)]
    failed = sum(error is not None for error in errors)
    return PartCounts(part.index, answered=len(errors) - failed, errors=failed)
