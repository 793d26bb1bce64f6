"""Several replicas on Ray, as a pool."""

import queue
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import cast

from saqqara.cluster.on_ray.data import ReplicaFleet

from .pool import Event, Tally, next_of
from .replica import (
    PARTS_AT_ONCE,
    Alone,
    MakeClient,
    PartReplica,
    PartResult,
    PartWork,
    ReplicaSettings,
    Tell,
)

_CLOSE_SECONDS = 60.0  # Ray Data may be amid the start of its actors
_TURN_SECONDS = 0.1


class RayPool:
    """Replicas on Ray, fed by Ray Data.

    Args:
        settings: of the job.
        num_replicas: how many.
        make_client: makes a replica's engine, in its process; default: as the settings say.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        num_replicas: int,
        make_client: MakeClient | None = None,
    ) -> None:
        self._started = time.monotonic()
        self.start_seconds = 0.0
        self._events: queue.SimpleQueue[PartResult | BaseException] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._fleet = ReplicaFleet(
            settings.answers.config,
            partial(start_replica, settings, make_client),
            num_replicas,
            PARTS_AT_ONCE,
            Tally(),
        )

    def begin(self, works: Sequence[PartWork]) -> None:
        """Start answering."""
        thread = threading.Thread(target=self._work, args=(works,), name="ray-data", daemon=True)
        self._threads.append(thread)
        thread.start()

    def next(self, timeout_seconds: float) -> Event:
        """See `Pool`."""
        if not self.start_seconds and self.tally().ready:
            self.start_seconds = time.monotonic() - self._started
        return next_of(self._events, self._threads, timeout_seconds)

    def tally(self) -> Tally:
        """How far all parts are."""
        return cast(Tally, self._fleet.board())

    def close(self) -> None:
        """End everything; parts that are not committed are lost."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._fleet.stop()
        for thread in self._threads:
            while thread.is_alive() and time.monotonic() < deadline:
                self._fleet.stop()
                thread.join(_TURN_SECONDS)
        self._fleet.close()

    def _work(self, works: Sequence[PartWork]) -> None:
        try:
            for result in self._fleet.results(works):
                self._events.put(result)
        except BaseException as error:  # the caller raises it
            self._events.put(error)


def start_replica(
    settings: ReplicaSettings, make_client: MakeClient | None, name: str, tell: Tell, alone: Alone
) -> PartReplica:
    """A replica, in the process that it is called in."""
    return PartReplica(settings, name, tell, alone, make_client and make_client())
