"""The HTTP API as an ASGI application over one engine. No Ray here: any ASGI server can run it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from saqqara import __version__
from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.events import dead_engine

from .admission import DrainingError, OverloadedError
from .api_keys import ApiKeys
from .batches.batches import BatchRoutes
from .batches.files import FileRoutes
from .batches.service import BatchService
from .generation import Generation
from .guard import add_guards
from .page.routes import add_page
from .routes.base import Door, Routes
from .routes.completions import CompletionRoutes
from .routes.conversations import ConversationRoutes
from .routes.description import DescriptionRoutes
from .routes.models import ModelRoutes
from .routes.operations import OperationRoutes
from .routes.responses import ResponseRoutes
from .routes.stats import StatsRoutes
from .routes.tokens import TokenRoutes

CLIENT_LEFT = 499  # what nginx logs for it; nobody is there to read it
DRAIN_RETRY_SECONDS = 5


def make_app(
    generation: Generation,
    keys: ApiKeys,
    allowed_origins: Sequence[str] = (),
    store: Store | None = None,
    *,
    ui: bool = True,
    allowed_hosts: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Args:
        generation: the engine and its queue; ended with the application.
        keys: who may use what is behind `/v1`, `/tokenize` and `/detokenize`.
        allowed_origins: origins whose web pages may use it.
        store: files and batches; closed with the application. None: there are none.
        ui: whether there is a page at `/`.
        allowed_hosts: names by which it may be asked where there are no keys.
    """
    batches = BatchService(store, generation)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batches.start(app)
        yield
        await batches.stop()
        await generation.shutdown()

    app = FastAPI(title="Saqqara", version=__version__, openapi_url=None, lifespan=lifespan)
    add_guards(app, allowed_origins, None if keys else allowed_hosts)
    _add_error_handlers(app)
    door = Door(generation, keys)
    groups: tuple[Routes, ...] = (
        CompletionRoutes(door),
        ResponseRoutes(door),
        ConversationRoutes(door),
        TokenRoutes(door),
        ModelRoutes(door),
        OperationRoutes(door),
        FileRoutes(door, batches),
        BatchRoutes(door, batches),
        StatsRoutes(door),
    )
    endpoints = [endpoint for group in groups for endpoint in group.endpoints]
    for group in (*groups, DescriptionRoutes(endpoints, generation.model)):
        group.add_to(app)
    if ui:
        add_page(app, generation.retention.label, needs_key=len(keys) > 0)
    return app


def _reply(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    def api_error(request: Request, error: ApiError) -> Response:
        return _reply(error)

    def overloaded(request: Request, error: OverloadedError) -> Response:
        wait = {"Retry-After": str(error.retry_seconds)}
        code = "queue_share_full" if error.is_share else "queue_full"
        return _reply(ApiError(429, str(error), None, code, wait))

    def draining(request: Request, error: DrainingError) -> Response:
        wait = {"Retry-After": str(DRAIN_RETRY_SECONDS)}
        return _reply(ApiError(503, str(error), None, "shutting_down", wait))

    def dead(request: Request, error: EngineDeadError) -> Response:
        return _reply(dead_engine(error))

    def http_error(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _reply(
            ApiError(error.status_code, message, None, codes.get(error.status_code), error.headers)
        )

    def client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_LEFT)

    def failed(request: Request, error: Exception) -> Response:
        return _reply(ApiError(500, "the server has failed on this request; see its log"))

    handlers: Mapping[type[Exception], Any] = {
        ApiError: api_error,
        OverloadedError: overloaded,
        DrainingError: draining,
        EngineDeadError: dead,
        HTTPException: http_error,
        ClientDisconnect: client_left,
        Exception: failed,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
