"""The HTTP API as an ASGI application over one engine. No Ray here: any ASGI server can run it."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from saqqara import __version__
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.events import dead_engine, event_stream
from saqqara.cluster.openai.replies import ReplyHead, check_served, full_reply, to_bytes
from saqqara.cluster.openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_object,
    read_request,
)
from saqqara.cluster.request import RequestOutput

from .admission import DrainingError, OverloadedError
from .api_keys import ApiKeys
from .docs import Endpoint, docs_page, openapi
from .generation import Generation, Job
from .guard import add_guards, check_is_json
from .io import EventStream, race, read_body, unless_disconnected, until

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # what nginx logs for it; nobody is there to read it
DRAIN_RETRY_SECONDS = 5
RECOVERY_RETRY_SECONDS = 5

Body = TypeVar("Body", bound=BaseModel)


_POSTS = (
    Endpoint("POST", "/v1/chat/completions", "Answer a chat.", ChatRequest, streams=True),
    Endpoint("POST", "/v1/completions", "Continue a text.", CompletionRequest, streams=True),
    Endpoint("POST", "/tokenize", "The token ids of a text or a chat.", TokenizeRequest),
    Endpoint("POST", "/detokenize", "The text of token ids.", DetokenizeRequest),
)
_GETS = (
    Endpoint("GET", "/v1/models", "The one model of this server."),
    Endpoint("GET", "/v1/models/{model}", "The model, if this is its name."),
    Endpoint("GET", "/health", "200 if tokens can be generated now.", needs_key=False),
    Endpoint("GET", "/live", "200 unless the engine is lost for good.", needs_key=False),
    Endpoint("GET", "/version", "The server's version.", needs_key=False),
    Endpoint(
        "GET", "/metrics", "Metrics for Prometheus.", needs_key=False, media_type="text/plain"
    ),
)


def make_app(generation: Generation, keys: ApiKeys, allowed_origins: Sequence[str] = ()) -> FastAPI:
    """The application.

    Args:
        generation: the engine and its queue; ended with the application.
        keys: who may use what is behind `/v1`, `/tokenize` and `/detokenize`.
        allowed_origins: origins whose web pages may use it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await generation.shutdown()

    app = FastAPI(title="Saqqara", version=__version__, openapi_url=None, lifespan=lifespan)
    add_guards(app, allowed_origins)
    _add_error_handlers(app)
    _Routes(generation, keys).add_to(app)
    return app


