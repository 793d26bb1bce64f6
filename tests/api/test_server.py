"""What a server does beside answering: its other paths, its queue, and clients that leave."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from support.api_server import MAX_MODEL_LEN, MAX_QUEUE, MODEL, NUM_SLOTS
from support.server import Server

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
    # One request of as many sequences as may run and wait.
    full = client.completions.create(
        model=MODEL, prompt="hello", n=NUM_SLOTS + MAX_QUEUE, stream=True, **LONG
    )
    next(iter(full))
    wait_for(lambda: server.metric("vllm:num_requests_waiting") == MAX_QUEUE, 2.0)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert server.get("/health")[0] == 200
    full.close()
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 2.0)
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
    assert answer.usage is not None


def aborted(server: Server) -> float:
    """Requests that were given up so far."""
    return server.metric('vllm:request_success_total{finished_reason="abort"')


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
