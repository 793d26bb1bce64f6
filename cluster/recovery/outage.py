"""The time from the loss of workers until there are others: wait, start, wait for the start.

An `Outage` is asked again and again and never blocks for long, so that the engine's thread can take
in requests and aborts meanwhile.
"""

import logging
from concurrent.futures import Future
from typing import Protocol

from saqqara.cluster.errors import Cause, EngineDeadError, NotRecoverableError, WorkerDiedError

from .attempts import Attempts
from .clock import Clock

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


class Recoverable(Protocol):
    """What can start its workers anew."""

    def recover(self) -> "Future[None]":
        """Tear the workers down and start others; done when they can take plans."""
        ...


class Outage:
    """One loss of workers.

    Args:
        failure: what ended them.
        executor: whose workers they were.
        attempts: all the starts so far, of earlier outages, too.
        clock: of the engine.

    Attributes:
        cause: how they were lost.
        since: when, on `clock`.

    Raises:
        EngineDeadError: there is no point in another start.
    """

    def __init__(
        self,
        failure: WorkerDiedError,
        executor: Recoverable,
        attempts: Attempts,
        clock: Clock,
    ) -> None:
        self.cause: Cause = failure.cause
        self.since = clock.now()
        self._executor = executor
        self._attempts = attempts
        self._clock = clock
        self._starting: Future[None] | None = None
        self._start_after(failure)

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return self._clock.now() - self.since

    def is_over(self) -> bool:
        """Whether there are new workers; goes on with what is to be done if not.

        Raises:
            EngineDeadError: there is no point in another start.
        """
        if self._starting is None:
            left = self._start_time - self._clock.now()
            if left > 0:
                self._clock.sleep(min(left, _POLL_SECONDS))
                return False
            self._attempts.begin()
            self._starting = self._executor.recover()
        self._clock.wait(self._starting, _POLL_SECONDS)
        if not self._starting.done():
            return False
        error = self._starting.exception()
        if error is None:
            return True
        if isinstance(error, NotRecoverableError) or not isinstance(error, Exception):
            raise EngineDeadError(f"workers are lost for good: {error}") from error
        logger.error("lost workers could not be started again: %s", error)
        self._starting = None
        self._start_after(error)
        return False

    def _start_after(self, error: Exception) -> None:
        attempts = self._attempts
        if attempts.is_hopeless:
            raise EngineDeadError(
                f"the workers are given up after {attempts.num_recent} starts without a new token "
                f"in {attempts.limits.window_seconds:g} s; the last ended with: {error}"
            ) from error
        wait_seconds = attempts.wait_seconds
        self._start_time = self._clock.now() + wait_seconds
        logger.warning(
            "workers are started again in %g s, attempt %d of %d",
            wait_seconds,
            attempts.num_recent + 1,
            attempts.limits.max_attempts,
        )
