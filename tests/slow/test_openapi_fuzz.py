"""Schemathesis against a server: 5,000 requests, none answered otherwise than described."""

import copy
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from support.api_fuzz import Fuzzer
from support.api_server import ENGINE, KEY, MODEL
from support.byte_llama import save_tiny_llama
from support.local_server import engine_app, listening
from support.server import fetch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Json = dict[str, Any]
CONTEXT = 192
NUM_REQUESTS = 5000
LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": MODEL, "prompt": "x", "max_tokens": 2},
}
# Of each operation with a body; the others have few requests that differ.
COUNTS = {"positive": 200, "negative": 140, "example": 200}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with all paths."""
    folder = tmp_path_factory.mktemp("fuzzed") / MODEL
    folder.mkdir()
    small: Json = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_tiny_llama(folder, max_position=CONTEXT, num_key_value_heads=1, **small)
    app = engine_app(
        folder,
        [KEY],
        engine_kwargs=ENGINE,
        batch_dir=str(tmp_path_factory.mktemp("batches")),
        enable_tokenizer_info_endpoint=True,
    )
    with listening(app) as address:
        yield address


@pytest.fixture(scope="module")
def document(url: str) -> Json:
    """What the server says of itself."""
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        found: Json = json.load(answer)
    return found


def test_no_answer_is_otherwise_than_described(url: str, document: Json, capsys: Any) -> None:
    fuzzer = Fuzzer(url, KEY, document, MODEL)
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        lines = [json.dumps({**LINE, "custom_id": str(i)}) for i in range(200)]
        content = "\n".join(lines).encode()  # not done before it is cancelled
        file = client.files.create(file=("lines.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        other = client.files.create(file=("more.jsonl", content), purpose="batch")
    fuzzer.ids = {"model": MODEL, "batch_id": batch.id, "file_id": file.id}
    for label in fuzzer.labels():
        if label.startswith("DELETE"):
            fuzzer.ids["file_id"] = other.id
        if "conversation_id" in label:
            fuzzer.ids["conversation_id"] = converse(url)
        for mode, count in COUNTS.items():
            if mode != "example" or fuzzer.has_example(label):
                fuzzer.run(label, mode, count)
    with capsys.disabled():
        print(f"\n{fuzzer.tally.num_requests} requests")
        for label, counts in fuzzer.tally.statuses.items():
            print(f"{label}: {dict(sorted(counts.items()))}")
    nothing_stored = {f"{method} /v1/responses/{{response_id}}" for method in ("GET", "DELETE")}
    assert {*fuzzer.tally.never()} == nothing_stored, "each other succeeds at least once"
    assert fuzzer.tally.num_requests >= NUM_REQUESTS


def converse(url: str) -> str:
    """The name of a conversation of which something is kept."""
    name = "talk"
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2, "conversation_id": name}
    answer = fetch(f"{url}/v1/completions", "POST", {"Authorization": f"Bearer {KEY}"}, body)
    assert answer.status == 200, answer
    return name


def planted_type(document: Json) -> str:
    """The count of tokens is said to be a text."""
    document["components"]["schemas"]["Tokens"]["properties"]["count"] = {"type": "string"}
    return "POST /tokenize"


def planted_status(document: Json) -> str:
    """A wrong field is said not to happen."""
    del document["paths"]["/v1/completions"]["post"]["responses"]["400"]
    return "POST /v1/completions"


def planted_event(document: Json) -> str:
    """Events of a stream are said to have another object."""
    chunk = document["components"]["schemas"]["ChatCompletionChunk"]["properties"]
    chunk["object"] = {"const": "chat.chunk"}
    return "POST /v1/chat/completions"


@pytest.mark.parametrize("plant", [planted_type, planted_status, planted_event])
def test_a_false_statement_is_found(url: str, document: Json, plant: Any) -> None:
    false = copy.deepcopy(document)
    label = plant(false)
    fuzzer = Fuzzer(url, KEY, false, MODEL)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        fuzzer.run(label, "example", 100)
    true = Fuzzer(url, KEY, document, MODEL)
    true.run(label, "example", 20)
