"""Files and batches over HTTP, in this process, with the official client.

The first test is the whole way of a batch: upload, create, poll, fetch.
"""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from support.api_server import MODEL
from support.batch_lines import chat_line, completion_line, jsonl, named
from support.batch_server import KEYS, batch_server, ended, records, submit
from support.byte_llama import CHAT_TEMPLATE, save_tiny_llama
from support.in_process import InProcessServer

from saqqara.cluster.batch_store.store import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder, chat_template=CHAT_TEMPLATE)
    return folder


async def test_a_batch_is_uploaded_run_and_fetched(model: Path, tmp_path: Path) -> None:
    async with batch_server(model, tmp_path) as server:
        client = server.client()
        lines = [chat_line(f"row-{i}", text=f"number {i}") for i in range(12)]
        batch = await submit(client, lines)
        assert (batch.status, batch.object) == ("validating", "batch")
        batch = await ended(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 12, "completed": 12, "failed": 0}
        assert batch.error_file_id is None
        found = await records(client, batch.output_file_id)
        assert list(found) == [f"row-{i}" for i in range(12)]
        alone = await client.chat.completions.create(**lines[7]["body"])
        answer = found["row-7"]["response"]
        assert answer["status_code"] == 200
        assert (
            answer["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
        )
        used = [record["response"]["body"]["usage"] for record in found.values()]
        assert batch.usage is not None
        assert batch.usage.output_tokens == sum(u["completion_tokens"] for u in used)
        assert batch.usage.total_tokens == sum(u["total_tokens"] for u in used)


async def test_a_bad_line_costs_that_line_and_goes_to_the_error_file(
    model: Path, tmp_path: Path
) -> None:
    async with batch_server(model, tmp_path) as server:
        client = server.client()
        bad = {
            "field": completion_line("field", temperature="hot"),
            "unknown": completion_line("unknown", nonsense=1),
            "model": completion_line("model", model="other"),
            "stream": completion_line("stream", stream=True),
            "conversation_id": completion_line("conversation_id", conversation_id="a"),
            "long": completion_line("long", "x" * 5000),
            "priority": completion_line("priority", priority="high"),
        }
        lines = [completion_line("first"), *bad.values(), completion_line("last", n=2)]
        batch = await ended(client, await submit(client, lines, "/v1/completions"))
        assert batch.status == "completed"
        assert batch.request_counts is not None
        counts = {"total": len(bad) + 2, "completed": 2, "failed": len(bad)}
        assert batch.request_counts.to_dict() == counts
        assert list(await records(client, batch.output_file_id)) == ["first", "last"]
        errors = await records(client, batch.error_file_id)
        assert list(errors) == list(bad)
        answers = {name: record["response"] for name, record in errors.items()}
        assert {name: a["status_code"] for name, a in answers.items()} == {
            **dict.fromkeys(bad, 400),
            "model": 404,
        }
        params = {name: a["body"]["error"]["param"] for name, a in answers.items()}
        named = {"field": "temperature", "unknown": "nonsense", "long": "prompt"}
        assert params == {name: named.get(name, name) for name in bad}


async def test_a_file_that_is_no_input_fails_with_the_numbers_of_its_lines(
    model: Path, tmp_path: Path
) -> None:
    async with batch_server(model, tmp_path) as server:
        client = server.client()
        content = jsonl([chat_line("a"), chat_line("a"), completion_line("b")]) + b"{\n"
        file = await client.files.create(file=named(content), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        batch = await ended(client, batch)
        assert batch.status == "failed"
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert [(e.line, e.code, e.param) for e in batch.errors.data] == [
            (2, "duplicate_custom_id", "custom_id"),
            (3, "invalid_value", "url"),
            (4, "invalid_json_line", None),
        ]


async def test_another_key_sees_neither_files_nor_batches(model: Path, tmp_path: Path) -> None:
    async with batch_server(model, tmp_path) as server:
        mine, yours = server.client(KEYS[0]), server.client(KEYS[1])
        batch = await ended(mine, await submit(mine, [chat_line("a")]))
        assert batch.output_file_id is not None
        for look in (
            yours.batches.retrieve(batch.id),
            yours.batches.cancel(batch.id),
            yours.files.retrieve(batch.input_file_id),
            yours.files.content(batch.output_file_id),
            yours.files.delete(batch.output_file_id),
            yours.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            ),
            yours.batches.list(after=batch.id),
            yours.files.list(after=batch.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                await look
        assert (await yours.files.list()).data == []
        assert (await yours.batches.list()).data == []
        assert [b.id for b in (await mine.batches.list()).data] == [batch.id]
        with pytest.raises(openai.AuthenticationError):
            await server.client("wrong").files.list()


async def test_a_server_without_a_folder_says_which_option_gives_one(model: Path) -> None:
    server = InProcessServer(model)
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=server.app), base_url="http://127.0.0.1/v1"
    ) as http:
        for path in ("/files", "/batches", "/files/x", "/batches/x", "/files/x/content"):
            answer = await http.get(path)
            assert answer.status_code == 404
            assert "--batch-dir" in answer.json()["error"]["message"]
    await server.generation.shutdown()


async def test_a_cancelled_batch_ends_soon_with_what_is_done(model: Path, tmp_path: Path) -> None:
    async with batch_server(model, tmp_path) as server:
        client = server.client()
        endless = [completion_line(str(i), max_tokens=60, ignore_eos=True) for i in range(200)]
        batch = await submit(client, endless, "/v1/completions")
        while batch.request_counts is None or batch.request_counts.completed == 0:
            batch = await client.batches.retrieve(batch.id)
        batch = await client.batches.cancel(batch.id)
        assert batch.status == "cancelling"
        batch = await ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.request_counts is not None
        assert 0 < batch.request_counts.completed < 200
        answers = await records(client, batch.output_file_id)
        errors = await records(client, batch.error_file_id)
        assert len(answers) == batch.request_counts.completed
        assert len(answers) + len(errors) == 200
        assert {e["error"]["code"] for e in errors.values()} == {"batch_cancelled"}
        assert server.server.generation.admission.num_requests == 0


async def test_a_server_that_ends_hands_its_batches_on(model: Path, tmp_path: Path) -> None:
    lines = [completion_line(str(i), max_tokens=20, ignore_eos=True) for i in range(30)]
    async with batch_server(model, tmp_path) as server:
        client = server.client()
        batch = await submit(client, lines, "/v1/completions")
        while batch.request_counts is None or batch.request_counts.completed == 0:
            batch = await client.batches.retrieve(batch.id)
    store = Store(tmp_path)
    assert store.progress.losses(batch.id) == {}
    done = len(store.progress.done_lines(batch.id))
    assert 0 < done < 30
    store.close()
    async with batch_server(model, tmp_path) as server:
        client = server.client()
        batch = await ended(client, batch)
        assert batch.status == "completed"
        answers = await records(client, batch.output_file_id)
        assert list(answers) == [str(i) for i in range(30)]


async def test_a_line_may_ask_for_all_that_a_request_may(model: Path, tmp_path: Path) -> None:
    """Bodies take the way of requests over HTTP, so what those can, lines can."""
    async with batch_server(model, tmp_path) as server:
        client = server.client()
        choice: Any = {"structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 8}
        lines = [
            chat_line("choice", temperature=1, **choice),
            chat_line("ids", return_token_ids=True, logprobs=True, top_logprobs=2),
            chat_line("kept", retention={"method": "snapkv", "budget": 64}),
            chat_line("two", n=2, seed=7, temperature=1),
            chat_line("wrong", structured_outputs={"regex": "("}),
        ]
        batch = await ended(client, await submit(client, lines))
        answers = await records(client, batch.output_file_id)
        assert list(answers) == ["choice", "ids", "kept", "two"]
        choices = {name: r["response"]["body"]["choices"] for name, r in answers.items()}
        assert choices["choice"][0]["message"]["content"] in ("yes", "no")
        assert len(choices["ids"][0]["token_ids"]) == len(choices["ids"][0]["logprobs"]["content"])
        assert len(choices["two"]) == 2
        [error] = (await records(client, batch.error_file_id)).values()
        assert error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["param"].startswith("structured_outputs")


async def test_a_batch_leaves_a_slot_to_others(model: Path, tmp_path: Path) -> None:
    async with batch_server(model, tmp_path) as server:
        client, other = server.client(KEYS[0]), server.client(KEYS[1])
        endless = [completion_line(str(i), max_tokens=400, ignore_eos=True) for i in range(40)]
        batch = await submit(client, endless, "/v1/completions")
        admission = server.server.generation.admission
        while admission.num_requests < 3:
            await asyncio.sleep(0.01)
        most = 0
        for _ in range(10):
            answer = await other.completions.create(model=MODEL, prompt="hello", max_tokens=2)
            assert answer.usage is not None
            most = max(most, admission.num_requests)
        assert most <= 3
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        await ended(client, batch)
