"""What a server does beside answering: its other paths, its queue, and clients that leave."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.openapi.models import OpenAPI
from openai import AsyncOpenAI, OpenAI
from support.api_server import KEY, MAX_MODEL_LEN, MAX_QUEUE, MODEL, NUM_SLOTS, engine_flags
from support.server import Answer, Server, fetch, half_sent_requests, starting_server

from saqqara import __version__

LONG: dict[str, Any] = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}


def test_models_are_listed(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "saqqara")
    assert client.models.retrieve(MODEL) == model


def test_health_and_version_need_no_key(server: Server) -> None:
    assert server.get("/health") == (200, '{"status":"ok"}')
    assert json.loads(server.get("/version")[1]) == {"version": __version__}


def test_tokenize_and_detokenize_are_inverse(client: OpenAI, server: Server) -> None:
    text = "hello, wörld"
    answer: Any = client.post(f"{server.url}/tokenize", body={"prompt": text}, cast_to=object)
    assert answer["count"] == len(answer["tokens"]) == len(text.encode())
    assert answer["max_model_len"] == MAX_MODEL_LEN
    back: Any = client.post(
        f"{server.url}/detokenize", body={"tokens": answer["tokens"]}, cast_to=object
    )
    assert back == {"prompt": text}


def test_tokenize_applies_the_chat_template(client: OpenAI, server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    answer: Any = client.post(f"{server.url}/tokenize", body=body, cast_to=object)
    assert answer["count"] == len("user: hi\nassistant: ")


def test_metrics_count_what_was_generated(client: OpenAI, server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    client.completions.create(
        model=MODEL, prompt="hello", max_tokens=11, extra_body={"ignore_eos": True}
    )
    assert server.metric("vllm:generation_tokens_total") == before + 11
    assert f'vllm:generation_tokens_total{{model_name="{MODEL}"}}' in server.get("/metrics")[1]


def test_a_stream_that_is_left_frees_its_sequence_within_a_second(
    client: OpenAI, server: Server
) -> None:
    free, aborts = server.metric("saqqara:pages_free"), aborted(server)
    stream = client.completions.create(model=MODEL, prompt="hello", stream=True, **LONG)
    next(iter(stream))
    left = time.monotonic()
    stream.close()
    wait_for(lambda: aborted(server) == aborts + 1, 1.0)
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 1.0)
    wait_for(lambda: server.metric("saqqara:pages_free") == free, 1.0)
    assert time.monotonic() - left < 1.0


async def test_a_request_that_is_cancelled_frees_its_sequence(
    async_client: AsyncOpenAI, server: Server
) -> None:
    """Also where nothing is streamed, so that no write tells that the client has left."""
    aborts = aborted(server)
    request = asyncio.create_task(
        async_client.completions.create(model=MODEL, prompt="hello", **LONG)
    )
    while server.metric("vllm:num_requests_running") == 0:
        await asyncio.sleep(0.02)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    wait_for(lambda: aborted(server) == aborts + 1, 1.0)


def test_a_full_queue_is_told_when_to_come_again(client: OpenAI, server: Server) -> None:
    """Two keys fill it, as none may have all of it alone."""
    # As many sequences as may run and as one key may have waiting, then one of the other key.
    first = client.completions.create(
        model=MODEL, prompt="hello", n=NUM_SLOTS + MAX_QUEUE - 1, stream=True, **LONG
    )
    next(iter(first))
    other = client.with_options(api_key="other")
    with ThreadPoolExecutor(1) as threads:
        last = threads.submit(other.completions.create, model=MODEL, prompt="hello", max_tokens=1)
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == MAX_QUEUE, 5.0)
        for asking in (client, other):
            with pytest.raises(openai.RateLimitError) as caught:
                asking.completions.create(model=MODEL, prompt="hello", max_tokens=1)
            assert caught.value.code == "queue_full"
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert server.get("/health")[0] == 200
        first.close()
        assert last.result(30).usage is not None
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 5.0)
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
    assert answer.usage is not None


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/docs", "/openapi.json"])
def test_head_answers_as_get_without_the_body(server: Server, path: str) -> None:
    head, get = (fetch(f"{server.url}{path}", method) for method in ("HEAD", "GET"))
    assert (head.status, head.text) == (200, "")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_api_describes_itself(server: Server) -> None:
    spec = json.loads(server.get("/openapi.json")[1])
    OpenAPI.model_validate(spec)
    for path, methods in spec["paths"].items():
        for method in methods:
            url = server.url + path.replace("{model}", MODEL)
            assert fetch(url, method.upper()).status in (200, 401), f"{method} {path} is there"
    assert "<code>messages</code>" in server.get("/docs")[1]


@pytest.mark.parametrize("given", ["text/plain", "application/x-www-form-urlencoded", "json"])
def test_a_body_that_is_not_declared_as_json_is_refused(server: Server, given: str) -> None:
    """A web page may send these to any server that its browser reaches, without asking before."""
    answer = post(server, {"Content-Type": given})
    assert answer.status == 415
    error = json.loads(answer.text)["error"]
    assert error["code"] == "unsupported_media_type"
    assert "application/json" in error["message"]


@pytest.mark.parametrize("given", ["application/json", "Application/JSON; charset=utf-8"])
def test_a_body_that_is_declared_as_json_is_taken(server: Server, given: str) -> None:
    assert post(server, {"Content-Type": given}).status == 200


def test_pages_of_other_origins_are_refused(server: Server) -> None:
    answer = post(server, {"Origin": "https://example.com"})
    assert answer.status == 403
    assert json.loads(answer.text)["error"]["code"] == "origin_not_allowed"
    assert post(server, {"Origin": server.url}).status == 200


def test_bodies_that_do_not_come_hold_up_nobody(client: OpenAI, server: Server) -> None:
    """More of them than the server runs and queues; none counts before it is there."""
    with half_sent_requests(server, 200, KEY):
        assert server.get("/health")[0] == 200
        assert server.metric("vllm:num_requests_running") == 0
        answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
        assert answer.usage is not None


def test_a_port_in_use_is_an_error_before_anything_is_started(
    server: Server, byte_model: Path, tmp_path: Path
) -> None:
    """Serve itself would share the port, and each server would get some of the requests."""
    with starting_server(tmp_path / "log", *engine_flags(byte_model), port=server.port) as second:
        assert second.process.wait(60) == 1
        [line] = second.log.read_text().splitlines()
        assert line.startswith(f"error: port {server.port} of 127.0.0.1 is in use: ")
        assert not second.left_behind()
    assert server.get("/health")[0] == 200


def post(server: Server, headers: Mapping[str, str]) -> Answer:
    """The answer to a short completion with these headers."""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 1}
    url = f"{server.url}/v1/completions"
    return fetch(url, "POST", {"Authorization": f"Bearer {KEY}", **headers}, body)


def aborted(server: Server) -> float:
    """Requests that were given up so far."""
    return server.metric('vllm:request_success_total{finished_reason="abort"')


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
