"""The Responses API in this process, spoken to by the official client."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from support.api_server import MODEL
from support.byte_llama import save_tiny_llama
from support.in_process import InProcessServer

from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.openai.responses.events import response_stream
from saqqara.cluster.openai.responses.output import Output
from saqqara.cluster.openai.responses.reply import ResponseHead
from saqqara.cluster.openai.responses.request import LOGPROBS, ResponseRequest
from saqqara.cluster.request import CompletionOutput, RequestMetrics, RequestOutput
from saqqara.cluster.sampling import SamplingParams

T = TypeVar("T")
Json = dict[str, Any]
CONTEXT = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("responses-llama")
    save_tiny_llama(folder, max_position=CONTEXT)
    return folder


def speak(model: Path, talk: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
    """What a conversation with a server of its own gives."""

    async def run() -> T:
        server = InProcessServer(model)
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
        answer = await ask(
            model=MODEL, input=items, max_output_tokens=4, truncation="auto", instructions="Go."
        )
        line = len("user: \n") + 20
        around = len("system: Go.\nassistant: ")
        assert answer.usage is not None
        assert answer.usage.input_tokens == around + (CONTEXT - 4 - around) // line * line
        too_long = [*items, {"role": "user", "content": CONTEXT * "x"}]
        with pytest.raises(BadRequestError, match="input has"):
            await ask(model=MODEL, input=too_long, truncation="auto")

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


def head() -> ResponseHead:
    request = ResponseRequest(model=MODEL, input="hi")
    return ResponseHead("resp_1", 1, MODEL, request, SamplingParams())


def output(text: str) -> RequestOutput:
    choice = CompletionOutput(0, text, (1,))
    return RequestOutput("r", None, (1, 2), (choice,), False, RequestMetrics(0.0))


async def test_an_engine_that_dies_on_the_way_is_told_in_events() -> None:
    async def outputs() -> Any:
        yield 0, output("so f")
        raise EngineDeadError("the engine has ended")

    sent = b"".join([piece async for piece in response_stream(head(), outputs())]).decode()
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
        await anext(response_stream(head(), outputs()))


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
