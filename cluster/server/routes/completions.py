"""`/v1/completions` and `/v1/chat/completions`."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.openai.events import event_stream
from saqqara.cluster.openai.replies import (
    MANY_LOGPROBS,
    ReplyHead,
    check_served,
    full_reply,
    in_pieces,
    num_logprobs,
)
from saqqara.cluster.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from saqqara.cluster.request import RequestOutput
from saqqara.cluster.server.docs import Endpoint
from saqqara.cluster.server.generation import Caller, Job
from saqqara.cluster.server.io import EventStream, unless_disconnected

from .base import Door, json_reply, register


class CompletionRoutes:
    """Texts and chats that are continued."""

    endpoints = (
        Endpoint("POST", "/v1/chat/completions", "Answer a chat.", ChatRequest, streams=True),
        Endpoint("POST", "/v1/completions", "Continue a text.", CompletionRequest, streams=True),
    )

    def __init__(self, door: Door) -> None:
        self._door = door
        self._generation = door.generation

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        handlers = {"/v1/completions": self.completions, "/v1/chat/completions": self.chats}
        register(app, "POST", handlers)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._generate(request, CompletionRequest)

    async def chats(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._generate(request, ChatRequest)

    async def _generate(
        self, request: Request, kind: type[CompletionRequest] | type[ChatRequest]
    ) -> Response:
        body = await self._door.read(request, kind)
        assert isinstance(body, CompletionRequest | ChatRequest)
        async with self._door.answering(request, body.timeout_seconds) as caller:
            return await self._answer(request, body, caller)

    async def _answer(
        self, request: Request, body: CompletionRequest | ChatRequest, caller: Caller
    ) -> Response:
        """The answer, or its first event; a stream's end is the engine's to see to."""
        job = await self._generation.prepare(body, caller)
        is_chat = isinstance(body, ChatRequest)
        head = ReplyHead(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._generation.model,
            is_chat=is_chat,
            shown=job.shown,
            answers=job.answers,
        )
        if not body.stream:
            outputs = await unless_disconnected(request, self._finished(job))
            return await _whole(head, outputs)
        events = self._events(head, job, body)
        first = await unless_disconnected(request, _next(events))
        return EventStream(first, events)

    async def _finished(self, job: Job) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        with self._generation.admit(job):
            async with aclosing(self._generation.outputs(job, stream=False)) as source:
                async for place, output in source:
                    check_served(output)
                    outputs[place] = output
        return [outputs[place] for place in sorted(outputs)]

    async def _events(
        self, head: ReplyHead, job: Job, body: GenerationRequest
    ) -> AsyncGenerator[bytes, None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._generation.admit(job))
            outputs = self._generation.outputs(job, stream=True)
            await stack.enter_async_context(aclosing(outputs))
            events = event_stream(
                head,
                outputs,
                include_usage=body.include_usage,
                continuous_usage=body.continuous_usage,
            )
            await stack.enter_async_context(aclosing(events))
            async for piece in events:
                yield piece


async def _whole(head: ReplyHead, outputs: Sequence[RequestOutput]) -> Response:
    """A whole answer; a large one is written in a thread, and others go on meanwhile."""
    if num_logprobs(outputs) <= MANY_LOGPROBS:
        return json_reply(full_reply(head, outputs))

    def write() -> bytes:
        return b"".join(in_pieces(full_reply(head, outputs)))

    return Response(await asyncio.to_thread(write), media_type="application/json")


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)