class _Routes:
    """What the paths of the API do."""

    def __init__(self, generation: Generation, keys: ApiKeys) -> None:
        self._generation = generation
        self._keys = keys
        self._started = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        post: Mapping[str, Callable[..., Any]] = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat_completions,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        get: Mapping[str, Callable[..., Any]] = {
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
            "/health": self.health,
            "/live": self.live,
            "/version": self.version,
            "/metrics": self.metrics,
            "/openapi.json": self.openapi,
            "/docs": self.docs,
        }
        for methods, routes in ((["POST"], post), (["GET", "HEAD"], get)):
            for path, handler in routes.items():
                app.add_api_route(path, handler, methods=methods, response_model=None)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._generate(request, CompletionRequest)

    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._generate(request, ChatRequest)

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the token ids of a text or a chat."""
        body = await self._read(request, TokenizeRequest)
        self._generation.check_model(body.model)
        if body.messages is not None:
            tokens = await self._generation.encode_chat(body.messages, body.chat_options())
        else:
            tokens = await self._generation.encode_text(
                body.prompt or "", add_special_tokens=body.add_special_tokens is not False
            )
        return _json(
            {
                "tokens": tokens,
                "count": len(tokens),
                "max_model_len": self._generation.max_model_len,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: the text of token ids."""
        body = await self._read(request, DetokenizeRequest)
        self._generation.check_model(body.model)
        tokenizer = self._generation.tokenizer
        for place, token in enumerate(body.tokens):
            if not 0 <= token < tokenizer.vocab_size:
                field = f"tokens[{place}]"
                raise ApiError(400, f"{field}={token} is no token", field, "invalid_value")
        return _json({"prompt": await self._generation.decode(body.tokens)})

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self._authorize(request)
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request, model: str) -> Response:
        """`GET /v1/models/{model}`."""
        self._authorize(request)
        self._generation.check_model(model)
        return _json(self._model_card())

    async def health(self) -> Response:
        """`GET /health`: 200 if tokens can be generated now, else 503."""
        self._generation.engine.check()
        self._generation.admission.check_open()
        if not self._generation.engine.is_ready:
            wait = {"Retry-After": str(RECOVERY_RETRY_SECONDS)}
            message = "the engine has lost workers and starts them again; requests wait for it"
            raise ApiError(503, message, None, "engine_recovering", wait)
        return _json({"status": "ok"})

    async def live(self) -> Response:
        """`GET /live`: 200 also while workers are started again; 503 is a reason to restart."""
        self._generation.engine.check()
        return _json({"status": "ok"})

    async def version(self) -> Response:
        """`GET /version`."""
        return _json({"version": __version__})

    async def metrics(self) -> Response:
        """`GET /metrics`, in the Prometheus text format."""
        return PlainTextResponse(
            self._generation.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`: what there is, for programs."""
        return JSONResponse(_description(request))

    async def docs(self, request: Request) -> Response:
        """`GET /docs`: the same for people."""
        return HTMLResponse(docs_page(_description(request)))

    async def _generate(
        self, request: Request, kind: type[CompletionRequest] | type[ChatRequest]
    ) -> Response:
        arrived = asyncio.get_running_loop().time()
        body = await self._read(request, kind)
        assert isinstance(body, CompletionRequest | ChatRequest)
        deadline = self._generation.deadline(body, arrived)
        async with until(deadline):
            return await self._answer(request, body, deadline)

    async def _answer(
        self, request: Request, body: CompletionRequest | ChatRequest, deadline: float | None
    ) -> Response:
        """The answer, or its first event: a stream ends by its job's deadline."""
        job = await self._generation.prepare(body, deadline)
        is_chat = isinstance(body, ChatRequest)
        head = ReplyHead(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._generation.model,
            is_chat=is_chat,
            num_logprobs=job.sampling.logprobs or 0,
        )
        if not body.stream:
            outputs = await unless_disconnected(request, self._finished(job))
            return _json(full_reply(head, outputs, job.sampling.n))
        events = self._events(head, job, include_usage=body.include_usage)
        first = await unless_disconnected(request, _next(events))
        return EventStream(first, events)

    async def _finished(self, job: Job) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        with self._generation.admission.enter(job.num_sequences):
            async with aclosing(self._generation.outputs(job, stream=False)) as source:
                async for place, output in source:
                    check_served(output)
                    outputs[place] = output
        return [outputs[place] for place in sorted(outputs)]

    async def _events(
        self, head: ReplyHead, job: Job, *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._generation.admission.enter(job.num_sequences))
            outputs = self._generation.outputs(job, stream=True)
            await stack.enter_async_context(aclosing(outputs))
            events = event_stream(head, outputs, job.sampling.n, include_usage=include_usage)
            await stack.enter_async_context(aclosing(events))
            async for piece in events:
                yield piece

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._generation.model,
            "object": "model",
            "created": self._started,
            "owned_by": "saqqara",
            "max_model_len": self._generation.max_model_len,
        }

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        """Let in who may come in, and read and check the body."""
        self._authorize(request)
        check_is_json(request)
        return read_request(kind, read_object(await self._read_body(request), "the body"))

    async def _read_body(self, request: Request) -> bytes:
        """The body; a client that is slow with it is not waited for when the server ends."""
        admission, limits = self._generation.admission, self._generation.limits
        admission.check_open()
        reading = read_body(request, limits.max_body_bytes, limits.body_timeout_seconds)
        return await race(reading, admission.wait_closed(), DrainingError())

    def _authorize(self, request: Request) -> None:
        if not self._keys.accepts(request.headers.get("authorization")):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                None,
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


def _description(request: Request) -> dict[str, Any]:
    return openapi((*_POSTS, *_GETS), __version__, request.scope.get("root_path", ""))


def _json(data: Mapping[str, Any]) -> Response:
    return Response(to_bytes(data), media_type="application/json")


def _reply(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    def api_error(request: Request, error: ApiError) -> Response:
        return _reply(error)

    def overloaded(request: Request, error: OverloadedError) -> Response:
        wait = {"Retry-After": str(error.retry_seconds)}
        return _reply(ApiError(429, str(error), None, "queue_full", wait))

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
