"""Answers with many log-probabilities: written in pieces, the same as at once, and bounded."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.api_server import MODEL
from support.byte_llama import save_tiny_llama
from support.in_process import InProcessServer

from saqqara.cluster.openai.logprobs import echoed_logprobs
from saqqara.cluster.openai.replies import MANY_LOGPROBS, chunk_choice, in_pieces, to_bytes

LONG = "abcdefgh" * 100
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=4),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=30,
)


@given(VALUES, st.integers(0, 600))
def test_pieces_are_the_whole(value: Any, length: int) -> None:
    data = {"a": value, "b": [{"i": i} for i in range(length)], "c": [], "d": {}}
    assert b"".join(in_pieces(data)) == to_bytes(data)


def test_a_long_list_is_in_many_pieces() -> None:
    data = {"x": [{"y": list(range(2000))}], "z": list(range(10_000))}
    assert max(map(len, in_pieces(data))) < 3000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / MODEL
    save_tiny_llama(folder, max_position=2048)
    return folder


@pytest.fixture
def server(model: Path) -> Iterator[InProcessServer]:
    server = InProcessServer(model)
    yield server
    asyncio.run(server.generation.shutdown())


def ask(server: InProcessServer, *bodies: dict[str, Any]) -> list[tuple[int, Any]]:
    async def each() -> list[tuple[int, Any]]:
        usual = {"model": MODEL, "prompt": LONG, "max_tokens": 2, "temperature": 0}
        return [await server.post("/v1/completions", {**usual, **body}) for body in bodies]

    return asyncio.run(each())


def test_large_answers_are_written_beside_the_event_loop(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or streamed, they say the same; small ones are not worth a thread."""
    threads: dict[str, list[int]] = {"whole": [], "events": []}

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            threads[name].append(threading.get_ident())
            return function(*arguments)

        return call

    room = "saqqara.cluster.openai"
    monkeypatch.setattr(f"{room}.replies.echoed_logprobs", noted("whole", echoed_logprobs))
    monkeypatch.setattr(f"{room}.events.chunk_choice", noted("events", chunk_choice))
    many, few = {"echo": True, "logprobs": 5}, {"echo": True, "logprobs": 1, "prompt": "abc"}
    assert len(LONG) * 5 > MANY_LOGPROBS
    large, streamed, small = ask(server, many, {**many, "stream": True}, few)
    here = threading.get_ident()
    assert [thread == here for thread in threads["whole"]] == [False, False, True]
    assert threads["events"][0] != here
    assert set(threads["events"][1:]) <= {here}
    whole = large[1]["choices"][0]["logprobs"]
    parts = [event["choices"][0]["logprobs"] for event in streamed[1]]
    for name in ("tokens", "text_offset"):
        assert [item for part in parts if part for item in part[name]] == whole[name]
    assert len(small[1]["choices"][0]["logprobs"]["tokens"]) == 5


def test_more_than_the_server_gives_is_refused_before_it_is_queued(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = server.generation.limits.model_copy(update={"max_answer_logprobs": 5 * len(LONG)})
    monkeypatch.setattr(server.generation, "limits", limits)
    at_the_limit, beyond, of_choices = ask(
        server,
        {"prompt_logprobs": 4},
        {"prompt_logprobs": 5},
        {"n": 4, "logprobs": 1, "max_tokens": 1000, "seed": 1},
    )
    assert at_the_limit[0] == 200
    fields = ("prompt_logprobs", "logprobs")
    for field, (status, body) in zip(fields, (beyond, of_choices), strict=True):
        assert status == 400
        error = body["error"]
        assert (error["param"], error["code"]) == (field, "limit_exceeded")
        assert str(limits.max_answer_logprobs) in error["message"]
    assert json.dumps(beyond[1], allow_nan=False)
