"""What the groups of paths have in common: how they are added, and who and what comes in."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.replies import to_bytes
from saqqara.cluster.openai.requests import check_limit, read_object, read_request
from saqqara.cluster.server.admission import DrainingError
from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.cluster.server.docs import Endpoint
from saqqara.cluster.server.generation import Caller, Generation
from saqqara.cluster.server.guard import check_is_json
from saqqara.cluster.server.io import race, read_body, until

OWNER = "saqqara.owner"
"""In the scope of a request that the server makes itself, on behalf of an owner: who that is."""

LONG_BODY_BYTES = 64 * 1024
"""A longer body is parsed beside the event loop: of 4 MB of small values it takes a second."""

Body = TypeVar("Body", bound=BaseModel)
Handler = Callable[..., Any]  # as FastAPI takes them


class Routes(Protocol):
    """A group of paths."""

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """What is said of them in the description of the API."""

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""


def register(app: FastAPI, method: str, handlers: Mapping[str, Handler]) -> None:
    """Add handlers by their paths; whoever answers GET answers HEAD, too."""
    methods = ["GET", "HEAD"] if method == "GET" else [method]
    for path, handler in handlers.items():
        app.add_api_route(path, handler, methods=methods, response_model=None)


def json_reply(data: Mapping[str, Any]) -> Response:
    """An answer of status 200."""
    return Response(to_bytes(data), media_type="application/json")


class Door:
    """Lets in who may come in, and reads and checks what they bring.

    Args:
        generation: the engine and its queue; its limits hold for bodies.
        keys: who may come in.

    Attributes:
        generation: as given.
        keys: as given.
    """

    def __init__(self, generation: Generation, keys: ApiKeys) -> None:
        self.generation = generation
        self.keys = keys

    def authorize(self, request: Request) -> None:
        """Raise an `ApiError` (401) unless the request has one of the keys, or is our own."""
        if OWNER in request.scope:
            return
        if not self.keys.accepts(request.headers.get("authorization")):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                None,
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )

    def owner(self, request: Request) -> str:
        """Let in who may come in; whose files, batches and share of the queue are theirs.

        Raises:
            ApiError: (401) the request has none of the keys.
        """
        self.authorize(request)
        if (owner := request.scope.get(OWNER)) is not None:
            return str(owner)
        return self.keys.owner(request.headers.get("authorization"))

    @asynccontextmanager
    async def answering(
        self, request: Request, timeout_seconds: float | None
    ) -> AsyncIterator[Caller]:
        """Who waits for the answer that is made within, in the time that there is for it.

        Args:
            request: whose body was read.
            timeout_seconds: what it says of its time, which counts from its arrival.

        Raises:
            ApiError: it asks for more than there is (400), or its time is over (408).
        """
        limits = self.generation.limits
        check_limit("timeout_seconds", timeout_seconds or 0, limits.max_timeout_seconds)
        seconds = timeout_seconds or limits.default_timeout_seconds
        deadline = None if seconds is None else request.state.arrived + seconds
        async with until(deadline):
            yield Caller(self.sharer(request), deadline)

    async def read(
        self,
        request: Request,
        kind: type[Body],
        reader: Callable[[Mapping[str, Any]], Body] | None = None,
    ) -> Body:
        """Let in who may come in, and read and check the body, which must be JSON.

        Args:
            request: whose body it is.
            kind: what the body is.
            reader: makes it of the fields; default: `read_request`.

        Raises:
            ApiError: the key, the body or a field of it is wrong.
            DrainingError: the server ends.
        """
        request.state.arrived = asyncio.get_running_loop().time()
        self.authorize(request)
        check_is_json(request)
        body = await self.read_body(request)

        def parse() -> Body:
            fields = read_object(body, "the body")
            return read_request(kind, fields) if reader is None else reader(fields)

        if len(body) <= LONG_BODY_BYTES:
            return parse()
        return await self.generation.parsing.run(self.sharer(request), len(body), parse)

    async def read_body(self, request: Request) -> bytes:
        """The body; a client that is slow with it is not waited for when the server ends."""
        admission, limits = self.generation.admission, self.generation.limits
        admission.check_open()
        reading = read_body(request, limits.max_body_bytes, limits.body_timeout_seconds)
        return await race(reading, admission.wait_closed(), DrainingError())

    def sharer(self, request: Request) -> str:
        """Who shares the queue, and threads, with others; empty unless there are several keys."""
        return "" if len(self.keys) < 2 else self.owner(request)
