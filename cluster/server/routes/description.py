"""`/openapi.json` and `/docs`: what the other groups have, for programs and for people."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from saqqara import __version__
from saqqara.cluster.server.docs import Endpoint, docs_page, openapi

from .base import register


class DescriptionRoutes:
    """The description of the API; it does not describe itself.

    Args:
        described: what there is.
        model: the name of the model, for examples.
    """

    endpoints: tuple[Endpoint, ...] = ()

    def __init__(self, described: Sequence[Endpoint], model: str) -> None:
        self._model = model
        self._described = tuple(described)

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        register(app, "GET", {"/openapi.json": self.openapi, "/docs": self.docs})

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        return JSONResponse(self._description(request))

    async def docs(self, request: Request) -> Response:
        """`GET /docs`."""
        return HTMLResponse(docs_page(self._description(request)))

    def _description(self, request: Request) -> dict[str, Any]:
        root = request.scope.get("root_path", "")
        return openapi(self._described, __version__, root, self._model)
