"""The engine for asyncio: coroutines stream what an `EngineLoop` steps."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from saqqara.cluster.request import RequestOutput, SamplingParams, ScoreOutput

from .engine import Engine, Prompt
from .loop import EngineDeadError, EngineLoop, Output, copy_failure
from .report import EngineReport

logger = logging.getLogger(__name__)

T = TypeVar("T")

# To hand over an output costs its stream's reader, and those after it, about a millisecond. So the
# more streams there are, the more tokens go together; alone, a stream gets each as it comes.
_SECONDS_PER_STREAM = 0.01
_MAX_INTERVAL_SECONDS = 0.2


class _Stream:
    """Holds what one request has to show until the coroutine that waits takes it.

    Outputs are cumulative, so only the latest is held: a slow reader costs no memory.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.last_time = 0.0  # of the latest output, for the engine's thread
        self._latest: Output | Exception | None = None
        self._changed = asyncio.Event()

    def put(self, item: Output | Exception) -> None:
        """Hand over an output; called in the loop that waits."""
        self._latest = item
        self._changed.set()

    async def get(self) -> Output:
        """The latest output not taken yet, or the exception that ended the engine."""
        await self._changed.wait()
        self._changed.clear()
        item = self._latest
        assert item is not None
        if isinstance(item, Exception):
            raise item
        return item


class AsyncEngine:
    """Streams requests through an `Engine`, which belongs to an `EngineLoop` from now on.

    Args:
        engine: not to be touched by anyone else any more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[str, _Stream] = {}  # touched by the engine's thread only
        self._loop = EngineLoop(engine, self)

    def check(self) -> None:
        """Do nothing while the engine lives; else raise the `EngineDeadError` that says why."""
        self._loop.check()

    async def generate(
        self,
        request_id: str,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        **settings: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the outputs of a request, each with all of its text so far; the last is finished.

        A reader alone that keeps up sees an output per token; one among many, or a slower one, sees
        several tokens at once. Leaving the iteration, or cancelling it, aborts the request.

        Args:
            request_id: any name that no unfinished request has.
            prompt: text or token ids.
            sampling_params: default: `SamplingParams()`.
            settings: `messages`, `retention`, `budget`, `priority`, `stream` of
                `Engine.add_request`.

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
        self._loop.stop()

    def deliver(self, outputs: Sequence[Output]) -> None:
        """See `engine_loop.Listener`: one wake-up per step, however many requests it served.

        An output that is not the last is left out if the stream had one a moment ago: what it says
        is in the next one, too.
        """
        now = time.monotonic()
        interval = min(_SECONDS_PER_STREAM * len(self._streams), _MAX_INTERVAL_SECONDS)
        batches: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Stream, Output]]]
        batches = defaultdict(list)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None and (output.finished or now - stream.last_time >= interval):
                stream.last_time = now
                batches[stream.loop].append((stream, output))
            if output.finished:
                self._streams.pop(output.request_id, None)
        for loop, batch in batches.items():
            _hand_over(loop, batch)

    def end(self, failure: EngineDeadError) -> None:
        """See `engine_loop.Listener`."""
        for stream in self._streams.values():
            _hand_over(stream.loop, [(stream, copy_failure(failure))])
        self._streams.clear()

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
                with suppress(EngineDeadError):
                    self._loop.submit(leave)

    async def _call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps."""
        return await asyncio.wrap_future(self._loop.submit(function))


def _hand_over(
    loop: asyncio.AbstractEventLoop, batch: Sequence[tuple[_Stream, Output | Exception]]
) -> None:
    def put_all() -> None:
        for stream, item in batch:
            stream.put(item)

    try:
        loop.call_soon_threadsafe(put_all)
    except RuntimeError:  # the loop is closed, so nobody waits any more
        logger.debug("outputs came after their event loop was closed")
