"""What `/openapi.json` says of replies is what replies are."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI
from fastapi.routing import APIRoute
from support.api_server import ENGINE, MODEL
from support.byte_llama import save_tiny_llama
from support.described import Description
from support.local_server import engine_app
from support.tool_models import CALL, TOOL_TEMPLATE, WEATHER, answering

from saqqara.cluster.openai.requests import ChatRequest
from saqqara.cluster.openai.responses.request import LOGPROBS
from saqqara.cluster.sampling import MAX_TEMPERATURE
from saqqara.cluster.server.description.table import REPLIES
from saqqara.cluster.server.docs import Endpoint, openapi

Json = dict[str, Any]
CONTEXT = 1024
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("described") / MODEL
    folder.mkdir()
    save_tiny_llama(folder, max_position=CONTEXT, chat_template=TOOL_TEMPLATE)
    return folder


def chat(**fields: Any) -> tuple[str, str, Json]:
    return (
        "POST",
        "/v1/chat/completions",
        {"model": MODEL, "messages": USER, "max_tokens": 4, **fields},
    )


def completion(**fields: Any) -> tuple[str, str, Json]:
    return "POST", "/v1/completions", {"model": MODEL, "prompt": "hi", "max_tokens": 4, **fields}


def response(**fields: Any) -> tuple[str, str, Json]:
    return (
        "POST",
        "/v1/responses",
        {"model": MODEL, "input": "hi", "max_output_tokens": 4, **fields},
    )


def requests() -> Iterator[tuple[str, str, Json | None]]:
    """Requests of every kind of reply."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    yield chat()
    yield chat(n=2, logprobs=True, top_logprobs=2, stop=["a"])
    yield chat(logprobs=True, **usage)
    calling: Json = {"tools": [WEATHER], **answering(f"I look. {CALL}")}
    yield chat(**calling)
    yield chat(**calling, **usage)
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    yield chat(**thinking)
    yield chat(**thinking, **usage)
    yield completion()
    yield completion(prompt=["a", "b"], n=2, logprobs=2, stop_token_ids=[5])
    yield completion(logprobs=0, **usage)
    yield completion(top_p=2)
    yield completion(model="other")
    yield completion(echo=True, logprobs=1, return_token_ids=True, prompt_logprobs=1)
    yield completion(echo=True, logprobs=1, return_token_ids=True, **usage)
    yield chat(return_token_ids=True, logprobs=True, prompt_logprobs=1)
    yield chat(return_token_ids=True, **usage)
    yield response()
    yield response(stream=True, include=[LOGPROBS], top_logprobs=2)
    yield response(
        instructions="x",
        metadata={"a": "b"},
        tools=[{"type": "function", "name": "f"}],
        tool_choice="none",
        text={"format": {"type": "text"}},
        reasoning={"effort": "none"},
        truncation="auto",
        store=True,
    )
    calling["tools"] = [{"type": "function", **WEATHER["function"]}]
    calling["max_output_tokens"] = calling.pop("max_tokens")
    yield response(**calling)
    yield response(**calling, stream=True, include=[LOGPROBS])
    yield response(**thinking)
    yield response(**thinking, stream=True)
    yield response(previous_response_id="x")
    for method in ("GET", "DELETE"):
        yield method, "/v1/responses/{response_id}", None
    yield completion(conversation_id=MODEL)
    for _ in ("kept", "gone"):
        yield "DELETE", "/v1/conversations/{conversation_id}", None
    yield "POST", "/tokenize", {"messages": USER}
    yield "POST", "/tokenize", {"prompt": "hi", "return_token_strs": True}
    yield "POST", "/detokenize", {"tokens": [1, 2]}
    for path in ("/v1/models", "/v1/models/{model}", "/health", "/live", "/version", "/metrics"):
        yield "GET", path, None
    for path in ("/stats", "/load", "/tokenizer_info"):
        yield "GET", path, None


LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": MODEL, "prompt": "x", "max_tokens": 2},
}


NO_API = {"/", "/ui/page.css", "/ui/page.js", "/ui/settings.json", "/openapi.json", "/docs"}


