"""An engine's metrics port has `/stats`, too, and no web page of a foreign name can read it."""

import http.client
import json
from collections.abc import Iterator

import pytest
from support.live_stats import live_stats

from saqqara.cluster.engine.metrics import PrometheusSink


@pytest.fixture
def port() -> Iterator[int]:
    sink = PrometheusSink("tiny")
    yield sink.start_http_server(read_stats=live_stats)
    sink.close()


def ask(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_stats_beside_the_metrics(port: int) -> None:
    status, body = ask(port, "/stats")
    assert (status, json.loads(body)) == (200, live_stats().model_dump(mode="json"))
    for path in ("/metrics", "/", "/stats/"):
        status, body = ask(port, path)
        assert status == 200
        assert b"vllm:num_requests_running" in body


@pytest.mark.parametrize(
    ("host", "is_let_in"),
    [
        ("127.0.0.1:8001", True),
        ("[::1]:8001", True),
        ("10.0.0.7", True),
        ("localhost", True),
        ("LOCALHOST:8001", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_the_name_that_was_asked_for(port: int, host: str, is_let_in: bool) -> None:
    status, body = ask(port, "/stats", host=host)
    assert status == (200 if is_let_in else 403)
    assert (b"model" in body) == is_let_in
    assert ask(port, "/metrics", host=host)[0] == status


def test_only_reading(port: int) -> None:
    assert ask(port, "/stats", "POST")[0] == 405
    assert ask(port, "/stats", "HEAD")[0] == 200
