"""Files and batches of the real server with the official client.

The first test is the whole way: upload, create, poll, fetch.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch, FileObject
from support.api_server import KEY, MAX_BODY_BYTES, MODEL, OTHER_KEY
from support.batch_lines import ENDED, completion_line, jsonl, named
from support.server import Server

WAIT_SECONDS = 120.0
COMPLETIONS: Any = "/v1/completions"


@pytest.fixture(scope="module")
def other(server: Server) -> Iterator[OpenAI]:
    """The client of another key."""
    url = f"{server.url}/v1"
    with OpenAI(base_url=url, api_key=OTHER_KEY, max_retries=0, timeout=60) as client:
        yield client


def upload(client: OpenAI, content: bytes, name: str = "in.jsonl", **more: Any) -> FileObject:
    return client.files.create(file=named(content, name), purpose="batch", **more)


def submit(client: OpenAI, lines: list[Any], endpoint: Any = COMPLETIONS, **more: Any) -> Batch:
    file = upload(client, jsonl(lines))
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more
    )


def ended(client: OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + WAIT_SECONDS
    while batch.status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def records(client: OpenAI, file_id: str | None) -> Mapping[str, Any]:
    """Records by their custom ids, each of which is there once."""
    assert file_id is not None
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found)
    return by_id


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return (
        batch.request_counts.total,
        batch.request_counts.completed,
        batch.request_counts.failed,
    )


@pytest.fixture(scope="module")
def done(client: OpenAI) -> Batch:
    """A batch that has ended, of good lines and a bad one."""
    lines = [completion_line(f"row-{i}", f"number {i}") for i in range(5)]
    lines.insert(2, completion_line("bad", temperature=-1))
    return ended(client, submit(client, lines, metadata={"project": "pyramids"}))


def test_a_batch_is_uploaded_run_and_fetched(client: OpenAI, done: Batch) -> None:
    assert done.status == "completed"
    assert counts(done) == (6, 5, 1)
    found = records(client, done.output_file_id)
    assert list(found) == [f"row-{i}" for i in range(5)]
    alone = client.completions.create(**completion_line("", "number 3")["body"])
    response = found["row-3"]["response"]
    assert response["status_code"] == 200
    assert response["body"]["choices"][0]["text"] == alone.choices[0].text
    assert found["row-3"]["error"] is None


def test_the_error_file_says_what_is_wrong_with_a_line(client: OpenAI, done: Batch) -> None:
    [error] = records(client, done.error_file_id).values()
    assert error["custom_id"] == "bad"
    assert error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["param"] == "temperature"


def test_a_batch_tells_its_times_usage_and_metadata(client: OpenAI, done: Batch) -> None:
    assert done.metadata == {"project": "pyramids"}
    assert done.in_progress_at is not None
    assert done.finalizing_at is not None
    assert done.completed_at is not None
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.expires_at == done.created_at + 24 * 3600
    assert done.usage is not None
    used = [r["response"]["body"]["usage"] for r in records(client, done.output_file_id).values()]
    assert done.usage.input_tokens == sum(u["prompt_tokens"] for u in used)
    assert done.usage.output_tokens == sum(u["completion_tokens"] for u in used) > 0


def test_outputs_are_files_of_the_owner(client: OpenAI, done: Batch) -> None:
    assert done.output_file_id is not None
    file = client.files.retrieve(done.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{done.id}_output.jsonl")
    listed = [f.id for f in client.files.list(purpose="batch_output")]
    assert {done.output_file_id, done.error_file_id} <= set(listed)
    assert done.input_file_id not in listed


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/responses"])
def test_other_endpoints_are_run_as_over_http(client: OpenAI, endpoint: Any) -> None:
    body: dict[str, Any] = {"model": MODEL, "temperature": 0}
    if endpoint == "/v1/responses":
        body |= {"input": "hello", "max_output_tokens": 16}
        bound, used = "max_output_tokens", ("input_tokens", "output_tokens")
    else:
        body |= {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        bound, used = "max_tokens", ("prompt_tokens", "completion_tokens")
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    wrong = {**line, "custom_id": "b", "body": {**body, bound: 0}}
    batch = ended(client, submit(client, [line, wrong], endpoint))
    over_http = client.post(endpoint.removeprefix("/v1"), body=body, cast_to=object)
    assert isinstance(over_http, dict)
    assert counts(batch) == (2, 1, 1)
    error = records(client, batch.error_file_id)["b"]["response"]["body"]["error"]
    assert error["param"] == bound
    answer = records(client, batch.output_file_id)["a"]["response"]["body"]
    assert batch.usage is not None
    told = (batch.usage.input_tokens, batch.usage.output_tokens)
    assert told == tuple(answer["usage"][name] for name in used)
    assert answer["object"] == over_http["object"]
    key = "output" if endpoint == "/v1/responses" else "choices"
    assert without_ids(answer[key]) == without_ids(over_http[key])


def without_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k != "id"}
    return value


def test_a_file_that_is_no_input_fails_and_names_its_lines(client: OpenAI) -> None:
    lines = [completion_line("a"), completion_line("a"), {"custom_id": "b"}]
    batch = ended(client, submit(client, lines))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(e.line, e.param) for e in batch.errors.data] == [(2, "custom_id"), (3, "method")]
    assert batch.output_file_id is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "48h"}, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"nonsense": 1}, "nonsense"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    client: OpenAI, done: Batch, fields: Any, param: str
) -> None:
    body = {
        "input_file_id": done.input_file_id,
        "endpoint": COMPLETIONS,
        "completion_window": "24h",
        **fields,
    }
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/batches", body=body, cast_to=object)
    assert caught.value.status_code == (404 if fields == {"input_file_id": "file-none"} else 400)
    assert caught.value.param == param


def test_an_output_is_no_input(client: OpenAI, done: Batch) -> None:
    assert done.output_file_id is not None
    with pytest.raises(openai.BadRequestError, match="purpose='batch'"):
        client.batches.create(
            input_file_id=done.output_file_id, endpoint=COMPLETIONS, completion_window="24h"
        )


def test_a_batch_is_cancelled_while_others_are_answered(client: OpenAI) -> None:
    endless = [completion_line(str(i), max_tokens=7000, ignore_eos=True) for i in range(50)]
    batch = submit(client, endless)
    while batch.status != "in_progress":
        batch = client.batches.retrieve(batch.id)
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match=f"the input of {batch.id}"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None
    total, completed, failed = counts(batch)
    assert total == completed + failed == 50
    errors = records(client, batch.error_file_id)
    assert {e["error"]["code"] for e in errors.values()} == {"batch_cancelled"}
    client.files.delete(batch.input_file_id)


def test_an_ended_batch_cannot_be_cancelled(client: OpenAI, done: Batch) -> None:
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.batches.cancel(done.id)


def test_batches_are_listed_page_by_page_newest_first(client: OpenAI, done: Batch) -> None:
    more = [ended(client, submit(client, [completion_line("a")])).id for _ in range(2)]
    listed = [batch.id for batch in client.batches.list(limit=1)]
    assert listed[: len(more)] == more[::-1]
    assert done.id in listed
    assert len(set(listed)) == len(listed)
    page = client.batches.list(limit=1, after=more[1])
    assert [b.id for b in page.data] == [more[0]]
    assert page.has_more


def test_another_key_sees_nothing(client: OpenAI, other: OpenAI, done: Batch) -> None:
    assert done.output_file_id is not None
    for look in (
        lambda: other.batches.retrieve(done.id),
        lambda: other.batches.cancel(done.id),
        lambda: other.files.retrieve(done.input_file_id),
        lambda: other.files.content(done.output_file_id or ""),
        lambda: other.files.delete(done.input_file_id),
        lambda: other.batches.create(
            input_file_id=done.input_file_id, endpoint=COMPLETIONS, completion_window="24h"
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            look()
    assert list(other.batches.list()) == []
    assert list(other.files.list()) == []


def test_a_file_is_looked_at_read_and_deleted(client: OpenAI) -> None:
    file = upload(client, b"one\ntwo\n", "rows.jsonl")
    assert (file.object, file.bytes, file.filename) == ("file", 8, "rows.jsonl")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == b"one\ntwo\n"
    assert client.files.delete(file.id).deleted
    for look in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            look(file.id)


@pytest.mark.parametrize(
    ("wanted", "status", "content"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=4-100", 206, b"456789"),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_a_part_of_a_file_is_read(client: OpenAI, wanted: str, status: int, content: bytes) -> None:
    file = upload(client, b"0123456789")
    answer = client.files.with_raw_response.content(file.id, extra_headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (status, content)


def test_bytes_that_are_not_there_are_refused(client: OpenAI) -> None:
    file = upload(client, b"0123456789")
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.content(file.id, extra_headers={"Range": "bytes=10-"})
    assert caught.value.status_code == 416
    assert caught.value.response.headers["content-range"] == "bytes */10"


def test_a_file_may_be_larger_than_a_body(client: OpenAI) -> None:
    content = b"x" * (20 * MAX_BODY_BYTES)
    file = upload(client, content)
    assert file.bytes == len(content)
    assert client.files.content(file.id).read() == content
    client.files.delete(file.id)


@pytest.mark.parametrize("name", ["../../etc/passwd", "名前.jsonl", "a\\b;c=d", "x" * 512])
def test_a_name_is_kept_as_it_is(client: OpenAI, name: str) -> None:
    assert client.files.retrieve(upload(client, b"x", name).id).filename == name


def test_a_file_may_say_how_long_it_is_kept(client: OpenAI) -> None:
    file = upload(client, b"x", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    for seconds in (0, 3599, 10**10):
        with pytest.raises(openai.BadRequestError) as caught:
            upload(client, b"x", expires_after={"anchor": "created_at", "seconds": seconds})
        assert caught.value.param == "expires_after[seconds]"


@pytest.mark.parametrize("purpose", ["fine-tune", "assistants", "", "x" * 2000])
def test_a_purpose_that_there_is_not_is_refused(client: OpenAI, purpose: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=named(b"x"), purpose=purpose)
    assert caught.value.param == "purpose"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"limit": 10**30}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "file-none"}, "after"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_list_that_cannot_be_is_refused(client: OpenAI, query: Any, param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.list(extra_query=query)
    assert caught.value.status_code == (404 if param == "after" else 400)
    assert caught.value.param == param


def test_files_are_listed_in_both_orders(client: OpenAI) -> None:
    ids = [upload(client, b"x").id for _ in range(3)]
    newest = [file.id for file in client.files.list(limit=2, order="desc")]
    assert newest[:3] == ids[::-1]
    oldest = [file.id for file in client.files.list(limit=100, order="asc")]
    assert oldest == newest[::-1]


def test_without_a_key_there_is_nothing(server: Server) -> None:
    url = f"{server.url}/v1"
    with OpenAI(base_url=url, api_key=KEY + "x", max_retries=0) as stranger:
        for ask in (stranger.files.list, stranger.batches.list):
            with pytest.raises(openai.AuthenticationError):
                ask()
        with pytest.raises(openai.AuthenticationError):
            upload(stranger, b"x")
