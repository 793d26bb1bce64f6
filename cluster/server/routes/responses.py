"""`/v1/responses`."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.replies import check_served
from saqqara.cluster.openai.responses.events import full_response, response_stream
from saqqara.cluster.openai.responses.reply import ResponseHead
from saqqara.cluster.openai.responses.request import RENAMED, ResponseRequest, read_response
from saqqara.cluster.outcome import TRUNCATION_HINT
from saqqara.cluster.request import RequestOutput
from saqqara.cluster.server.docs import Endpoint
from saqqara.cluster.server.generation import Caller, Job
from saqqara.cluster.server.io import EventStream, unless_disconnected

from .base import Door, json_reply, register

_TRUNCATION_HINT = ' (truncation="auto" leaves out the oldest items)'


class ResponseRoutes:
    """Responses, of which none is stored."""

    endpoints = (
        Endpoint("POST", "/v1/responses", "Answer an input.", ResponseRequest, streams=True),
        Endpoint("GET", "/v1/responses/{response_id}", "None is stored, so there is none."),
        Endpoint("DELETE", "/v1/responses/{response_id}", "None is stored, so there is none."),
    )

    def __init__(self, door: Door) -> None:
        self._door = door
        self._generation = door.generation

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        register(app, "POST", {"/v1/responses": self.create})
        stored = {"/v1/responses/{response_id}": self.stored}
        register(app, "GET", stored)
        register(app, "DELETE", stored)

    async def create(self, request: Request) -> Response:
        """`POST /v1/responses`."""
        body = await self._door.read(request, ResponseRequest, read_response)
        async with self._door.answering(request, body.timeout_seconds) as caller:
            return await self._answer(request, body, caller)

    async def _answer(self, request: Request, body: ResponseRequest, caller: Caller) -> Response:
        job = await self._prepare(body, caller)
        head = ResponseHead(
            id=f"resp_{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._generation.model,
            request=body,
            sampling=job.sampling,
            answers=job.answers,
        )
        if not body.stream:
            output = await unless_disconnected(request, self._finished(job))
            return json_reply(await full_response(head, output, self._count))
        events = self._events(head, job)
        first = await unless_disconnected(request, _next(events))
        return EventStream(first, events)

    async def stored(self, request: Request, response_id: str) -> Response:
        """`GET` and `DELETE /v1/responses/{response_id}`: there is none."""
        self._door.authorize(request)
        message = f"response {response_id!r:.200} is not here: no responses are stored"
        raise ApiError(404, message, "response_id", "not_found")

    async def _prepare(self, body: ResponseRequest, caller: Caller) -> Job:
        """Check and tokenise a request; where it may, without the oldest items that do not fit.

        Raises:
            ApiError: what is wrong with it, and in which field.
        """
        try:
            return await self._prepare_without(body, caller, 0)
        except ApiError as error:
            if body.truncation != "auto" or error.code != "context_length_exceeded":
                raise
            return await self._fitting(body, caller, error)

    async def _fitting(self, body: ResponseRequest, caller: Caller, too_long: ApiError) -> Job:
        """The request without as few of its oldest items as make it fit; the last one stays."""
        job = None
        low, high = 1, len(body.items) - 1
        while low <= high:
            middle = (low + high) // 2
            try:
                job = await self._prepare_without(body, caller, middle)
                high = middle - 1
            except ApiError as error:
                if error.code != "context_length_exceeded":
                    raise
                low = middle + 1
        if job is None:
            raise too_long
        return job

    async def _prepare_without(
        self, body: ResponseRequest, caller: Caller, num_dropped: int
    ) -> Job:
        try:
            return await self._generation.prepare(body.chat(num_dropped), caller)
        except ApiError as error:
            hint = "" if body.truncation == "auto" else _TRUNCATION_HINT
            raise error.renamed(RENAMED).reworded(TRUNCATION_HINT, hint) from None

    async def _count(self, text: str) -> int:
        return len(await self._generation.encode_text(text, add_special_tokens=False))

    async def _finished(self, job: Job) -> RequestOutput:
        with self._generation.admit(job):
            async with aclosing(self._generation.outputs(job, stream=False)) as source:
                async for _, output in source:
                    check_served(output)
                    if output.finished:
                        return output
        raise AssertionError("an answer that has no end")

    async def _events(self, head: ResponseHead, job: Job) -> AsyncGenerator[bytes, None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._generation.admit(job))
            outputs = self._generation.outputs(job, stream=True)
            await stack.enter_async_context(aclosing(outputs))
            events = response_stream(head, outputs, self._count)
            await stack.enter_async_context(aclosing(events))
            async for piece in events:
                yield piece


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)
