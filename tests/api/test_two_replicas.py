"""A server from a Serve config file: two replicas of two stages each, which finish what runs."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.api_server import KEY, MODEL, write_two_stage_config
from support.server import Server, running_server

NUM_TOKENS = 600
ANSWER_SECONDS = 60.0
SHARE_SECONDS = 60.0
REFUSE_SECONDS = 30.0  # for the signal to reach the replicas


@pytest.fixture(scope="module")
def replicas(
    byte_model: Path, rank_logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "keys").write_text(f"# ours\n{KEY}\n")
    config = write_two_stage_config(
        folder, byte_model, rank_logs, {"num_replicas": 2}, api_key_file=str(folder / "keys")
    )
    with running_server(folder / "log", config) as server:
        yield server


def test_two_replicas_share_the_work_and_finish_it_when_asked_to_end(
    replicas: Server, rank_logs: Path
) -> None:
    url = f"{replicas.url}/v1"
    with (
        OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=ANSWER_SECONDS) as client,
        replicas.traced(rank_logs),
    ):
        both_replicas_answer_alike(replicas, client)
        what_runs_is_finished_and_nothing_more_is_taken(replicas, client)


def both_replicas_answer_alike(server: Server, client: OpenAI) -> None:
    def text(number: int) -> str:
        answer: Any = client.completions.create(
            model=MODEL, prompt="hello", max_tokens=20, temperature=0, **ignoring_eos()
        )
        return str(answer.choices[0].text)

    # Serve's proxy hears of the second replica a moment after the first, and answers meanwhile.
    texts: set[str] = set()
    num_tokens = 0
    counts: set[float] = set()
    deadline = time.monotonic() + SHARE_SECONDS
    while not is_shared(counts, num_tokens) and time.monotonic() < deadline:
        with ThreadPoolExecutor(8) as threads:
            texts.update(threads.map(text, range(16)))
        num_tokens += 16 * 20
        counts = tokens_of_replicas(server, num_tokens)
    assert len(texts) == 1
    assert is_shared(counts, num_tokens), counts
    while "serving " not in server.log.read_text(errors="replace"):  # until then it ends at once
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_shared(counts: set[float], num_tokens: int) -> bool:
    """Whether two replicas have generated all of the tokens, each some; as many each are one."""
    if counts == {num_tokens / 2}:
        return True
    return len(counts) == 2 and 0 not in counts and sum(counts) == num_tokens


def tokens_of_replicas(server: Server, num_tokens: int) -> set[float]:
    """What each replica has generated, all together `num_tokens`; a scrape reaches either."""
    deadline = time.monotonic() + 20
    while True:
        counts = {server.metric("vllm:generation_tokens_total") for _ in range(8)}
        if sum(counts) == num_tokens or counts == {num_tokens / 2} or time.monotonic() > deadline:
            return counts


def what_runs_is_finished_and_nothing_more_is_taken(server: Server, client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="hello",
        max_tokens=NUM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        **ignoring_eos(),
    )
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    error = first_refusal(client)
    assert (error.status_code, error.code) == (503, "shutting_down")
    assert int(error.response.headers["retry-after"]) >= 1
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS
    assert chunks[-2].choices[0].finish_reason == "length"
    assert server.process.wait(60) == 0


def first_refusal(client: OpenAI) -> openai.APIStatusError:
    """The first answer that is an error."""
    deadline = time.monotonic() + REFUSE_SECONDS
    while time.monotonic() < deadline:
        try:
            client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
        except openai.APIStatusError as error:
            return error
    raise AssertionError("the server still takes requests")


def ignoring_eos() -> dict[str, Any]:
    return {"extra_body": {"ignore_eos": True}}
