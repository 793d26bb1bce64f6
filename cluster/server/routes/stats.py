"""`/stats`: what the engine does now, for `saqqara top` and for pages that draw it."""

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.server.docs import Endpoint

from .base import Door, json_reply, register

_HEADERS = {"Cache-Control": "no-store"}


class StatsRoutes:
    """The engine at work."""

    endpoints = (
        Endpoint("GET", "/stats", "What the engine does now: throughput, queue, KV kept, ranks."),
    )

    def __init__(self, door: Door) -> None:
        self._door = door
        self._generation = door.generation

    def add_to(self, app: FastAPI) -> None:
        """Register the path."""
        register(app, "GET", {"/stats": self.stats})

    async def stats(self, request: Request) -> Response:
        """`GET /stats`: the snapshot that the engine published last, at most half a second old.

        Several replicas answer for themselves; `replica` says which one did.
        """
        self._door.authorize(request)
        self._generation.engine.check()
        reply = json_reply(self._generation.live_stats().model_dump(mode="json"))
        reply.headers.update(_HEADERS)
        return reply
