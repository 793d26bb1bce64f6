"""Which web pages may use a server, and what a body must say that it is.

A browser lets any page send requests to any address it reaches, a server without keys on loopback
included. It asks first (CORS) only where a page reads the answer or sends JSON, so bodies are taken
as `application/json` alone, and a page that is not allowed by `allowed_origins` gets 403.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from saqqara.cluster.openai.errors import ApiError
from saqqara.configs.hosts import is_no_name, may_ask_as

ANY_ORIGIN = "*"
_JSON = "application/json"
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_EXPOSED_HEADERS = ("Retry-After", "X-Request-Id")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def add_guards(
    app: FastAPI, allowed_origins: Sequence[str], allowed_hosts: Sequence[str] | None = None
) -> None:
    """Have the application refuse foreign pages, and answer those that are allowed as CORS asks.

    Args:
        app: the application.
        allowed_origins: whose pages may use it.
        allowed_hosts: names by which it may be asked; None: by any.
    """
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=_METHODS,
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(OriginGuard, allowed=allowed_origins)  # before CORS: the last is the first
    if allowed_hosts is not None:
        app.add_middleware(HostGuard, allowed=allowed_hosts)


def check_is_json(request: Request) -> None:
    """Raise an `ApiError` (415) unless the request says that its body is JSON, as it is."""
    packed = request.headers.get("content-encoding", "identity")
    if packed.lower() != "identity":
        message = f"a body must come without `Content-Encoding`, not packed as {packed!r:.100}"
        raise ApiError(415, message, None, "unsupported_media_type")
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != _JSON:
        said = f"not {given!r:.100}" if given else "which is missing"
        message = f"a body must have the header `Content-Type: {_JSON}`, {said}"
        raise ApiError(415, message, None, "unsupported_media_type")


class HostGuard:
    """Refuses requests that ask for the server by a foreign name with 403.

    Args:
        app: what answers the others.
        allowed: see `may_ask_as`.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = tuple(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see ASGI."""
        if scope["type"] == "http":
            asked = Headers(scope=scope).get("host")
            if not may_ask_as(asked, self._allowed):
                message = (
                    f"this server has no keys and answers by address, not as {asked!r:.200}; "
                    "--allowed-hosts (allowed_hosts in a file) lets it, and so do API keys"
                )
                error = ApiError(403, message, None, "host_not_allowed")
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class OriginGuard:
    """Refuses requests of web pages of other origins with 403.

    Requests without `Origin` (of programs) pass. A page of the server itself passes where it is
    reached by an address or as `localhost`; a name does not prove it, because whoever owns a name
    may have it lead to this machine.

    Args:
        app: what answers the others.
        allowed: origins that pass; `*`: all.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._all = ANY_ORIGIN in allowed
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see ASGI."""
        if scope["type"] == "http" and not self._all:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._may_pass(origin, headers.get("host", "")):
                message = (
                    f"web pages of {origin!r:.200} may not use this server; "
                    "--allowed-origins (allowed_origins in a file) lets them"
                )
                error = ApiError(403, message, None, "origin_not_allowed")
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _may_pass(self, origin: str, host: str) -> bool:
        return origin in self._allowed or is_own_origin(origin, host)


def is_own_origin(origin: str, host: str) -> bool:
    """Whether a page of this origin came from the server that was asked as `host`."""
    try:
        page, asked = urlsplit(origin), urlsplit(f"//{host}")
        default = _DEFAULT_PORTS.get(page.scheme)
        same = (page.hostname, page.port or default) == (asked.hostname, asked.port or default)
    except ValueError:  # no port, or no address in the brackets
        return False
    return same and page.hostname is not None and is_no_name(page.hostname)
