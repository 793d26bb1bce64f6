"""The Responses API in this process, spoken to by the official client."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from pydantic import BaseModel
from support.api_server import MODEL
from support.byte_llama import save_tiny_llama
from support.in_process import InProcessServer
from support.tool_models import CALL, PARIS, TOOL_TEMPLATE, WEATHER, answering

from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.openai.responses.events import full_response, response_stream
from saqqara.cluster.openai.responses.output import Output
from saqqara.cluster.openai.responses.reply import ResponseHead
from saqqara.cluster.openai.responses.request import LOGPROBS, ResponseRequest
from saqqara.cluster.openai.tools.choice import read_tool_use
from saqqara.cluster.openai.tools.reader import PLAIN, AnswerFormat
from saqqara.cluster.openai.tools.style import ChatStyle
from saqqara.cluster.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from saqqara.cluster.sampling import SamplingParams

T = TypeVar("T")
Json = dict[str, Any]
CONTEXT = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("responses-llama")
    save_tiny_llama(folder, max_position=CONTEXT)
    return folder


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose template knows tools and thoughts."""
    folder = tmp_path_factory.mktemp("tools-llama")
    save_tiny_llama(folder, max_position=2048, chat_template=TOOL_TEMPLATE)
    return folder


def speak(model: Path, talk: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
    """What a conversation with a server of its own gives."""

    async def run() -> T:
        server = InProcessServer(model, prefix_caching=False)
        transport = httpx2.ASGITransport(server.app)
        try:
            async with AsyncOpenAI(
                base_url="http://127.0.0.1/v1",
                api_key="-",
                max_retries=0,
                http_client=httpx2.AsyncClient(transport=transport),
            ) as client:
                return await talk(client)
        finally:
            await server.generation.shutdown()

    return asyncio.run(run())


def test_an_answer_streamed_is_the_answer_whole(model: Path) -> None:
    asked: Json = {
        "model": MODEL,
        "input": "hi",
        "instructions": "Answer.",
        "temperature": 0,
        "max_output_tokens": 9,
        "include": [LOGPROBS],
        "top_logprobs": 2,
        "metadata": {"a": "b"},
    }

    async def talk(client: AsyncOpenAI) -> None:
        whole = await client.responses.create(**asked)
        events: list[Any] = [
            event async for event in await client.responses.create(**asked, stream=True)
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert {*kinds[4:-4]} == {"response.output_text.delta"}
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        last = events[-1].response
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert "".join(event.delta for event in deltas) == whole.output_text == last.output_text
        assert sum(len(event.logprobs) for event in deltas) == 9
        own: Any = {"id": True, "created_at": True, "output": {"__all__": {"id"}}}
        assert whole.model_dump(exclude=own) == last.model_dump(exclude=own)
        assert whole.usage is not None
        assert whole.usage.output_tokens == 9
        assert whole.usage.total_tokens == whole.usage.input_tokens + 9
        assert (whole.status, whole.metadata, whole.model_extra) == (
            "incomplete",
            {"a": "b"},
            {"store": False},
        )
        message: Any = whole.output[0]
        entries = message.to_dict()["content"][0]["logprobs"]
        assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 9

    speak(model, talk)


def test_the_clients_stream_gathers_what_it_gets(model: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        ours = {"stop": ["/"], "seed": 3, "retention": "snapkv", "budget": 64}
        async with client.responses.stream(
            model=MODEL, input="hi", temperature=0, extra_body=ours
        ) as stream:
            texts = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert final.status == "completed"
        assert final.output_text == "".join(texts)
        assert "/" not in final.output_text

    speak(model, talk)


def test_an_answer_goes_back_as_input(model: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        first = await client.responses.create(model=MODEL, input="hi", max_output_tokens=3)
        sent: list[Any] = [{"role": "user", "content": "hi"}, *first.output]
        sent.append({"role": "user", "content": "more"})
        second = await client.responses.create(model=MODEL, input=sent, max_output_tokens=3)
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens + len("user: more\n")

    speak(model, talk)


def test_the_oldest_items_are_dropped_only_where_they_may_be(model: Path) -> None:
    items: list[Any] = [{"role": "user", "content": 20 * str(i)} for i in range(9)]

    async def talk(client: AsyncOpenAI) -> None:
        ask = client.responses.create
        with pytest.raises(BadRequestError, match="input has") as caught:
            await ask(model=MODEL, input=items, max_output_tokens=4)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
        assert 'truncation="auto"' in caught.value.message
        assert "truncate_prompt_tokens" not in caught.value.message, "no field of responses"
        answer = await ask(
            model=MODEL, input=items, max_output_tokens=4, truncation="auto", instructions="Go."
        )
        line = len("user: \n") + 20
        around = len("system: Go.\nassistant: ")
        assert answer.usage is not None
        assert answer.usage.input_tokens == around + (CONTEXT - 4 - around) // line * line
        too_long = [*items, {"role": "user", "content": CONTEXT * "x"}]
        with pytest.raises(BadRequestError, match="input has") as caught:
            await ask(model=MODEL, input=too_long, truncation="auto")
        assert "truncat" not in caught.value.message, "it is set already"

    speak(model, talk)


def test_nothing_is_stored(model: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        answer = await client.responses.create(
            model=MODEL, input="hi", max_output_tokens=1, store=True
        )
        for call in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(NotFoundError, match="no responses are stored"):
                await call(answer.id)
        with pytest.raises(NotFoundError, match="does not exist here"):
            await client.responses.create(model="other", input="hi", stream=True)

    speak(model, talk)


def answered(text: str) -> Json:
    """What has any model answer so."""
    fields = answering(text)
    return {"max_output_tokens": fields.pop("max_tokens"), "extra_body": fields}


TOOL: Any = {"type": "function", **WEATHER["function"]}


def test_calls_are_items_whole_and_streamed(tool_model: Path) -> None:
    text = f"I look. {CALL}{CALL}"
    asked: Json = {"model": MODEL, "input": "Paris?", "tools": [TOOL], **answered(text)}

    async def talk(client: AsyncOpenAI) -> None:
        whole = await client.responses.create(**asked, include=[LOGPROBS])
        kinds = [item.type for item in whole.output]
        assert kinds == ["message", "function_call", "function_call"]
        message, *calls = (item.to_dict() for item in whole.output)
        assert whole.output_text == "I look."
        assert {call["arguments"] for call in calls} == {PARIS}
        parts: Any = message["content"]
        assert "".join(entry["token"] for entry in parts[0]["logprobs"]) == "I look."
        async with client.responses.stream(**asked, include=[LOGPROBS]) as stream:
            told: list[str] = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert told.count("response.function_call_arguments.done") == 2
        assert final.output_text == whole.output_text
        assert final.status == whole.status == "completed"
        streamed = [[_lasting(item) for item in r.output] for r in (whole, final)]
        assert streamed[0] == streamed[1]
        assert final.usage == whole.usage
        sent: list[Any] = [{"role": "user", "content": "Paris?"}, *whole.output]
        sent += [
            {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}
            for call in calls
        ]
        again = await client.responses.create(
            model=MODEL, input=sent, tools=[TOOL], max_output_tokens=3
        )
        assert again.usage is not None
        assert whole.usage is not None
        assert again.usage.input_tokens > whole.usage.input_tokens

    speak(tool_model, talk)


def _lasting(item: Any) -> Json:
    """An item without what is its own each time, and what the client adds."""
    fields: Json = item.to_dict()
    for part in fields.get("content", ()):
        part.pop("parsed", None)
    own = ("id", "call_id", "parsed_arguments")
    return {name: value for name, value in fields.items() if name not in own}


def test_a_call_that_must_be_made_is_made(tool_model: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        choices: list[Any] = [
            "required",
            {"type": "function", "name": "weather"},
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "weather"}],
            },
        ]
        other: Any = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
        for choice in choices:
            answer = await client.responses.create(
                model=MODEL,
                input="Paris?",
                tools=[TOOL] if choice == "required" else [TOOL, other],
                tool_choice=choice,
                parallel_tool_calls=False,
                max_output_tokens=400,
                extra_body={"seed": 3},
            )
            (call,) = answer.output
            assert call.type == "function_call"
            assert call.name == "weather"
            assert "city" in json.loads(call.arguments)

    speak(tool_model, talk)


class Box(BaseModel):
    """What an answer is held to."""

    side: Literal[1, 2]
    is_full: bool


def test_an_answer_is_held_to_a_schema_and_parsed(model: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        parsed = await client.responses.parse(
            model=MODEL, input="A box", text_format=Box, max_output_tokens=60
        )
        assert isinstance(parsed.output_parsed, Box)
        free: Any = {"format": {"type": "json_object"}}
        answer = await client.responses.create(
            model=MODEL, input="x", text=free, max_output_tokens=60, temperature=0
        )
        assert answer.output_text.startswith("{")
        bad: Any = {"type": "json_schema", "name": "n", "schema": {"type": "nothing"}}
        with pytest.raises(BadRequestError) as caught:
            await client.responses.create(model=MODEL, input="x", text={"format": bad})
        assert (caught.value.param or "").startswith("text.format")

    speak(model, talk)


async def count(text: str) -> int:
    return len(text)


def head(answers: AnswerFormat = PLAIN) -> ResponseHead:
    request = ResponseRequest(model=MODEL, input="hi")
    return ResponseHead("resp_1", 1, MODEL, request, SamplingParams(logprobs=0), answers)


def output(text: str, *, is_finished: bool = False) -> RequestOutput:
    """An output whose tokens are characters."""
    entries = tuple({ord(c): Logprob(-1.0, 1, c, c.encode())} for c in text)
    choice = CompletionOutput(
        0,
        text,
        tuple(map(ord, text)),
        logprobs=entries,
        finish_reason="stop" if is_finished else None,
    )
    return RequestOutput("r", None, (1, 2), (choice,), is_finished, RequestMetrics(0.0))


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_thoughts_are_an_item_and_their_tokens_are_counted(step: int) -> None:
    """However many tokens come at a time; log-probabilities are those of the message alone."""
    text = f"<think>Hm, Paris.</think>I look. {CALL}"
    style = ChatStyle.of(TOOL_TEMPLATE, "auto", "auto")
    answers = style.answer_format(read_tool_use([WEATHER], None, None))

    async def outputs() -> Any:
        for end in range(step, len(text), step):
            yield 0, output(text[:end])
        yield 0, output(text, is_finished=True)

    sent = b"".join([p async for p in response_stream(head(answers), outputs(), count)]).decode()
    data = [json.loads(line[6:]) for line in sent.split("\n") if line.startswith("data: ")]
    response = data[-1]["response"]
    thoughts, message, call = response["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hm, Paris."}]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == len("Hm, Paris.")
    assert message["content"][0]["text"] == "I look."
    assert "".join(e["token"] for e in message["content"][0]["logprobs"]) == "I look."
    assert call["arguments"] == PARIS
    whole = await full_response(head(answers), output(text, is_finished=True), count)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["usage"] == response["usage"]


async def test_an_engine_that_dies_on_the_way_is_told_in_events() -> None:
    async def outputs() -> Any:
        yield 0, output("so f")
        raise EngineDeadError("the engine has ended")

    sent = b"".join([piece async for piece in response_stream(head(), outputs(), count)]).decode()
    names = [line for line in sent.split("\n") if line.startswith("event: ")]
    assert names[-2:] == ["event: error", "event: response.failed"]
    assert '"code":"engine_dead"' in sent
    assert '"text":"so f"' in sent


async def test_an_engine_that_dies_before_is_an_error() -> None:
    async def outputs() -> Any:
        for _ in range(1):
            raise EngineDeadError("the engine has ended")
        yield

    with pytest.raises(EngineDeadError):
        await anext(response_stream(head(), outputs(), count))


def test_thoughts_texts_and_calls_are_items_that_end_in_turn() -> None:
    made = Output()
    events = [
        *made.add_reasoning("h"),
        *made.add_reasoning("m"),
        *made.add_text("I call."),
        *made.begin_call("call_1", "f"),
        *made.add_arguments('{"a":'),
        *made.add_arguments("1}"),
        *made.begin_call("call_2", "g"),
        *made.add_arguments("{}"),
        *made.end(is_cut=False),
    ]
    kinds = [(event["output_index"], event["type"].removeprefix("response.")) for event in events]
    part = ["output_item.added", "content_part.added"]
    ends = ["content_part.done", "output_item.done"]
    text, thoughts = "output_text", "reasoning_text"
    call = "function_call_arguments"
    assert kinds == [
        *((0, k) for k in (*part, *[f"{thoughts}.delta"] * 2, f"{thoughts}.done", *ends)),
        *((1, k) for k in (*part, f"{text}.delta", f"{text}.done", *ends)),
        *((2, k) for k in (part[0], *[f"{call}.delta"] * 2, f"{call}.done", ends[1])),
        *((3, k) for k in (part[0], f"{call}.delta", f"{call}.done", ends[1])),
    ]
    assert [item["type"] for item in made.items] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert {item["status"] for item in made.items} == {"completed"}
    assert made.items[2]["arguments"] == '{"a":1}'
    assert made.items[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert [e["item"] for e in events if e["type"].endswith("output_item.done")] == made.items


def test_an_answer_of_nothing_is_an_empty_message() -> None:
    made = Output()
    made.end(is_cut=True)
    (item,) = made.items
    assert (item["type"], item["status"], item["content"][0]["text"]) == (
        "message",
        "incomplete",
        "",
    )
