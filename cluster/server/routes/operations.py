"""`/health`, `/live`, `/version` and `/metrics`: for whoever runs the server."""

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response

from saqqara import __version__
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.server.docs import Endpoint

from .base import Door, json_reply, register

RECOVERY_RETRY_SECONDS = 5


class OperationRoutes:
    """How the server is."""

    endpoints = (
        Endpoint("GET", "/health", "200 if tokens can be generated now.", needs_key=False),
        Endpoint("GET", "/live", "200 unless the engine is lost for good.", needs_key=False),
        Endpoint("GET", "/load", "How many requests are in the server.", needs_key=False),
        Endpoint("GET", "/version", "The server's version.", needs_key=False),
        Endpoint(
            "GET", "/metrics", "Metrics for Prometheus.", needs_key=False, media_type="text/plain"
        ),
    )

    def __init__(self, door: Door) -> None:
        self._generation = door.generation

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        handlers = {
            "/health": self.health,
            "/live": self.live,
            "/load": self.load,
            "/version": self.version,
            "/metrics": self.metrics,
        }
        register(app, "GET", handlers)

    async def health(self) -> Response:
        """`GET /health`: 200 if tokens can be generated now, else 503."""
        self._generation.engine.check()
        self._generation.admission.check_open()
        if not self._generation.engine.is_ready:
            wait = {"Retry-After": str(RECOVERY_RETRY_SECONDS)}
            message = "the engine has lost workers and starts them again; requests wait for it"
            raise ApiError(503, message, None, "engine_recovering", wait)
        return json_reply({"status": "ok"})

    async def live(self) -> Response:
        """`GET /live`: 200 also while workers are started again; 503 is a reason to restart."""
        self._generation.engine.check()
        return json_reply({"status": "ok"})

    async def load(self) -> Response:
        """`GET /load`: requests that run or wait, as vLLM says it."""
        return json_reply({"server_load": self._generation.admission.num_requests})

    async def version(self) -> Response:
        """`GET /version`."""
        return json_reply({"version": __version__})

    async def metrics(self) -> Response:
        """`GET /metrics`, in the Prometheus text format."""
        return PlainTextResponse(
            self._generation.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )
