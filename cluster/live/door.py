"""`/metrics` and `/stats` of an engine without an HTTP API, as a WSGI application."""

import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from .snapshot import LiveStats

STATS_PATH = "/stats"
_Answer = Iterable[bytes]
WsgiApp = Callable[[Mapping[str, Any], Callable[..., Any]], _Answer]


class StatsDoor:
    """Answers `/stats`, and leaves every other path to another application.

    A web page of a foreign name that leads to this machine must not read it, so the name that was
    asked for has to be an address, `localhost` or one of `names`; there are no keys here.

    Args:
        read: what the engine shows.
        other: answers the rest, as it does without this.
        names: of this machine, besides its host name.
    """

    def __init__(
        self, read: Callable[[], LiveStats], other: WsgiApp, names: Iterable[str] = ()
    ) -> None:
        self._read = read
        self._other = other
        self._names = {"localhost", socket.gethostname().lower(), *(n.lower() for n in names)}

    def __call__(self, environ: Mapping[str, Any], start: Callable[..., Any]) -> _Answer:
        """Answer; see WSGI."""
        if environ.get("PATH_INFO") != STATS_PATH:
            return self._other(environ, start)
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _say(start, "405 Method Not Allowed", "only GET", ("Allow", "GET, HEAD"))
        if not self._is_ours(environ.get("HTTP_HOST", "")):
            return _say(start, "403 Forbidden", "ask for this machine by its address or name")
        body = self._read().model_dump_json().encode()
        start("200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
        return [body]

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:  # no address in the brackets
            return False
        return name is not None and (name in self._names or _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _say(start: Callable[..., Any], status: str, text: str, *headers: tuple[str, str]) -> _Answer:
    start(status, [("Content-Type", "text/plain"), *headers])
    return [f"{text}\n".encode()]
