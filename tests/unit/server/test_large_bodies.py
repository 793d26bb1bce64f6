"""A body of megabytes costs no more than reading it: neither its errors nor its text hold others.

What is wrong a million times is said once, and what is long is tokenised beside the event loop.
"""

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from support.api_server import MODEL
from support.byte_llama import CHAT_TEMPLATE, save_tiny_llama
from support.in_process import InProcessServer

from saqqara.cluster.batch.lines import BadLine, Row, RowParser
from saqqara.cluster.batch.source import BatchSource
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_object,
    read_request,
)
from saqqara.cluster.openai.responses.request import ResponseRequest
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.server.generation import LONG_TEXT_CHARS
from saqqara.cluster.server.io import read_body
from saqqara.cluster.server.routes import base
from saqqara.cluster.server.routes.base import LONG_BODY_BYTES

MANY = 2000
WRONG: list[Any] = [
    [{}] * MANY,
    [None] * MANY,
    [[{}]] * MANY,
    [[{}] * MANY],
    {str(i): "x" for i in range(MANY)},
]
KINDS: list[type[BaseModel]] = [
    *(ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest),
    *(ResponseRequest, SamplingParams),
]


def num_errors(kind: type[BaseModel], fields: dict[str, Any]) -> int:
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_many_times_is_said_once(kind: type[BaseModel]) -> None:
    assert num_errors(SamplingParams, {"logit_bias": dict.fromkeys(range(MANY), "x")}) == 1
    for name in kind.model_fields:
        if name in ("stream_options", "response_format"):  # their errors are short
            continue
        for value in WRONG:
            count = num_errors(kind, {name: value})
            assert count < 10, f"{count} errors for {name}: {value!r:.40}"


def test_many_unknown_fields_are_one_error() -> None:
    fields = {"model": MODEL, "prompt": "a", **{f"x{i}": 1 for i in range(MANY)}}
    with pytest.raises(ApiError, match="x0 is not a field") as caught:
        read_request(CompletionRequest, fields)
    assert (caught.value.param, caught.value.code) == ("x0", "unknown_parameter")


@pytest.mark.parametrize("name", ["max_token" * MANY, "é" * MANY])
def test_a_name_of_megabytes_does_not_come_back(name: str) -> None:
    for fields in ({name: 1}, {"stream_options": {name: 1}}):
        with pytest.raises(ApiError) as caught:
            read_request(CompletionRequest, {"model": MODEL, "prompt": "a", **fields})
        assert len(str(caught.value.body)) < 1000


def test_a_long_text_is_read_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a chat it stands, and in both directions."""
    threads: list[str] = []
    long = "x" * (LONG_TEXT_CHARS + 1)
    apply_chat, decode = Tokenizer.apply_chat, Tokenizer.decode

    def note_chat(tokenizer: Tokenizer, messages: Any, options: Any = None) -> list[int]:
        threads.append(threading.current_thread().name)
        return apply_chat(tokenizer, messages, options)

    def note_decode(
        tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        threads.append(threading.current_thread().name)
        return decode(tokenizer, ids, skip_special_tokens)

    async def ask() -> None:
        server = InProcessServer(tmp_path)
        monkeypatch.setattr(Tokenizer, "apply_chat", note_chat)
        monkeypatch.setattr(Tokenizer, "decode", note_decode)
        for message in (
            {"role": "user", "content": long},
            {"role": "user", "content": [{"type": "text", "text": long}]},
            {"role": long, "content": "a"},
        ):
            assert (await server.post("/tokenize", {"messages": [message]}))[0] == 200
        short: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
        kwargs = {"chat_template_kwargs": {"a": long}}
        assert (await server.post("/tokenize", short | kwargs))[0] == 200
        assert (await server.post("/detokenize", {"tokens": [65] * len(long)}))[0] == 200
        await server.generation.shutdown()

    save_tiny_llama(tmp_path, chat_template=CHAT_TEMPLATE)
    asyncio.run(ask())
    assert len(threads) == 5
    assert all(name.startswith("tokenize") for name in threads), threads


def test_a_long_body_is_parsed_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many small values it takes a second; its errors come as others do."""
    threads: list[str] = []

    def note(text: str | bytes, what: str) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return read_object(text, what)

    async def ask() -> None:
        server = InProcessServer(tmp_path)
        monkeypatch.setattr(base, "read_object", note)
        body = {"model": MODEL, "prompt": [[1]] * LONG_BODY_BYTES}
        status, answer = await server.post("/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, "prompt")
        await server.generation.shutdown()

    save_tiny_llama(tmp_path, chat_template=CHAT_TEMPLATE)
    asyncio.run(ask())
    assert threads == ["parse_0"]


@pytest.mark.parametrize(
    ("length", "is_too_large"), [("2", False), ("²", False), ("11", True), ("9" * 5000, True)]
)
def test_any_content_length_is_read(length: str, is_too_large: bool) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    headers = [(b"content-length", length.encode("latin-1"))]
    reading = read_body(Request({"type": "http", "headers": headers}, receive), 10, 60)
    if is_too_large:
        with pytest.raises(ApiError, match="at most 10 bytes"):
            asyncio.run(reading)
    else:
        assert asyncio.run(reading) == b"{}"


def test_a_name_of_a_row_of_megabytes_is_said_in_short(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a", "custom_id": "c" * 100_000})
    (tmp_path / "rows.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    with BatchSource(tmp_path / "rows.jsonl") as source:
        source.scan(tmp_path)
        first, second = source.rows(RowParser(MODEL, {}))
    assert isinstance(first, Row)
    assert isinstance(second, BadLine)
    assert second.message.endswith("is already that of line 1")
    assert len(second.message) < 200
