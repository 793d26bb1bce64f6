"""Which web pages may use a server, and what `/docs` tells them, without an engine."""

import json
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.openapi.models import OpenAPI
from starlette.testclient import TestClient

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import ChatRequest, CompletionRequest
from saqqara.cluster.server.docs import Endpoint, docs_page, openapi
from saqqara.cluster.server.guard import add_guards, check_is_json, is_own_origin
from saqqara.cluster.settings import serve_config

PAGE = "https://example.com"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def nothing() -> dict[str, int]:
    return {}


def client(*allowed: str) -> TestClient:
    app = FastAPI()
    app.add_api_route("/x", nothing, methods=["GET", "POST"])
    add_guards(app, allowed)
    return TestClient(app, base_url="http://127.0.0.1:8000")


def cors_headers(answer: Any) -> set[str]:
    return {name for name in answer.headers if name.startswith("access-control")}


def test_a_foreign_page_is_refused_and_a_program_is_not() -> None:
    assert client().post("/x").status_code == 200
    for origin in (PAGE, "null", "http://127.0.0.1:9000", "http://localhost.evil.com"):
        answer = client().post("/x", headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "--allowed-origins" in answer.json()["error"]["message"]
        assert not cors_headers(answer)


def test_without_a_setting_nothing_is_said_about_origins() -> None:
    answer = client().options("/x")
    assert (answer.status_code, cors_headers(answer)) == (405, set())
    answer = client().options("/x", headers={"Origin": PAGE, **PREFLIGHT})
    assert (answer.status_code, cors_headers(answer)) == (403, set())


@pytest.mark.parametrize("allowed", [PAGE, "*"])
def test_an_allowed_page_gets_what_its_browser_asks_for(allowed: str) -> None:
    answer = client(allowed).options("/x", headers={"Origin": PAGE, **PREFLIGHT})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == allowed
    assert answer.headers["access-control-allow-headers"].lower() == "authorization,content-type"
    answer = client(allowed).post("/x", headers={"Origin": PAGE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == allowed
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Content-Type": "application/json"}, None),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, None),
        ({"Content-Type": "application/json", "Content-Encoding": "Identity"}, None),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "packed as 'gzip'"),
        ({"Content-Type": "text/plain"}, "not 'text/plain'"),
        ({}, "which is missing"),
    ],
)
def test_a_body_is_json_as_it_is(headers: dict[str, str], said: str | None) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "headers": raw})
    if said is None:
        check_is_json(request)
        return
    with pytest.raises(ApiError, match=said) as caught:
        check_is_json(request)
    assert caught.value.status == 415


def test_a_server_without_keys_is_asked_by_address_or_by_a_name_that_it_was_given() -> None:
    app = FastAPI()
    app.add_api_route("/x", nothing, methods=["GET", "POST"])
    add_guards(app, (), ("models.example.com",))
    browser = TestClient(app, base_url="http://127.0.0.1:8000")
    answer = browser.post("/x", headers={"Host": "rebound.evil.com:8000"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert "--allowed-hosts" in answer.json()["error"]["message"]
    for host in ("127.0.0.1:8000", "localhost", "models.example.com:80"):
        assert browser.post("/x", headers={"Host": host}).status_code == 200
    assert client().post("/x", headers={"Host": "any.name"}).status_code == 200, "with keys"


def test_one_allowed_page_lets_no_other_in() -> None:
    for request in (client(PAGE).post, client(PAGE).options):
        assert request("/x", headers={"Origin": "https://evil.com"}).status_code == 403


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://localhost:8000", "localhost:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://10.0.0.7", "10.0.0.7", True),
        ("https://10.0.0.7", "10.0.0.7", True),
        ("http://127.0.0.1:8001", "127.0.0.1:8000", False),
        ("http://localhost:8000", "127.0.0.1:8000", False),
        ("http://evil.com:8000", "evil.com:8000", False),  # its owner may point it here
        ("null", "127.0.0.1:8000", False),
        ("http://127.0.0.1:x", "127.0.0.1:8000", False),
        ("http://[", "127.0.0.1:8000", False),
    ],
)
def test_a_page_of_the_server_itself_is_known_by_address(origin: str, host: str, own: bool) -> None:
    assert is_own_origin(origin, host) is own


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://", ""])
def test_an_origin_that_is_none_is_an_error(origin: str) -> None:
    settings = {"model_loading_config": {"model_id": "x"}, "allowed_origins": [origin]}
    with pytest.raises(ValueError, match=r"allowed_origins: .*is no origin; write scheme"):
        serve_config(settings)


def test_an_origin_may_be_written_in_capitals() -> None:
    settings = {"model_loading_config": {"model_id": "x"}, "allowed_origins": ["HTTPS://A.com"]}
    assert serve_config(settings).allowed_origins == ("https://a.com",)


def test_the_description_is_openapi_and_the_page_shows_its_fields() -> None:
    endpoints = (
        Endpoint("POST", "/v1/chat/completions", "Answer a chat.", ChatRequest, streams=True),
        Endpoint("POST", "/v1/completions", "Continue a text.", CompletionRequest),
        Endpoint("GET", "/v1/models/{model}", "The model."),
    )
    spec = openapi(endpoints, "1.2", "/smol")
    OpenAPI.model_validate(json.loads(json.dumps(spec)))
    assert spec["servers"] == [{"url": "/smol"}]
    fields = spec["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "retention", "stop"} <= set(fields)
    page = docs_page(spec)
    for name in ("messages", "temperature", "retention"):
        assert f"<code>{name}</code>" in page
    assert "GET /smol/v1/models/{model}" in page
    assert "src=" not in page, "it needs no network"
    assert "http" not in page.replace("HTTP", "")
