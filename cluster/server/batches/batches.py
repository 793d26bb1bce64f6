"""`/v1/batches`: make, list, look at and cancel."""

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.batch_store.records import NewBatch
from saqqara.cluster.openai.batches import WINDOW_SECONDS, BatchRequest
from saqqara.cluster.server.docs import Endpoint
from saqqara.cluster.server.routes.base import Door, json_reply, register

from .queries import read_page, read_query
from .service import BatchService
from .shapes import batch_json, page_json

_USUAL = 20  # of a page
_MOST = 100


class BatchRoutes:
    """Batches over uploaded files."""

    endpoints = (
        Endpoint("POST", "/v1/batches", "Run the requests of a file.", BatchRequest),
        Endpoint("GET", "/v1/batches", "The batches of this key."),
        Endpoint("GET", "/v1/batches/{batch_id}", "How a batch stands."),
        Endpoint("POST", "/v1/batches/{batch_id}/cancel", "End a batch with what is done."),
    )

    def __init__(self, door: Door, service: BatchService) -> None:
        self._door = door
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        register(
            app,
            "POST",
            {"/v1/batches": self.create, "/v1/batches/{batch_id}/cancel": self.cancel},
        )
        register(app, "GET", {"/v1/batches": self.list, "/v1/batches/{batch_id}": self.get})

    async def create(self, request: Request) -> Response:
        """`POST /v1/batches`."""
        owner, store = self._door.owner(request), self._service.store
        body = await self._door.read(request, BatchRequest)
        expires = body.output_expires_after
        new = NewBatch(
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            completion_window=body.completion_window,
            window_seconds=WINDOW_SECONDS[body.completion_window],
            metadata=body.metadata,
            output_seconds=None if expires is None else expires.seconds,
        )
        batch = await self._service.call(store.batches.create, owner, new)
        self._service.wake()
        return json_reply(batch_json(batch))

    async def list(self, request: Request) -> Response:
        """`GET /v1/batches`."""
        owner, store = self._door.owner(request), self._service.store
        page = read_page(read_query(request, ("limit", "after")), _USUAL, _MOST)
        batches, has_more = await self._service.call(store.batches.list, owner, page)
        return json_reply(page_json([batch_json(batch) for batch in batches], has_more))

    async def get(self, request: Request, batch_id: str) -> Response:
        """`GET /v1/batches/{batch_id}`."""
        owner, store = self._door.owner(request), self._service.store
        return json_reply(batch_json(await self._service.call(store.batches.get, owner, batch_id)))

    async def cancel(self, request: Request, batch_id: str) -> Response:
        """`POST /v1/batches/{batch_id}/cancel`."""
        owner, store = self._door.owner(request), self._service.store
        batch = await self._service.call(store.batches.cancel, owner, batch_id)
        self._service.wake()
        return json_reply(batch_json(batch))
