"""How many of a prompt's tokens were cached is in every usage: whole, streamed, in batch lines."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support.api_server import ENGINE, MODEL
from support.batch_lines import completion_line, jsonl
from support.byte_llama import save_tiny_llama
from support.in_process import InProcessServer

from saqqara import LLM, SamplingParams
from saqqara.cluster.batch.job import BatchJob, run_batch

TEXT = "w" * 60
LONG = {"max_tokens": 2, "temperature": 0, "model": MODEL}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / MODEL
    save_tiny_llama(folder, max_position=512)
    return folder


def test_every_reply_tells_what_was_cached(model: Path) -> None:
    async def talk() -> tuple[list[Any], Any]:
        server = InProcessServer(model, page_tokens=16)

        async def ask(path: str, **body: Any) -> Any:
            status, reply = await server.post(path, body)
            assert status == 200, reply
            return reply

        found = []
        for _ in range(3):
            reply = await ask("/v1/completions", prompt=TEXT, **LONG)
            found.append(reply["usage"]["prompt_tokens_details"])
        chat = {"messages": [{"role": "user", "content": TEXT}], **LONG}
        for _ in range(3):
            reply = await ask("/v1/chat/completions", **chat)
        found.append(reply["usage"]["prompt_tokens_details"])
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = await ask("/v1/chat/completions", **chat, **options)
        found.append(events[-1]["usage"]["prompt_tokens_details"])
        asked = {"model": MODEL, "input": TEXT, "max_output_tokens": 2}
        found.append((await ask("/v1/responses", **asked))["usage"]["input_tokens_details"])
        report = await server.generation.engine.report()
        await server.generation.shutdown()
        return found, report

    found, report = asyncio.run(talk())
    assert found[:3] == [{"cached_tokens": n} for n in (0, 0, 48)]
    assert found[3]["cached_tokens"] >= 48
    assert found[4] == found[3]
    assert found[5]["cached_tokens"] >= 48
    assert report.prefix_hit_tokens >= 4 * 48
    assert report.prefix_query_tokens > report.prefix_hit_tokens
    assert report.prefix_bytes > 0


def test_batch_lines_and_python_tell_it_too(model: Path, tmp_path: Path) -> None:
    with LLM(str(model), page_tokens=16, **ENGINE) as llm:
        params = SamplingParams(max_tokens=2, temperature=0)
        counts = [llm.generate([TEXT], params)[0].num_cached_tokens for _ in range(3)]
        assert counts == [0, 0, 48]
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(jsonl([completion_line("a", TEXT)]))
        assert run_batch(BatchJob(source, output, llm.config, params), llm._client).complete
        usage = json.loads(output.read_text())["response"]["body"]["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 48}
        assert llm.reset_prefix_cache(), "nobody uses any"
        assert llm.report().prefix_bytes == 0
        assert llm.generate([TEXT], params)[0].num_cached_tokens == 0
