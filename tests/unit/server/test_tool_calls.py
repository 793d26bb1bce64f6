"""Tools over HTTP and in batch lines: what a model writes becomes calls, in whole and in streams.

A grammar makes a model of random weights write a given answer.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support.api_server import ENGINE, MODEL
from support.byte_llama import save_tiny_llama
from support.in_process import InProcessServer
from support.tool_models import CALL, CLOCK, NAMED, PARIS, TOOL_TEMPLATE, WEATHER, answering

from saqqara import LLM
from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.sampling import SamplingParams

Json = dict[str, Any]
USER = {"role": "user", "content": "Paris?"}
CHATS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes whose template knows tools."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    save_tiny_llama(folder, max_position=2048, chat_template=TOOL_TEMPLATE)
    return folder


def chat(**fields: Any) -> Json:
    return {"model": MODEL, "messages": [USER], "temperature": 0, **fields}


BODIES: dict[str, Json] = {
    "a call": chat(tools=[WEATHER], **answering(f"I look. {CALL}")),
    "a call among others that is streamed": chat(
        tools=[WEATHER, CLOCK], stream=True, **answering(f"I look. {CALL}{CALL}")
    ),
    "one of two calls": chat(
        tools=[WEATHER], parallel_tool_calls=False, **answering(f"{CALL}{CALL}")
    ),
    "no call": chat(tools=[WEATHER], tool_choice="none", **answering(CALL)),
    "without tools": chat(**answering(CALL)),
    "required": chat(
        tools=[WEATHER, CLOCK],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=400,
        temperature=1,
        seed=3,
    ),
    "named": chat(tools=[WEATHER, CLOCK], tool_choice=NAMED, max_tokens=400, temperature=1, seed=3),
    "named and streamed": chat(
        tools=[WEATHER], tool_choice=NAMED, max_tokens=400, temperature=1, seed=3, stream=True
    ),
    "two answers": chat(
        tools=[WEATHER], tool_choice=NAMED, max_tokens=400, temperature=1, seed=3, n=2
    ),
    "a conversation with calls": chat(
        messages=[
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": PARIS},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        tools=[WEATHER],
        **answering("It is sunny."),
    ),
    "a form beside": chat(
        tools=[WEATHER], tool_choice="required", response_format={"type": "json_object"}
    ),
    "a schema that cannot be held": chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
        tool_choice="required",
    ),
    "broken arguments": chat(
        messages=[
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": "{"}}],
            },
        ]
    ),
}


@pytest.fixture(scope="module")
def answers(model: Path) -> dict[str, tuple[int, Any]]:
    """Status and body of each of the requests."""

    async def ask() -> dict[str, tuple[int, Any]]:
        server = InProcessServer(model)
        found = {name: await server.post(CHATS, body) for name, body in BODIES.items()}
        await server.generation.shutdown()
        return found

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def records(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """The record of each request that is not streamed, as a line of a batch job."""
    folder = tmp_path_factory.mktemp("job")
    bodies = {name: body for name, body in BODIES.items() if "stream" not in body}
    lines = [
        {"custom_id": name, "method": "POST", "url": CHATS, "body": body}
        for name, body in bodies.items()
    ]
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with LLM(str(model), **ENGINE) as llm:
        job = BatchJob(source, output, llm.config, SamplingParams())
        assert run_batch(job, llm._client).complete
    found = [json.loads(line) for line in output.read_text().splitlines()]
    return {record["custom_id"]: record for record in found}


def choices(answers: dict[str, tuple[int, Any]], name: str) -> list[Json]:
    status, body = answers[name]
    assert status == 200, body
    return list(body["choices"])


def calls(choice: Json) -> list[tuple[str, str]]:
    found = choice["message"].get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in found]


def added(events: list[Json]) -> tuple[str, list[tuple[str, str]], str | None]:
    """Content, calls and finish reason of a stream."""
    content, reason = "", None
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            content += delta.get("content") or ""
            reason = choice["finish_reason"]
            for call in delta.get("tool_calls", ()):
                index = call["index"]
                names.setdefault(index, call["function"].get("name"))
                arguments[index] = arguments.get(index, "") + call["function"]["arguments"]
    return content, [(names[index], arguments[index]) for index in names], reason


def test_what_the_model_writes_becomes_a_call(answers: dict[str, tuple[int, Any]]) -> None:
    (choice,) = choices(answers, "a call")
    assert choice["message"]["content"] == "I look."
    assert calls(choice) == [("weather", PARIS)]
    assert choice["finish_reason"] == "tool_calls"


def test_a_stream_has_the_same(answers: dict[str, tuple[int, Any]]) -> None:
    status, events = answers["a call among others that is streamed"]
    assert status == 200
    assert added(events) == ("I look.", [("weather", PARIS)] * 2, "tool_calls")


def test_one_call_is_enough_where_one_is_wanted(answers: dict[str, tuple[int, Any]]) -> None:
    (choice,) = choices(answers, "one of two calls")
    assert calls(choice) == [("weather", PARIS)]


@pytest.mark.parametrize("name", ["no call", "without tools"])
def test_without_tools_calls_are_text(answers: dict[str, tuple[int, Any]], name: str) -> None:
    (choice,) = choices(answers, name)
    assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_required_call_is_made(answers: dict[str, tuple[int, Any]]) -> None:
    (choice,) = choices(answers, "required")
    ((name, arguments),) = calls(choice)
    assert name in ("weather", "clock")
    assert isinstance(json.loads(arguments), dict)
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


@pytest.mark.parametrize("name", ["named", "two answers"])
def test_the_named_function_is_called(answers: dict[str, tuple[int, Any]], name: str) -> None:
    for choice in choices(answers, name):
        ((function, arguments),) = calls(choice)
        assert function == "weather"
        assert {"city"} <= json.loads(arguments).keys() <= {"city", "days"}
        assert choice["finish_reason"] == "stop"


def test_a_stream_of_the_named_function(answers: dict[str, tuple[int, Any]]) -> None:
    content, ((function, arguments),), reason = added(answers["named and streamed"][1])
    assert (content, function, reason) == ("", "weather", "stop")
    assert "city" in json.loads(arguments)


def test_a_conversation_may_have_calls(answers: dict[str, tuple[int, Any]], model: Path) -> None:
    (choice,) = choices(answers, "a conversation with calls")
    assert choice["message"]["content"] == "It is sunny."
    messages = BODIES["a conversation with calls"]["messages"]
    tokenizer = Tokenizer.load(model)
    text = tokenizer.decode(tokenizer.apply_chat(messages))
    assert "<tool_call>weather Paris</tool_call>\ntool: sunny" in text  # arguments as an object


@pytest.mark.parametrize(
    ("name", "param"),
    [
        ("a form beside", "tool_choice"),
        ("a schema that cannot be held", "tools"),
        ("broken arguments", "messages[1].tool_calls[0].function.arguments"),
    ],
)
def test_what_is_wrong_is_named(
    answers: dict[str, tuple[int, Any]], records: dict[str, Json], name: str, param: str
) -> None:
    status, body = answers[name]
    assert (status, body["error"]["param"]) == (400, param), body
    assert records[name]["error"]["param"] == param


def test_batch_lines_have_the_same(
    answers: dict[str, tuple[int, Any]], records: dict[str, Json]
) -> None:
    for name, record in records.items():
        status, body = answers[name]
        if status != 200:
            continue
        found = record["response"]["body"]["choices"]
        assert [calls(choice) for choice in found] == [calls(c) for c in body["choices"]], name
        for ours, theirs in zip(found, body["choices"], strict=True):
            assert ours["message"]["content"] == theirs["message"]["content"], name
            assert ours["finish_reason"] == theirs["finish_reason"], name


def test_thoughts_begin_where_the_prompt_begins_them(model: Path, tmp_path: Path) -> None:
    """A simple batch line has them beside its text."""
    lines: list[Json] = [
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 5},
        {"messages": [USER], "max_tokens": 5},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with LLM(str(model), **ENGINE) as llm:
        job = BatchJob(tmp_path / "in.jsonl", tmp_path / "out.jsonl", llm.config, SamplingParams())
        assert run_batch(job, llm._client).complete
    text = (tmp_path / "out.jsonl").read_text()
    found = sorted((json.loads(line) for line in text.splitlines()), key=lambda r: r["line"])
    assert found[0]["text"] is None
    assert found[0]["reasoning_content"]
    assert found[1]["text"]
    assert "reasoning_content" not in found[1]


@pytest.mark.parametrize(("choice", "content"), [("auto", "[TOOL_CALLS]"), ("none", "")])
def test_markers_that_are_special_tokens_are_seen(
    tmp_path: Path, choice: str, content: str
) -> None:
    """Without an end it is no call, and content; text without tools has no special tokens."""
    folder = tmp_path / MODEL
    template = "{{ tools }}[TOOL_CALLS]{{ messages[0].content }}"
    save_tiny_llama(folder, chat_template=template)
    backend = Tokenizer.load(folder).backend
    backend.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    backend.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(backend)}))
    marker = backend.convert_tokens_to_ids("[TOOL_CALLS]")

    async def ask() -> Json:
        server = InProcessServer(folder)
        body = chat(
            tools=[WEATHER],
            tool_choice=choice,
            allowed_token_ids=[marker],
            max_tokens=1,
            logprobs=True,
        )
        status, answer = await server.post(CHATS, body)
        assert status == 200, answer
        await server.generation.shutdown()
        return dict(answer["choices"][0])

    found = asyncio.run(ask())
    assert found["message"]["content"] == content
    assert bytes(found["logprobs"]["content"][0]["bytes"]).decode() == content


def test_chats_in_python_tell_the_model_of_tools(model: Path) -> None:
    with LLM(str(model), **ENGINE) as llm:
        params = SamplingParams(max_tokens=1)
        with_tools, without = (
            llm.chat([USER], params, use_tqdm=False, tools=tools)[0] for tools in ([WEATHER], None)
        )
    assert len(with_tools.prompt_token_ids) > len(without.prompt_token_ids) + 100
