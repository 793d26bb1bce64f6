"""Answers of the application to the lines of batches, in the process and without a connection.

They take the way of requests over HTTP from end to end, so that both are one dialect.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

from saqqara.cluster.server.routes.base import OWNER

BATCH_PRIORITY = 2**30
"""Added to a line's own: any request of a client goes first, unless it says a larger one."""
_MAX_PRIORITY = 2**31 - 1
_HEADERS = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """Status and JSON of an answer."""

    status: int
    body: Any


class Answers(Protocol):
    """What answers lines."""

    async def __call__(self, owner: str, url: str, body: Mapping[str, Any]) -> LineAnswer:
        """The answer to a request of an owner; cancelling it ends the request."""
        ...


class AppAnswers:
    """Answers lines by an application.

    Args:
        app: the server's.
        timeout_seconds: of lines that say none, where the server would end them earlier.
    """

    def __init__(self, app: ASGIApp, timeout_seconds: float | None = None) -> None:
        self._app = app
        self._timeout_seconds = timeout_seconds

    async def __call__(self, owner: str, url: str, body: Mapping[str, Any]) -> LineAnswer:
        """See `Answers`."""
        content = json.dumps(self._as_sent(body), allow_nan=False).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": _HEADERS,
            "client": None,
            "server": None,
            OWNER: owner,
        }
        left = [{"type": "http.request", "body": content, "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if left:
                return left.pop()
            await asyncio.Event().wait()  # nobody leaves: who asked is cancelled instead
            raise AssertionError("the event is never set")

        async def send(message: Message) -> None:
            sent.append(message)

        try:
            await self._app(scope, receive, send)
        except Exception:
            if not sent:  # else it has been logged, and answered with status 500
                raise
        status = next(m["status"] for m in sent if m["type"] == "http.response.start")
        text = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
        return LineAnswer(status, json.loads(text))

    def _as_sent(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """A line's body with what its client would say who knew that it is in a batch."""
        sent = {**body, "priority": _behind_others(body.get("priority"))}
        if self._timeout_seconds is not None and body.get("timeout_seconds") is None:
            sent["timeout_seconds"] = self._timeout_seconds
        return sent


def _behind_others(given: Any) -> Any:
    """A priority behind those of clients; a wrong one is left to be refused."""
    if given is None:
        return BATCH_PRIORITY
    return min(given + BATCH_PRIORITY, _MAX_PRIORITY) if type(given) is int else given
