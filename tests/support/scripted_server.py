"""A server with the page whose answers a test writes."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from saqqara.cluster.server.page.routes import add_page

KEY = "sk-page"


class Scripted:
    """The page, and what it asks for, as written by a test.

    Attributes:
        asked: bodies of the chats so far.
        deltas: what the answer streams, one event each.
        refusal: an error instead: status, message and field.
        stats: what `/stats` answers.
    """

    def __init__(self, *, needs_key: bool = False) -> None:
        self._needs_key = needs_key
        self.reset()
        self.app = FastAPI()
        add_page(self.app, "full", needs_key=needs_key)
        self.app.add_api_route("/v1/models", self.models, methods=["GET"])
        self.app.add_api_route("/stats", self.answer_stats, methods=["GET"])
        self.app.add_api_route("/health", self.health, methods=["GET"])
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])

    def reset(self) -> None:
        """Forget what a test has written."""
        self.asked: list[dict[str, Any]] = []
        self.deltas: list[dict[str, Any]] = [{"content": "hello"}]
        self.refusal: tuple[int, str, str | None] | None = None
        self.stats: dict[str, Any] = stats([8.0, 4.0, 2.0], 16.0)

    async def models(self, request: Request) -> Response:
        return self._unless_refused(request, {"data": [{"id": "scripted"}]})

    async def answer_stats(self, request: Request) -> Response:
        return self._unless_refused(request, self.stats)

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if self.refusal:
            status, message, param = self.refusal
            error = {"message": message, "type": "invalid_request_error", "param": param}
            return JSONResponse({"error": {**error, "code": None}}, status)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        for delta in self.deltas:
            yield event({"choices": [{"index": 0, "delta": delta}]})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
        layers = [208, 208] if body.get("retention") == "full" else [88, 16]  # of two kv heads
        tokens = {"kept_tokens": sum(layers), "full_tokens": 416, "kept_tokens_by_layer": layers}
        cache = {**tokens, "kept_bytes": 256 * sum(layers), "full_bytes": 256 * 416}
        yield event({"choices": [], "usage": {**usage, "kv_cache": cache}})
        yield "data: [DONE]\n\n"

    def _unless_refused(self, request: Request, data: Any) -> Response:
        if self._needs_key and request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "the API key is missing or wrong"}}, 401)
        return JSONResponse(data)


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def stats(kept: list[float], full: float, **queue: int) -> dict[str, Any]:
    """Of `/stats`, what the page reads."""
    return {
        "is_ready": True,
        "queue": {"running": 1, "waiting": 0, **queue},
        "throughput": {"generation_tokens_per_second": 12.5},
        "kv_cache": {"kept_bytes": 2048, "full_bytes": 8192},
        "pyramid": {
            "is_live": True,
            "num_sequences": 1,
            "kept_tokens": kept,
            "full_tokens": full,
        },
    }
