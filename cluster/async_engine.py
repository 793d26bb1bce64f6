"""The engine for asyncio: one thread steps it, coroutines stream what it says."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from .engine import Engine, Prompt
from .engine_loop import EngineDeadError
from .report import EngineReport
from .request import RequestOutput, SamplingParams, ScoreOutput

logger = logging.getLogger(__name__)

Output = RequestOutput | ScoreOutput
T = TypeVar("T")


class _Stream:
    """Carries the outputs of one request from the engine's thread to the loop that waits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Output | Exception] = asyncio.Queue()

    def put(self, item: Output | Exception) -> None:
        """Hand over an output; called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed, so nobody waits any more
            logger.debug("an output came after its event loop was closed")

    async def get(self) -> Output:
        """The next output, or the exception that ended the engine."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


class AsyncEngine:
    """Streams requests through an `Engine`, which belongs to this object's thread from now on.

    The engine is not thread-safe, so what coroutines want of it is done by its thread between two
    steps; the thread sleeps while there is nothing to do.

    Args:
        engine: not to be touched by anyone else any more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[str, _Stream] = {}  # touched by the engine's thread only
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._gate = threading.Lock()  # orders posts before, or after, the end
        self._failure: EngineDeadError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="async-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        request_id: str,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        **settings: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Stream the outputs of a request, each with all of its text so far; the last is finished.

        Leaving the iteration, or cancelling it, aborts the request.

        Args:
            request_id: any name that no unfinished request has.
            prompt: text or token ids.
            sampling_params: default: `SamplingParams()`.
            settings: `messages`, `retention`, `budget`, `priority` of `Engine.add_request`.

        Raises:
            ValueError: this request cannot be served.
            EngineDeadError: the engine has failed or was shut down.
        """

        def add() -> None:
            self._engine.add_request(request_id, prompt, sampling_params, **settings)

        async with aclosing(self._serve(request_id, add)) as outputs:
            async for output in outputs:
                assert isinstance(output, RequestOutput)
                yield output

    async def score(
        self, request_id: str, prompt: Prompt | None, continuation: Prompt, **settings: Any
    ) -> ScoreOutput:
        """Score a continuation; see `Engine.add_score_request`.

        Raises:
            ValueError: this request cannot be served.
            EngineDeadError: the engine has failed or was shut down.
        """

        def add() -> None:
            self._engine.add_score_request(request_id, prompt, continuation, **settings)

        async with aclosing(self._serve(request_id, add)) as outputs:
            async for output in outputs:
                assert isinstance(output, ScoreOutput)
                return output
        raise AssertionError("a request ended without its last output")

    async def abort(self, request_id: str) -> None:
        """Stop a request: its stream ends with an output that is finished, reason `abort`."""
        await self._call(lambda: self._engine.abort(request_id))

    async def report(self) -> EngineReport:
        """Measurements since the start or the last `reset_stats`."""
        return await self._call(self._engine.report)

    async def reset_stats(self) -> None:
        """Start the measurements anew."""
        await self._call(self._engine.reset_stats)

    def shutdown(self) -> None:
        """End the thread after its step, and the engine; who still waits gets `EngineDeadError`.

        Calling it again does nothing. Blocks for as long as a step takes.
        """
        self._stopping = True
        self._inbox.put(lambda: None)
        self._thread.join()

    async def _serve(
        self, request_id: str, add: Callable[[], None]
    ) -> AsyncGenerator[Output, None]:
        stream = _Stream()

        def begin() -> None:
            add()
            self._streams[request_id] = stream

        def leave() -> None:
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]
                self._engine.abort(request_id)

        is_finished = False
        try:
            await self._call(begin)
            while not is_finished:
                output = await stream.get()
                is_finished = output.finished
                yield output
        finally:
            if not is_finished:
                self._post(leave)

    async def _call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def give(result: T | None, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result: T | None = None
            error: Exception | None = self._copy_failure()
            if error is None:
                try:
                    result = function()
                except Exception as raised:
                    error = raised
            try:
                loop.call_soon_threadsafe(give, result, error)
            except RuntimeError:  # the loop is closed, so nobody waits any more
                logger.debug("a call was answered after its event loop was closed")

        if not self._post(run):
            error = self._copy_failure()
            assert error is not None
            raise error
        return await future

    def _post(self, function: Callable[[], None]) -> bool:
        """Leave a function for the engine's thread; False if that has ended."""
        with self._gate:
            if self._failure is None:
                self._inbox.put(function)
            return self._failure is None

    def _run(self) -> None:
        failure = EngineDeadError("the engine was shut down")
        try:
            while not self._stopping:
                self._empty_inbox(wait=not self._engine.has_unfinished())
                if not self._stopping and self._engine.has_unfinished():
                    self._deliver(self._engine.step())
        except Exception as error:
            logger.exception("the engine has failed")
            failure = EngineDeadError(f"the engine has failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        finally:
            self._end(failure)

    def _empty_inbox(self, *, wait: bool) -> None:
        if wait:
            self._inbox.get()()
        while True:
            try:
                function = self._inbox.get_nowait()
            except Empty:
                return
            function()

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
            if output.finished:
                self._streams.pop(output.request_id, None)

    def _end(self, failure: EngineDeadError) -> None:
        with self._gate:
            self._failure = failure
        self._empty_inbox(wait=False)
        for stream in self._streams.values():
            error = self._copy_failure()
            assert error is not None
            stream.put(error)
        self._streams.clear()
        self._engine.shutdown()

    def _copy_failure(self) -> EngineDeadError | None:
        """A fresh error for every waiter: raising one object twice would chain its tracebacks."""
        if self._failure is None:
            return None
        copy = EngineDeadError(str(self._failure))
        copy.__cause__ = self._failure.__cause__
        return copy
