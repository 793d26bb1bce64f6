"""An engine that outlives its controller, for jobs: another one takes over what had not ended."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from saqqara.cluster.engine.client import EngineClient, EngineDescription, Rejection
from saqqara.cluster.engine.report import BatchRows, EngineReport
from saqqara.cluster.errors import ControllerLostError, EngineDeadError
from saqqara.cluster.recovery.attempts import Attempts, RecoveryLimits
from saqqara.cluster.recovery.clock import Clock
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput

logger = logging.getLogger(__name__)

_LEAST_SECONDS = 1e-6  # of a request whose time is over: the engine ends it at once
CONTROLLER = "controller"  # beside the causes of lost workers, in reports
T = TypeVar("T")


class FailoverClient:
    """An `EngineClient` that starts another engine when its controller is lost.

    Requests that had not ended are submitted again under their ids, from which the noise of their
    sampling follows, so their answers are those that they would have had. The caller notices but
    for time. Requests must not stream: what was told of one could not be taken back.

    Args:
        start: starts an engine.
        limits: how often, counted since the last answer.
        clock: default: the machine's.

    Raises:
        Exception: what the first start has ended with.
    """

    def __init__(
        self,
        start: Callable[[], EngineClient],
        limits: RecoveryLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._start = start
        self._clock = clock or Clock()
        self._attempts = Attempts(limits or RecoveryLimits(), self._clock)
        self._lock = threading.Lock()
        self._unfinished: dict[str, Request] = {}
        self._due: dict[str, float] = {}  # of these, where they have a time to end by
        self._unsent: set[str] = set()  # of these, on their way to an engine by their own caller
        self._latest: EngineReport | None = None
        self._recoveries: Counter[str] = Counter()
        self._down_seconds = 0.0
        self._lost_at: float | None = None  # until there is an answer
        self._client = start()

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        """Queue requests; a bad one costs only itself and comes back as a `Rejection`."""
        assert not any(request.stream for request in requests), "what was told cannot be taken back"
        with self._lock:
            new = {r.request_id: r for r in requests if r.request_id not in self._unfinished}
            self._unfinished |= new
            self._unsent |= new.keys()
            self._due |= {
                name: self._clock.now() + request.timeout_seconds
                for name, request in new.items()
                if request.timeout_seconds is not None
            }
        rejections = self._send(requests)
        with self._lock:
            for rejection in rejections:
                if rejection.request_id in new:  # else another one of that id is under way
                    self._end(rejection.request_id)
        return rejections

    def poll(self, timeout_seconds: float = 0.0) -> list[RequestOutput | ScoreOutput]:
        """Outputs since the last call; waits up to `timeout_seconds` for the first.

        Where the controller is lost meanwhile, this waits for another one.

        Raises:
            EngineDeadError: no other one could be started, or the engine is lost for good.
        """
        found = self._call(lambda client: client.poll(timeout_seconds))
        with self._lock:  # an answer of an engine that is gone may come again from the next
            outputs = [o for o in found if self._end(o.request_id)]
        if outputs:
            self._note_answer()
        return outputs

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests; unknown or finished ids are ignored."""
        ids = list(request_ids)
        self._call(lambda client: client.abort(ids))

    def report(self) -> EngineReport:
        """Measurements of the engine that runs now; `recoveries`, `down_seconds` are of all.

        What a lost controller had recovered from is that of the last report before its loss.
        """
        report = self._latest = self._call(lambda client: client.report())
        if not self._recoveries:
            return report
        recoveries = self._recoveries + Counter(report.recoveries)
        seconds = self._down_seconds + report.down_seconds
        return report.model_copy(update={"recoveries": dict(recoveries), "down_seconds": seconds})

    def reset_stats(self) -> None:
        """Start the measurements anew."""
        self._call(lambda client: client.reset_stats())
        self._recoveries.clear()
        self._down_seconds = 0.0
        self._latest = None

    def note_rows(self, rows: BatchRows) -> None:
        """Show in the metrics how far the batch job is that runs on this engine."""
        self._call(lambda client: client.note_rows(rows))

    def end_conversation(self, conversation_id: str, owner: str = "") -> bool:
        """Give up what is kept of an owner's conversation; whether there was anything."""
        return self._call(lambda client: client.end_conversation(conversation_id, owner))

    def reset_prefix_cache(self) -> bool:
        """Give up the cached prefixes that nobody uses; whether none is left."""
        return self._call(lambda client: client.reset_prefix_cache())

    def metrics_address(self) -> str | None:
        """Where /metrics is served, or None."""
        return self._client.metrics_address()

    def describe(self) -> EngineDescription:
        """Configuration, workers and addresses of the engine that runs now."""
        return self._client.describe()

    def shutdown(self) -> None:
        """Stop the engine and release all it holds; calling it again does nothing."""
        self._client.shutdown()

    def _end(self, request_id: str) -> bool:
        """Whether the request had not ended before."""
        self._due.pop(request_id, None)
        return self._unfinished.pop(request_id, None) is not None

    def _rest(self, request: Request) -> Request:
        """A request with the time that it still has."""
        due = self._due.get(request.request_id)
        if due is None:
            return request
        return replace(request, timeout_seconds=max(due - self._clock.now(), _LEAST_SECONDS))

    def _call(self, function: Callable[[EngineClient], T]) -> T:
        while True:
            client = self._client
            try:
                return function(client)
            except ControllerLostError as error:
                self._fail_over(client, error)

    def _send(self, requests: Sequence[Request]) -> list[Rejection]:
        """Submit to an engine that has taken over whatever was sent before, and lives after it."""
        while True:
            client = self._client
            try:
                rejections = client.submit(requests)
            except ControllerLostError as error:
                self._fail_over(client, error)
                continue
            with self._lock:
                if client is self._client:  # else the next one has not heard of them
                    self._unsent.difference_update(request.request_id for request in requests)
                    return rejections

    def _note_answer(self) -> None:
        self._attempts.forget()
        if self._lost_at is not None:
            seconds = self._clock.now() - self._lost_at
            logger.warning("the first answer comes %.1f s after a controller was lost", seconds)
            self._lost_at = None

    def _fail_over(self, lost: EngineClient, error: ControllerLostError) -> None:
        """End what is left of an engine and start another, unless somebody has meanwhile."""
        with self._lock:
            if self._client is not lost:
                return
            logger.error("%s; %d requests had not ended", error, len(self._unfinished))
            since = self._clock.now()
            self._lost_at = self._lost_at or since
            lost.shutdown()
            self._client = self._start_next(error)
            seconds = self._clock.now() - since
            logger.warning("another controller has taken over after %.1f s", seconds)
            if self._latest is not None:
                self._recoveries.update(self._latest.recoveries)
                self._down_seconds += self._latest.down_seconds
            self._latest = None
            self._recoveries[CONTROLLER] += 1
            self._down_seconds += seconds

    def _start_next(self, error: RuntimeError) -> EngineClient:
        """Another engine that has all requests that had not ended."""
        while not self._attempts.is_hopeless:
            self._clock.sleep(self._attempts.wait_seconds)
            self._attempts.begin()
            client: EngineClient | None = None
            try:
                client = self._start()
                refused = client.submit(
                    [
                        self._rest(request)
                        for name, request in self._unfinished.items()
                        if name not in self._unsent
                    ]
                )
            except RuntimeError as failure:  # the engine's, and that there is no room
                logger.error("no other controller has started: %s", failure)
                error = failure
                if client is not None:
                    client.shutdown()
                continue
            if refused:
                client.shutdown()
                raise EngineDeadError(
                    f"another controller refuses request {refused[0].request_id}: "
                    f"{refused[0].error}"
                )
            return client
        raise EngineDeadError(
            f"the controller is given up after {self._attempts.num_recent} starts without an "
            f"answer; the last ended with: {error}"
        ) from error
