"""Bodies and connections of HTTP requests: read with a limit, and given up when the client does."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.replies import deadline_exceeded

T = TypeVar("T")

_MAX_LENGTH_DIGITS = 18


async def read_body(request: Request, max_bytes: int, timeout_seconds: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is larger than allowed (413), of which what is beyond is not read, or has not
            come in time (408).
        ClientDisconnect: the client left while it sent the body.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _read_body(request, max_bytes)
    except TimeoutError:
        message = f"the body has not come within {timeout_seconds:g} s"
        close = {"Connection": "close"}  # the rest of the body would be taken for a request
        raise ApiError(408, message, None, "request_timeout", close) from None


async def _read_body(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(
        413, f"the body may have at most {max_bytes} bytes", None, "request_too_large"
    )
    length = request.headers.get("content-length", "")
    is_number = length.isascii() and length.isdigit()
    if is_number and (len(length) > _MAX_LENGTH_DIGITS or int(length) > max_bytes):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


@asynccontextmanager
async def until(deadline: float | None) -> AsyncIterator[None]:
    """Cancel what is within when the event loop's time comes to `deadline`; None: never.

    Raises:
        ApiError: it has come (408).
    """
    try:
        async with asyncio.timeout_at(deadline) as scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise deadline_exceeded() from None


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first.

    Raises:
        ClientDisconnect: the client has left.
    """
    return await race(work, _disconnect(request.receive), ClientDisconnect())


class EventStream(Response):
    """Server-sent events, written as they come; ends with the client's connection.

    Args:
        first: the first piece, which is there already.
        rest: the others; closed in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self._first = first
        self._rest = rest
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see ASGI."""
        try:
            await race(self._write(send), _disconnect(receive), ClientDisconnect())
        except ClientDisconnect:
            return
        finally:
            await self._rest.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for piece in self._rest:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def race(work: Coroutine[Any, Any, T], end: Coroutine[Any, Any, None], error: Exception) -> T:
    """The result of `work`; if `end` comes first, `work` is cancelled and the error raised."""
    task = asyncio.ensure_future(work)
    ending = asyncio.ensure_future(end)
    try:
        await asyncio.wait((task, ending), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise error
        return task.result()
    finally:
        task.cancel()
        ending.cancel()
        # Cancelled work must have ended, and let go of its sequence, before anybody goes on.
        await asyncio.gather(task, ending, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(
    sources: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """Items of several sources as they come, with the number of their source."""
    waiting = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(sources[place]))] = place
                yield place, item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()
