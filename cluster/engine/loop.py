"""Drives an engine in a thread of its own, and lets other threads talk to it.

The engine is not thread-safe, so what others want of it (new requests, aborts, reports) is done by
its own thread between two steps. Threads wait for outputs with `take`; `streams.AsyncEngine`,
for coroutines, is a listener that gets the outputs of every step at once.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.request import RequestOutput, ScoreOutput

from .executor import settle

logger = logging.getLogger(__name__)

Output = RequestOutput | ScoreOutput
T = TypeVar("T")

_JOIN_SECONDS = 60.0
_IDLE_SECONDS = 0.5  # then the engine is asked again: its workers may be lost while nothing runs


class Steppable(Protocol):
    """What the loop needs of an engine."""

    def step(self) -> Sequence[Output]:
        """Run one step and return what came out."""
        ...

    def has_unfinished(self) -> bool:
        """Whether another step has something to do."""
        ...

    def shutdown(self) -> None:
        """Release what the engine holds."""
        ...


class Listener(Protocol):
    """Who hears of an engine's outputs; both methods are called by the engine's thread."""

    def deliver(self, outputs: Sequence[Output]) -> None:
        """Take what came out of one step."""
        ...

    def end(self, failure: EngineDeadError) -> None:
        """Nothing more will come, for this reason."""
        ...


class EngineLoop:
    """Steps an engine while it has work, and sleeps while it has none.

    Args:
        engine: owned by the loop from now on.
        listener: gets the outputs; default: they are kept for `take`.
    """

    def __init__(self, engine: Steppable, listener: Listener | None = None) -> None:
        self._engine = engine
        self._listener = listener
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._outputs: list[Output] = []
        self._changed = threading.Condition()
        self._failure: EngineDeadError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps, and return its result.

        Raises:
            EngineDeadError: the engine is gone.
        """
        return self.submit(function).result()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Leave a function for the engine's thread, as `call` does, without waiting for it.

        Raises:
            EngineDeadError: the engine is gone.
        """
        future: Future[T] = Future()

        def run() -> T:
            self.check()
            return function()

        with self._changed:
            self.check()
            self._calls.put(lambda: settle(future, run))
        return future

    def check(self) -> None:
        """Do nothing while the engine lives.

        Raises:
            EngineDeadError: the engine is gone.
        """
        if self._failure is not None:
            raise copy_failure(self._failure)

    def step(self) -> None:
        """Step the engine; only for functions that were given to `call`."""
        assert threading.current_thread() is self._thread, "the engine is its thread's alone"
        outputs = self._engine.step()
        if self._listener is not None:
            self._listener.deliver(outputs)
            return
        with self._changed:
            self._outputs.extend(outputs)
            self._changed.notify_all()

    def take(self, timeout_seconds: float = 0.0) -> list[Output]:
        """Outputs since the last call; waits up to `timeout_seconds` for the first.

        Raises:
            EngineDeadError: the engine is gone and its last outputs have been taken.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._outputs or self._failure is not None, timeout_seconds
            )
            outputs, self._outputs = self._outputs, []
            if not outputs:
                self.check()
        return outputs

    def stop(self) -> None:
        """End the thread and shut the engine down; calling it again does nothing."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._calls.put(lambda: None)
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("the engine's step has not ended after %g s", _JOIN_SECONDS)
        self._engine.shutdown()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._serve_calls(wait=not self._engine.has_unfinished())
                if not self._stopping and self._engine.has_unfinished():
                    self.step()
            self._end(EngineDeadError("the engine was shut down"))
        except Exception as error:
            logger.exception("the engine has failed")
            reason = "; ".join([f"{type(error).__name__}: {error}", *_notes(error)])
            failure = EngineDeadError(f"the engine has failed: {reason}")
            # What a lost engine has lost tells more than that it is lost.
            is_told = isinstance(error, EngineDeadError) and error.__cause__ is not None
            failure.__cause__ = error.__cause__ if is_told else error
            self._end(failure)

    def _serve_calls(self, wait: bool) -> None:
        timeout = _IDLE_SECONDS if wait else 0.0
        while True:
            try:
                call = self._calls.get(timeout=timeout) if timeout else self._calls.get_nowait()
            except Empty:
                return
            timeout = 0.0
            call()

    def _end(self, failure: EngineDeadError) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
        self._serve_calls(wait=False)
        if self._listener is not None:
            self._listener.end(failure)


def _notes(error: Exception) -> list[str]:
    """What was added to an error on its way, such as the requests in the step that failed."""
    return getattr(error, "__notes__", [])


def copy_failure(failure: EngineDeadError) -> EngineDeadError:
    """The same error for another caller: raising one object twice would chain its tracebacks."""
    copy = EngineDeadError(str(failure))
    copy.__cause__ = failure.__cause__
    return copy
