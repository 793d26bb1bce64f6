"""`/v1/files`: upload, list, look at, read and delete."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.batch_store.files import Upload
from saqqara.cluster.batch_store.records import StoredFile
from saqqara.cluster.openai.batches import ExpiresAfter
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import read_request
from saqqara.cluster.server.admission import DrainingError
from saqqara.cluster.server.docs import Endpoint
from saqqara.cluster.server.io import race
from saqqara.cluster.server.routes.base import Door, json_reply, register

from .content import FileContent
from .queries import read_page, read_query
from .service import BatchService, told_to_clients
from .shapes import file_json, page_json
from .upload import FormReader, boundary_of, check_length, declared_length

PURPOSES = ("batch", "batch_output")
MAX_UPLOADS = 32  # at once
MAX_UPLOADS_OF_KEY = 8  # where others have keys, too
_LEAST_BYTES_PER_SECOND = 100_000  # of an upload beyond the time that any body has
_RETRY_SECONDS = 5
_MAX_FILES = 10_000  # of a page


class FileRoutes:
    """Files that batches are read from and written to."""

    endpoints = (
        Endpoint("POST", "/v1/files", "Upload a file (multipart/form-data: file, purpose)."),
        Endpoint("GET", "/v1/files", "The files of this key."),
        Endpoint("GET", "/v1/files/{file_id}", "A file's size, name and purpose."),
        Endpoint(
            "GET",
            "/v1/files/{file_id}/content",
            "What is in a file.",
            media_type="application/octet-stream",
        ),
        Endpoint("DELETE", "/v1/files/{file_id}", "Delete a file."),
    )

    def __init__(self, door: Door, service: BatchService) -> None:
        self._door = door
        self._service = service
        self._uploads: Counter[str] = Counter()  # by who sends them

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        register(app, "POST", {"/v1/files": self.upload})
        register(
            app,
            "GET",
            {
                "/v1/files": self.list,
                "/v1/files/{file_id}": self.get,
                "/v1/files/{file_id}/content": self.content,
            },
        )
        register(app, "DELETE", {"/v1/files/{file_id}": self.delete})

    async def upload(self, request: Request) -> Response:
        """`POST /v1/files`."""
        owner, service = self._door.owner(request), self._service
        limits = service.store.limits
        boundary = boundary_of(request)
        check_length(request, limits.max_file_bytes)
        admission = self._door.generation.admission
        admission.check_open()
        with self._place(self._door.sharer(request)):
            reading = self._receive(request, owner, boundary)
            file = await race(reading, admission.wait_closed(), DrainingError())
        return json_reply(file_json(file))

    @contextmanager
    def _place(self, sharer: str) -> Iterator[None]:
        """Hold one of the places for uploads; a key has some of them, so that others find one."""
        most = MAX_UPLOADS_OF_KEY if sharer else MAX_UPLOADS
        if self._uploads[sharer] >= most or self._uploads.total() >= MAX_UPLOADS:
            wait = {"Retry-After": str(_RETRY_SECONDS)}
            is_share = self._uploads[sharer] >= most and bool(sharer)
            code = "queue_share_full" if is_share else "queue_full"
            whose = "of this key " if is_share else ""
            count = self._uploads[sharer] if is_share else MAX_UPLOADS
            raise ApiError(429, f"{count} uploads {whose}are under way", None, code, wait)
        self._uploads[sharer] += 1
        try:
            yield
        finally:
            self._uploads[sharer] -= 1

    async def _receive(self, request: Request, owner: str, boundary: bytes) -> StoredFile:
        service = self._service
        limits = self._door.generation.limits
        most = service.store.limits.max_file_bytes
        length = min(declared_length(request) or most, most)
        seconds = limits.body_timeout_seconds + length / _LEAST_BYTES_PER_SECOND
        upload = await service.call(service.store.files.begin, owner)
        with upload:
            form = FormReader(boundary, upload)
            try:
                async with asyncio.timeout(seconds):
                    async for data in _pieces(request, limits.body_timeout_seconds):
                        await service.call(form.write, data)
            except TimeoutError:
                close = {"Connection": "close"}  # the rest would be taken for a request
                message = "the upload has not come in time"
                raise ApiError(408, message, None, "request_timeout", close) from None
            form.finish()
            return await self._finish(upload, form)

    async def _finish(self, upload: Upload, form: FormReader) -> StoredFile:
        purpose = form.fields["purpose"]
        if purpose not in PURPOSES:
            message = f"purpose must be 'batch' (or 'batch_output') here, not {purpose!r:.80}"
            raise ApiError(400, message, "purpose", "invalid_value")
        seconds = _expires_after(form)
        assert form.filename is not None, "the form was checked"
        return await self._service.call(upload.finish, purpose, form.filename, seconds)

    async def list(self, request: Request) -> Response:
        """`GET /v1/files`."""
        owner, store = self._door.owner(request), self._service.store
        given = read_query(request, ("limit", "after", "order", "purpose"))
        page = read_page(given, _MAX_FILES, _MAX_FILES)
        purpose = given.get("purpose")
        files, has_more = await self._service.call(store.files.list, owner, page, purpose)
        return json_reply(page_json([file_json(file) for file in files], has_more))

    async def get(self, request: Request, file_id: str) -> Response:
        """`GET /v1/files/{file_id}`."""
        owner, store = self._door.owner(request), self._service.store
        return json_reply(file_json(await self._service.call(store.files.get, owner, file_id)))

    async def content(self, request: Request, file_id: str) -> Response:
        """`GET /v1/files/{file_id}/content`."""
        owner, files = self._door.owner(request), self._service.store.files
        file = await self._service.call(files.get, owner, file_id)
        with told_to_clients():
            opened = files.open(file)
        try:
            return FileContent(opened, request.headers.get("range"))
        except BaseException:
            opened.close()
            raise

    async def delete(self, request: Request, file_id: str) -> Response:
        """`DELETE /v1/files/{file_id}`."""
        owner, store = self._door.owner(request), self._service.store
        await self._service.call(store.files.delete, owner, file_id)
        return json_reply({"id": file_id, "object": "file", "deleted": True})


async def _pieces(request: Request, timeout_seconds: float) -> AsyncIterator[bytes]:
    """The body as it comes; a piece that does not come in time is a `TimeoutError`."""
    source = request.stream()
    while True:
        async with asyncio.timeout(timeout_seconds):
            data = await anext(source, None)
        if data is None:
            return
        if data:
            yield data


def _expires_after(form: FormReader) -> int | None:
    """After how many seconds the file is deleted."""
    names = {"anchor": "expires_after[anchor]", "seconds": "expires_after[seconds]"}
    given: dict[str, object] = {
        short: form.fields[name] for short, name in names.items() if name in form.fields
    }
    if not given:
        return None
    seconds = form.fields.get(names["seconds"], "")
    if seconds.isascii() and seconds.isdigit() and len(seconds) <= 9:
        given["seconds"] = int(seconds)
    try:
        return read_request(ExpiresAfter, given).seconds
    except ApiError as error:
        param = names.get(error.param or "", "expires_after")
        raise ApiError(400, f"expires_after: {error}", param, error.code) from None
