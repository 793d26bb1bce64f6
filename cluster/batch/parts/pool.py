"""Where parts are answered: by one replica in this process, or by several on Ray."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.engine.report import EngineReport

from .replica import (
    PARTS_AT_ONCE,
    MakeClient,
    PartCounts,
    PartReplica,
    PartResult,
    PartWork,
    ReplicaSettings,
)

LOCAL = "replica 0"


@dataclass(slots=True)
class Tally:
    """How far all replicas are. A part that is begun anew is counted anew.

    Attributes:
        parts: the counts of each part that was begun in this run.
        reports: the last measurements of each replica.
        ready: replicas whose engine is up.
    """

    parts: dict[int, PartCounts] = field(default_factory=dict)
    reports: dict[str, EngineReport] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)

    def note(
        self,
        replica: str,
        counts: PartCounts | None = None,
        report: EngineReport | None = None,
    ) -> None:
        """See `Tell`."""
        self.ready.add(replica)
        if counts is not None:
            self.parts[counts.index] = counts
        if report is not None:
            before = self.reports.get(replica)
            if before is None or _time_of(report) >= _time_of(before):
                self.reports[replica] = report

    def over(self, other: "Tally") -> "Tally":
        """What this one knows, and of everything else what the other does."""
        return Tally(
            {**other.parts, **self.parts},
            {**self.reports, **other.reports},
            self.ready | other.ready,
        )

    def totals(self) -> tuple[int, int]:
        """Answered rows and errors of this run."""
        counts = list(self.parts.values())
        return sum(c.answered for c in counts), sum(c.errors for c in counts)


def _time_of(report: EngineReport) -> tuple[float, bool]:
    """What later reports of an engine have more of; the last one is of an engine at rest."""
    return report.wall_seconds, report.pages_leaked is not None


class Over:
    """Nothing more will come."""


Event = PartResult | BaseException | Over | None


def next_of(
    events: "queue.SimpleQueue[PartResult | BaseException]",
    threads: Sequence[threading.Thread],
    timeout_seconds: float,
) -> Event:
    """What has come from the threads; `Over` once all have ended and everything is taken."""
    alive = any(
        thread.is_alive() for thread in threads
    )  # asked first: its last event is there then
    try:
        return events.get(timeout=timeout_seconds if alive else 0)
    except queue.Empty:
        return None if alive else Over()


class Pool(Protocol):
    """Answers parts beside the caller, who takes what comes of it."""

    @property
    def start_seconds(self) -> float:
        """How long it took until the first engine was up; 0.0 until then."""
        ...

    def begin(self, works: Sequence[PartWork]) -> None:
        """Start answering."""
        ...

    def next(self, timeout_seconds: float) -> Event:
        """A committed part, or what has failed; None when the time is up.

        `Over` when no part is left that is answered, whether or not all have come.
        """
        ...

    def tally(self) -> Tally:
        """How far all parts are, to show; what counts in the end are the events."""
        ...

    def close(self) -> None:
        """End everything; parts that are not committed are lost."""
        ...


class LocalPool:
    """One replica in this process.

    Args:
        settings: of the job.
        client: an engine, which `close` shuts down; default: it makes one.
        make_client: makes it; default: as the settings say.
    """

    start_seconds = 0.0

    def __init__(
        self,
        settings: ReplicaSettings,
        client: EngineClient | None = None,
        make_client: MakeClient | None = None,
    ) -> None:
        self._tally = Tally()
        self._events: queue.SimpleQueue[PartResult | BaseException] = queue.SimpleQueue()
        started = time.monotonic()
        self._replica = PartReplica(
            settings,
            LOCAL,
            self._tally.note,
            lambda call: call(),
            client or (make_client and make_client()),
        )
        self.start_seconds = time.monotonic() - started
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def begin(self, works: Sequence[PartWork]) -> None:
        """Start answering."""
        left = iter(works)
        self._threads = [
            threading.Thread(target=self._work, args=(left,), name=f"part-{i}", daemon=True)
            for i in range(PARTS_AT_ONCE)
        ]
        for thread in self._threads:
            thread.start()

    def next(self, timeout_seconds: float) -> Event:
        """See `Pool`."""
        return next_of(self._events, self._threads, timeout_seconds)

    def tally(self) -> Tally:
        """How far all parts are."""
        return self._tally

    def close(self) -> None:
        """End everything; parts that are not committed are lost."""
        self._replica.stop()
        for thread in self._threads:
            thread.join()
        self._replica.close()

    def _work(self, left: Iterator[PartWork]) -> None:
        try:
            while True:
                with self._lock:
                    work = next(left, None)
                if work is None:
                    return
                result = self._replica.run(work)
                if result is None:
                    return
                self._events.put(result)
        except BaseException as error:  # the caller raises it
            self._events.put(error)
