"""Requests to an ASGI application in this process, whose answers can be watched as they come."""

import asyncio
import json
from collections.abc import AsyncIterable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass
class AsgiAnswer:
    """An answer as far as it has come; names of headers are in lower case."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False

    @property
    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error that the body is."""
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of the events that the body is, `[DONE]` among them as a string."""
        texts = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    *,
    chunks: AsyncIterable[bytes] | None = None,
    on_piece: Callable[[AsgiAnswer], None] = lambda answer: None,
) -> AsgiAnswer:
    """The answer to a request.

    Args:
        app: what answers.
        method: of HTTP.
        path: of the request.
        body: sent as JSON.
        headers: beside the body's type.
        chunks: sent instead of the body, as they come.
        on_piece: called with the answer whenever a piece of it has come.
    """
    content = b"" if body is None else json.dumps(body, allow_nan=False).encode()
    given = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode()) for k, v in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    answer = AsgiAnswer()
    parts = None if chunks is None else aiter(chunks)
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            await asyncio.Event().wait()  # the client stays
        if parts is not None:
            with suppress(StopAsyncIteration):
                return {"type": "http.request", "body": await anext(parts), "more_body": True}
        is_sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            found = message.get("headers", [])
            answer.headers = {k.decode().lower(): v.decode() for k, v in found}
            return
        answer.body += message.get("body", b"")
        answer.is_complete = not message.get("more_body", False)
        on_piece(answer)

    await app(scope, receive, send)
    return answer
