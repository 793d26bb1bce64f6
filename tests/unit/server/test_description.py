"""What `/openapi.json` says of replies is what replies are."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.openapi.models import OpenAPI
from support.api_server import MODEL
from support.byte_llama import save_tiny_llama
from support.described import Description
from support.in_process import InProcessServer

from saqqara.cluster.openai.requests import ChatRequest
from saqqara.cluster.openai.responses.request import LOGPROBS
from saqqara.cluster.sampling import MAX_TEMPERATURE
from saqqara.cluster.server.description.table import REPLIES
from saqqara.cluster.server.docs import Endpoint, openapi

Json = dict[str, Any]
CONTEXT = 128
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("described-llama")
    save_tiny_llama(folder, max_position=CONTEXT)
    return folder


def chat(**fields: Any) -> tuple[str, str, Json]:
    return "POST", "/v1/chat/completions", {"messages": USER, "max_tokens": 4, **fields}


def completion(**fields: Any) -> tuple[str, str, Json]:
    return "POST", "/v1/completions", {"prompt": "hi", "max_tokens": 4, **fields}


def response(**fields: Any) -> tuple[str, str, Json]:
    return "POST", "/v1/responses", {"input": "hi", "max_output_tokens": 4, **fields}


def requests() -> Iterator[tuple[str, str, Json | None]]:
    """Requests of every kind of reply."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    yield chat()
    yield chat(n=2, logprobs=True, top_logprobs=2, stop=["a"])
    yield chat(logprobs=True, **usage)
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
    yield response(previous_response_id="x")
    yield "POST", "/tokenize", {"messages": USER}
    yield "POST", "/detokenize", {"tokens": [1, 2]}
    for path in ("/v1/models", "/v1/models/{model}", "/health", "/live", "/version", "/metrics"):
        yield "GET", path, None
    yield "GET", "/stats", None


def test_every_path_answers_as_described(model: Path) -> None:
    async def run() -> None:
        server = InProcessServer(model)
        transport = httpx2.ASGITransport(server.app)
        try:
            async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
                document = (await client.get("/openapi.json")).json()
                OpenAPI.model_validate(document)
                description = Description(document)
                assert {*description.operations} <= {*REPLIES}, "each has its line in the table"
                missing = set(description.operations)
                for method, path, body in requests():
                    fields = None if body is None else {"model": MODEL, **body}
                    answer = await client.request(
                        method, path.replace("{model}", MODEL), json=fields
                    )
                    kind = answer.headers["content-type"]
                    found = description.wrong(method, path, answer.status_code, kind, answer.text)
                    assert found is None, (path, body, found)
                    if answer.status_code == 200:
                        missing.discard((method, path))
                assert missing == set(), "every path has a request above that succeeds"
        finally:
            await server.generation.shutdown()

    asyncio.run(run())


def test_the_document_tells_bounds_and_what_has_no_effect() -> None:
    endpoint = Endpoint("POST", "/v1/chat/completions", "", ChatRequest, streams=True)
    schemas = openapi([endpoint], "1")["components"]["schemas"]
    fields = schemas["ChatRequest"]["properties"]
    bounded = next(kind for kind in fields["temperature"]["anyOf"] if kind["type"] == "number")
    assert (bounded["minimum"], bounded["maximum"]) == (0, MAX_TEMPERATURE)
    assert fields["messages"]["items"]["required"] == ["role", "content"]
    assert fields["use_beam_search"]["enum"] == [None, "", [], {}, False]
    (example,) = schemas["ChatRequest"]["examples"]
    ChatRequest.model_validate(example)


def test_what_is_not_as_described_is_found() -> None:
    reply = {"type": "object", "required": ["a"], "additionalProperties": False}
    reply |= {"properties": {"a": {"$ref": "#/components/schemas/Number"}}}
    content = {
        "application/json": {"schema": reply},
        "text/event-stream": {"schema": {"type": "string"}, "x-item-schema": reply},
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
