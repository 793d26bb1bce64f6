"""One engine that several parts use at once, so that it is full while one of them ends."""

import queue
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

from saqqara.cluster.engine.client import EngineClient, EngineDescription, Rejection
from saqqara.cluster.engine.report import BatchRows, EngineReport
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput

Output = RequestOutput | ScoreOutput

POLL_SECONDS = 1.0


class SharedEngine:
    """Hands the engine's outputs to whoever asked.

    Args:
        client: the engine; nobody else polls it. `close` leaves it running.
        max_in_flight: requests that it has at once.

    Attributes:
        gate: whoever looks for `room` and then submits holds it.
    """

    def __init__(self, client: EngineClient, max_in_flight: int) -> None:
        self.client = client
        self.gate = threading.Lock()
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        self._owners: dict[str, EngineShare] = {}
        self._shares: set[EngineShare] = set()
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="engine-outputs", daemon=True)
        self._thread.start()

    def share(self) -> "EngineShare":
        """The engine as one of its users sees it."""
        share = EngineShare(self)
        with self._lock:
            self._shares.add(share)
            if self._error is not None:
                share.outputs.put(self._error)
        return share

    def room(self) -> int:
        """How many more requests it may have; never negative."""
        with self._lock:
            return max(0, self._max_in_flight - len(self._owners))

    def submit(self, share: "EngineShare", requests: Sequence[Request]) -> list[Rejection]:
        """Queue the requests of one user; ids that the engine already has come back."""
        fresh: list[Request] = []
        rejections: list[Rejection] = []
        with self._lock:
            for request in requests:
                name = request.request_id
                if name in self._owners:
                    rejections.append(Rejection(name, f"the engine has a request {name} already"))
                else:
                    self._owners[name] = share
                    fresh.append(request)
        refused = self.client.submit(fresh)
        with self._lock:
            for rejection in refused:
                self._owners.pop(rejection.request_id, None)
        return rejections + refused

    def abort(self, share: "EngineShare", request_ids: Iterable[str]) -> None:
        """Stop requests of one user; those of others run on."""
        with self._lock:
            own = [name for name in request_ids if self._owners.get(name) is share]
        self.client.abort(own)

    def leave(self, share: "EngineShare") -> None:
        """Forget a user, and stop what it has left in the engine."""
        with self._lock:
            self._shares.discard(share)
            left = [name for name, owner in self._owners.items() if owner is share]
        if left and self._error is None:
            self.client.abort(left)

    def close(self) -> None:
        """Stop handing out outputs."""
        self._closed.set()
        self._thread.join()

    def _pump(self) -> None:
        try:
            while not self._closed.is_set():
                outputs = self.client.poll(POLL_SECONDS)
                if not outputs:
                    self._closed.wait(0.01)  # of engines that do not wait themselves
                    continue
                found: dict[EngineShare, list[Output]] = defaultdict(list)
                with self._lock:
                    for output in outputs:
                        if (owner := self._owners.pop(output.request_id, None)) is not None:
                            found[owner].append(output)
                for owner, own in found.items():
                    owner.outputs.put(own)
        except BaseException as error:  # every user is told
            with self._lock:
                self._error = error
                for share in self._shares:
                    share.outputs.put(error)


class EngineShare:
    """One user's engine; an `EngineClient`. Outputs are only those of its own requests."""

    def __init__(self, engine: SharedEngine) -> None:
        self._engine = engine
        self.outputs: queue.SimpleQueue[list[Output] | BaseException] = queue.SimpleQueue()

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        """Queue requests; a bad one costs only itself and comes back as a `Rejection`."""
        return self._engine.submit(self, requests)

    def poll(self, timeout_seconds: float = 0.0) -> list[Output]:
        """Outputs since the last call; waits up to `timeout_seconds` for the first."""
        try:
            found = (
                self.outputs.get(timeout=timeout_seconds)
                if timeout_seconds
                else (self.outputs.get_nowait())
            )
        except queue.Empty:
            return []
        if isinstance(found, BaseException):
            raise found if isinstance(found, EngineDeadError) else EngineDeadError(str(found))
        return found

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests; unknown or finished ids are ignored."""
        self._engine.abort(self, request_ids)

    def report(self) -> EngineReport:
        """Measurements of the whole engine."""
        return self._engine.client.report()

    def reset_stats(self) -> None:
        """Start the measurements of the whole engine anew."""
        self._engine.client.reset_stats()

    def note_rows(self, rows: BatchRows) -> None:
        """Show in the metrics how far the engine's rows are."""
        self._engine.client.note_rows(rows)

    def end_conversation(self, conversation_id: str, owner: str = "") -> bool:
        """Give up what is kept of an owner's conversation; whether there was anything."""
        return self._engine.client.end_conversation(conversation_id, owner)

    def reset_prefix_cache(self) -> bool:
        """Give up the cached prefixes that nobody uses; whether none is left."""
        return self._engine.client.reset_prefix_cache()

    def metrics_address(self) -> str | None:
        """Where /metrics is served, or None."""
        return self._engine.client.metrics_address()

    def describe(self) -> EngineDescription:
        """Configuration, workers and addresses."""
        return self._engine.client.describe()

    def shutdown(self) -> None:
        """Leave; the engine runs on for the others."""
        self._engine.leave(self)
