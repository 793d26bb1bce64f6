"""A replica whose engine dies: clients are told what died, and Serve puts another in its place."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.api_server import MODEL, write_two_stage_config
from support.server import Server, running_server

ANSWER_SECONDS = 30.0  # a refusal waits 2 s for a replica at most; the rest is for a busy machine
REPLACE_SECONDS = 120.0
REFUSALS = {"engine_dead", "no_engine"}  # from the replica, and from Serve while there is none


@pytest.fixture(scope="module")
def server(
    byte_model: Path, rank_logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mortal")
    deployment = {"health_check_period_s": 1}
    config = write_two_stage_config(folder, byte_model, rank_logs, deployment)
    with running_server(folder / "log", config) as server:
        yield server


def test_clients_hear_of_a_rank_that_dies_until_another_engine_answers(
    server: Server, rank_logs: Path
) -> None:
    url = f"{server.url}/v1"
    with (
        OpenAI(base_url=url, api_key="-", max_retries=0, timeout=ANSWER_SECONDS) as client,
        server.traced(rank_logs),
    ):
        [victim] = pids(rank_logs, rank=1)
        stream = client.completions.create(
            model=MODEL,
            prompt="hello",
            max_tokens=8000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert (caught.value.code, caught.value.type) == ("engine_dead", "server_error")
        assert "rank 1" in str(caught.value)

        first = refusal(client)
        assert first is not None
        assert first.code == "engine_dead"
        assert "rank 1" in first.message
        status, body = server.get("/health")
        assert (status, "rank 1" in body) == (503, True)

        deadline = time.monotonic() + REPLACE_SECONDS
        codes: list[str | None] = []
        while (error := refusal(client)) is not None:
            assert time.monotonic() < deadline, f"refused: {codes}"
            assert server.get("/health")[0] in (200, 503)
            codes.append(error.code)
            time.sleep(0.2)
        assert set(codes) <= REFUSALS
        assert codes[-1] == "no_engine", "the dead replica is gone before the next one starts"
    assert server.get("/health")[0] == 200
    assert len(pids(rank_logs, rank=1)) == 2


def refusal(client: OpenAI) -> openai.APIStatusError | None:
    """The answer to a short request if it is an error, which must be 503 in OpenAI's shape."""
    error = status_error(client)
    if error is not None:
        body: Any = error.body
        assert (error.status_code, set(body)) == (503, {"message", "type", "param", "code"})
        assert error.response.headers["content-type"] == "application/json"
        assert int(error.response.headers["retry-after"]) >= 1
    return error


def status_error(client: OpenAI) -> openai.APIStatusError | None:
    try:
        client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
    except openai.APIStatusError as error:
        return error
    return None


def pids(logs: Path, rank: int) -> list[int]:
    """The processes that were this rank, one after the other, as their log tells."""
    log = (logs / f"rank-{rank}.log").read_text()
    return [int(pid) for pid in re.findall(r"has started .*\bpid=(\d+)", log)]
