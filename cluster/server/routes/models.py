"""`/v1/models`."""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.server.docs import Endpoint

from .base import Door, json_reply, register


class ModelRoutes:
    """The model that is here, under each of its names."""

    endpoints = (
        Endpoint("GET", "/v1/models", "The one model of this server, by each of its names."),
        Endpoint("GET", "/v1/models/{model}", "The model, if this is its name."),
    )

    def __init__(self, door: Door) -> None:
        self._door = door
        self._generation = door.generation
        self._started = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        register(app, "GET", {"/v1/models": self.models, "/v1/models/{model:path}": self.model})

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self._door.authorize(request)
        cards = [self._card(name) for name in self._generation.names]
        return json_reply({"object": "list", "data": cards})

    async def model(self, request: Request, model: str) -> Response:
        """`GET /v1/models/{model}`."""
        self._door.authorize(request)
        self._generation.check_model(model)
        names = self._generation.names
        return json_reply(self._card(model if model in names else names[0]))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "saqqara",
            "root": self._generation.model,
            "max_model_len": self._generation.max_model_len,
        }
