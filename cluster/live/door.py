"""`/metrics` and `/stats` of an engine without an HTTP API, as a WSGI application."""

import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from saqqara.configs.hosts import may_ask_as

from .snapshot import LiveStats

STATS_PATH = "/stats"
_Answer = Iterable[bytes]
_Start = Callable[..., Any]
WsgiApp = Callable[[Mapping[str, Any], _Start], _Answer]


class EngineDoor:
    """Answers `/stats`, and has another application answer every other path.

    There are no keys here, so only who asks by an address, as `localhost` or by this machine's name
    is let in: a web page whose name leads here is not.

    Args:
        metrics: answers the other paths.
        host: the address that it is served on, by which it may be asked for, too.
        read_stats: what the engine shows; None: there is no `/stats`.
    """

    def __init__(
        self, metrics: WsgiApp, host: str, read_stats: Callable[[], LiveStats] | None = None
    ) -> None:
        self._metrics = metrics
        self._names = (host.lower(), socket.gethostname().lower())
        self._read_stats = read_stats

    def __call__(self, environ: Mapping[str, Any], start: _Start) -> _Answer:
        """Answer; see WSGI."""
        if not may_ask_as(environ.get("HTTP_HOST"), self._names):
            return _say(start, "403 Forbidden", "ask by address, as localhost or by its own name")
        if self._read_stats is None or environ.get("PATH_INFO") != STATS_PATH:
            return self._metrics(environ, start)
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _say(start, "405 Method Not Allowed", "only GET", ("Allow", "GET, HEAD"))
        body = self._read_stats().model_dump_json().encode()
        start("200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
        return [body]


def _say(start: _Start, status: str, text: str, *headers: tuple[str, str]) -> _Answer:
    start(status, [("Content-Type", "text/plain"), *headers])
    return [f"{text}\n".encode()]
