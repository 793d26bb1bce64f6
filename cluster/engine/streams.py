"""The engine for asyncio: coroutines stream what an `EngineLoop` steps."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.request import Request, RequestOutput

from .engine import Engine
from .loop import EngineLoop, Output, copy_failure
from .report import EngineReport

logger = logging.getLogger(__name__)

T = TypeVar("T")

# To hand over an output costs its stream's reader, and those after it, about a millisecond (of
# which our own path is a twentieth: the rest is Serve's). So the more streams there are, the more
# tokens go together; alone, a stream gets each as it comes. No reader waits longer than it notices:
# the gaps between its pieces are those of the engine's steps, and at most this much more.
_SECONDS_PER_STREAM = 0.0025
_MAX_INTERVAL_SECONDS = 0.04


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

    @property
    def is_ready(self) -> bool:
        """Whether tokens can be generated now; if not, requests wait until they can."""
        return self._engine.is_ready

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Stream the outputs of a request, each with all of its text so far; the last is finished.

        A reader alone that keeps up sees an output per token; one among many, or a slower one, sees
        several tokens at once; one whose request is not a stream sees the last output only. Leaving
        the iteration, or cancelling it, aborts the request.

        Raises:
            ValueError: this request cannot be served.
            EngineDeadError: the engine has failed or was shut down.
        """
        stream = _Stream()

        def begin() -> None:
            self._engine.add(request)
            self._streams[request.request_id] = stream

        def leave() -> None:
            if self._streams.get(request.request_id) is stream:
                del self._streams[request.request_id]
                self._engine.abort(request.request_id)

        is_finished = False
        try:
            await self._call(begin)
            while not is_finished:
                output = await stream.get()
                assert isinstance(output, RequestOutput), "scores are not streamed"
                is_finished = output.finished
                yield output
        finally:
            if not is_finished:
                with suppress(EngineDeadError):
                    self._loop.submit(leave)

    async def report(self) -> EngineReport:
        """Measurements since the start or the last `reset_stats`."""
        return await self._call(self._engine.report)

    async def end_conversation(self, conversation_id: str, owner: str) -> bool:
        """Give up what is kept of an owner's conversation; whether there was anything.

        Raises:
            ConversationBusyError: a turn of it has not ended.
        """
        return await self._call(lambda: self._engine.end_conversation(conversation_id, owner))

    async def reset_prefix_cache(self) -> bool:
        """Give up the cached prefixes that nobody uses; whether none is left."""
        return await self._call(self._engine.reset_prefix_cache)

    def shutdown(self) -> None:
        """End the thread after its step, and the engine; who still waits gets `EngineDeadError`.

        Calling it again does nothing. Blocks for as long as a step takes.
        """
        self._loop.stop()

    def deliver(self, outputs: Sequence[Output]) -> None:
        """See `loop.Listener`: one wake-up per step, however many requests it served.

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
        """See `loop.Listener`."""
        for stream in self._streams.values():
            _hand_over(stream.loop, [(stream, copy_failure(failure))])
        self._streams.clear()

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