def served(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Methods and paths of an application, paths as they are described."""
    for route in app.routes:
        if isinstance(route, APIRoute):
            path = route.path.replace(":path}", "}")
            yield from ((method, path) for method in {*(route.methods or ())} - {"HEAD"})


class Caller:
    """Asks a server, and compares what it answers with what it says of itself."""

    def __init__(self, client: httpx2.AsyncClient, document: Json) -> None:
        self.missing = {
            (method, path)
            for method, path in Description(document).operations
            if "200" in document["paths"][path][method.lower()]["responses"]
        }
        self._client = client
        self._description = Description(document)

    async def ask(
        self, method: str, path: str, body: Json | None = None, name: str = MODEL, **more: Any
    ) -> httpx2.Response:
        """The answer; `name` stands for the parameter of the path."""
        url = re.sub(r"{\w+}", name, path)
        answer = await self._client.request(method, url, json=body, **more)
        kind = answer.headers["content-type"]
        found = self._description.wrong(method, path, answer.status_code, kind, answer.text)
        assert found is None, (path, body, found)
        if answer.status_code in (200, 206):
            self.missing.discard((method, path))
        return answer

    async def ask_of_batches(self) -> None:
        """A file is uploaded, read, run and deleted."""
        upload = {"file": ("lines.jsonl", json.dumps(LINE).encode())}
        purpose = {"purpose": "batch"}
        file = (await self.ask("POST", "/v1/files", files=upload, data=purpose)).json()["id"]
        await self.ask("POST", "/v1/files", data=purpose)
        await self.ask("GET", "/v1/files", params={"limit": 5, "order": "asc"})
        await self.ask("GET", "/v1/files", params={"limit": "x"})
        await self.ask("GET", "/v1/files/{file_id}", name=file)
        await self.ask("GET", "/v1/files/{file_id}", name="file-none")
        content = "/v1/files/{file_id}/content"
        for wanted in ({}, {"Range": "bytes=0-3"}, {"Range": "bytes=9999-"}):
            await self.ask("GET", content, name=file, headers=wanted)
        job = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await self.ask("POST", "/v1/batches", job)).json()["id"]
        await self.ask("POST", "/v1/batches", {})
        await self.ask("GET", "/v1/batches/{batch_id}", name=batch)
        await self.ask("POST", "/v1/batches/{batch_id}/cancel", name=batch)
        await self.ask("GET", "/v1/batches")
        await self.ask("DELETE", "/v1/files/{file_id}", name=file)
        other = (await self.ask("POST", "/v1/files", files=upload, data=purpose)).json()["id"]
        await self.ask("DELETE", "/v1/files/{file_id}", name=other)


def test_every_path_answers_as_described(model: Path, tmp_path: Path) -> None:
    async def run() -> None:
        app = engine_app(
            model,
            engine_kwargs=ENGINE,
            batch_dir=str(tmp_path),
            enable_tokenizer_info_endpoint=True,
        )
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            document = (await client.get("/openapi.json")).json()
            OpenAPI.model_validate(document)
            caller = Caller(client, document)
            operations = Description(document).operations
            assert {*operations} == {*REPLIES}, "each has its line in the table"
            # The page and its parts are no API, and the document does not describe itself.
            assert {*served(app)} - {*operations} == {("GET", path) for path in NO_API}
            for method, path, body in requests():
                await caller.ask(method, path, body)
            await caller.ask_of_batches()
            assert caller.missing == set(), "every path has a request that succeeds"

    asyncio.run(run())


def test_the_document_tells_bounds_and_what_has_no_effect() -> None:
    endpoint = Endpoint("POST", "/v1/chat/completions", "", ChatRequest, streams=True)
    schemas = openapi([endpoint], "1")["components"]["schemas"]
    fields = schemas["ChatRequest"]["properties"]
    bounded = next(kind for kind in fields["temperature"]["anyOf"] if kind["type"] == "number")
    assert (bounded["minimum"], bounded["maximum"]) == (0, MAX_TEMPERATURE)
    assert fields["messages"]["items"]["required"] == ["role"]
    assert fields["use_beam_search"]["enum"] == [None, "", [], {}, False]
    (example,) = schemas["ChatRequest"]["examples"]
    ChatRequest.model_validate(example)


def test_what_is_not_as_described_is_found() -> None:
    reply = {"type": "object", "required": ["a"], "additionalProperties": False}
    reply |= {"properties": {"a": {"$ref": "#/components/schemas/Number"}}}
    kinds = [{"const": "[DONE]"}, {"type": "string", "contentSchema": reply}]
    content = {
        "application/json": {"schema": reply},
        "text/event-stream": {"schema": {"properties": {"data": {"anyOf": kinds}}}},
    }
    description = Description(
        {
            "paths": {"/x": {"get": {"responses": {"200": {"content": content}}}}},
            "components": {"schemas": {"Number": {"type": "integer"}, "Error": {"type": "object"}}},
        }
    )

    def wrong(status: int, kind: str, text: str) -> str | None:
        return description.wrong("GET", "/x", status, kind, text)

    assert wrong(200, "application/json", '{"a": 1}') is None
    assert wrong(200, "application/json; charset=utf-8", '{"a": 1}') is None
    assert "is not of type 'integer'" in (wrong(200, "application/json", '{"a": "x"}') or "")
    assert "unexpected" in (wrong(200, "application/json", '{"a": 1, "b": 2}') or "")
    assert "is not described" in (wrong(404, "application/json", "{}") or "")
    assert "is not described" in (wrong(200, "text/html", "") or "")
    events = ['data: {"a": 1}', 'event: x\ndata: {"a": 2}', "data: [DONE]", ""]
    assert wrong(200, "text/event-stream", "\n\n".join(events)) is None
    bad = json.dumps({"a": None})
    assert wrong(200, "text/event-stream", f"data: {bad}\n\n") is not None
    assert wrong(200, "text/event-stream", "event: x\n\n") is not None
