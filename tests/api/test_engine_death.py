"""A rank dies under open streams: they wait, and go on as if nothing had been."""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from openai import OpenAI
from support.api_server import MODEL, write_two_stage_config
from support.server import Server, running_server

RECOVERY_SECONDS = 120.0  # on a busy machine
PROMPTS = [f"hello {i}" for i in range(8)]
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def server(
    byte_model: Path, rank_logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mortal")
    deployment = {"health_check_period_s": 1}
    config = write_two_stage_config(folder, byte_model, rank_logs, deployment)
    with running_server(folder / "log", config) as server:
        yield server


def test_streams_survive_a_rank(server: Server, rank_logs: Path) -> None:
    with (
        OpenAI(
            base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=RECOVERY_SECONDS
        ) as client,
        server.traced(rank_logs),
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        expected = list(pool.map(lambda prompt: "".join(stream(client, prompt)), PROMPTS))
        begun = [Event() for _ in PROMPTS]
        streams = [
            pool.submit(lambda p, e: "".join(stream(client, p, e)), prompt, event)
            for prompt, event in zip(PROMPTS, begun, strict=True)
        ]
        for event in begun:
            assert event.wait(RECOVERY_SECONDS)
        [victim] = pids(rank_logs, rank=1)
        os.kill(victim, signal.SIGKILL)
        wait_for_health(server, 503)
        status, body = server.get("/live")
        assert status == 200, body
        wait_for_health(server, 200)
        assert [future.result(RECOVERY_SECONDS) for future in streams] == expected
    assert len(pids(rank_logs, rank=1)) == 2
    text = server.get("/metrics")[1]
    [recovered] = re.findall(r'^saqqara:recoveries_total{cause="died",[^}]*} (\S+)', text, re.M)
    assert float(recovered) == 1


def stream(client: OpenAI, prompt: str, begun: Event | None = None) -> Iterator[str]:
    """The pieces of a text that is sampled, always the same."""
    for piece in client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        seed=7,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        if begun is not None:
            begun.set()
        yield piece.choices[0].text


def wait_for_health(server: Server, status: int) -> None:
    deadline = time.monotonic() + RECOVERY_SECONDS
    while server.get("/health")[0] != status:
        assert time.monotonic() < deadline, f"/health is never {status}"
        time.sleep(0.02)


def pids(logs: Path, rank: int) -> list[int]:
    """The processes that were this rank, one after the other, as their log tells."""
    log = (logs / f"rank-{rank}.log").read_text()
    return [int(pid) for pid in re.findall(r"has started .*\bpid=(\d+)", log)]
