"""`saqqara top` asks where it was told, shows its key to nobody else, and says what is wrong."""

import socket
import threading
from collections.abc import Mapping

import pytest
from support.http_answers import answering
from support.live_stats import live_stats
from support.server import free_port

from saqqara.cluster.top.source import (
    Address,
    NoAnswerError,
    Source,
    WrongAnswerError,
    WrongKeyError,
    key_of,
)

GOOD = live_stats().model_dump_json().encode()
ODD = (b"NaN", b"1e999", b"-1.0", b"1" + b"0" * 400)  # any of these ended the screen


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://host:1/", "http://host:1"),
        ("http://host:1/v1", "http://host:1"),
        ("http://host/prefix/v1/", "http://host/prefix"),
        ("http://host:8001/metrics", "http://host:8001"),
        ("https://host/stats", "https://host"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("127.0.0.1:9", "http://127.0.0.1:9"),
    ],
)
def test_addresses_as_people_write_them(given: str, expected: str) -> None:
    assert str(Address.parse(given)) == expected


@pytest.mark.parametrize(
    "given",
    ["", "http://", "ftp://host", "host:x", "host:99999", "http://[::1", "host?a=b", "u:p@host"],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Address.parse(given)


def test_where_the_key_comes_from() -> None:
    assert key_of({}) is None
    assert key_of({"SAQQARA_API_KEY": "a", "SAQQARA_API_KEYS": "b,c"}) == "a"
    assert key_of({"SAQQARA_API_KEYS": " b ,c"}) == "b"


def test_a_snapshot_is_read_with_the_key() -> None:
    asked: list[tuple[str, str | None]] = []

    def answer(path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        asked.append((path, headers.get("Authorization")))
        return 200, {}, GOOD

    with answering(answer) as port:
        address = Address.parse(f"127.0.0.1:{port}/prefix")
        assert Source(address, "secret").read() == live_stats()
        assert Source(address, None).read() == live_stats()
    assert asked == [("/prefix/stats", "Bearer secret"), ("/prefix/stats", None)]


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (401, b"", WrongKeyError, "key is wrong; set SAQQARA_API_KEY"),
        (403, b"", WrongKeyError, "does not let in"),
        (404, b"", WrongAnswerError, "answers 404; is it a Saqqara?"),
        (302, b"", WrongAnswerError, "answers 302"),
        (503, b"", NoAnswerError, "answers 503"),
        (200, b"<html>", WrongAnswerError, "not what this version reads"),
        (200, b"{}", WrongAnswerError, "not what this version reads"),
        *((200, GOOD.replace(b"200.0", wrong), WrongAnswerError, "not what this") for wrong in ODD),
    ],
)
def test_other_answers(status: int, body: bytes, error: type[Exception], message: str) -> None:
    asked: list[str] = []

    def answer(path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        asked.append(path)
        return status, {"Location": "/elsewhere"}, body

    with (
        answering(answer) as port,
        pytest.raises(error, match=message.replace("?", "[?]")) as caught,
    ):
        Source(Address.parse(f"127.0.0.1:{port}"), "secret").read()
    assert "secret" not in str(caught.value)
    assert asked == ["/stats"], "redirects are not followed"


def test_a_newer_server_may_say_more() -> None:
    more = GOOD.replace(b'{"model"', b'{"news":[1],"model"', 1)
    with answering(lambda path, headers: (200, {}, more)) as port:
        assert Source(Address.parse(f"127.0.0.1:{port}"), None).read() == live_stats()


def test_what_is_no_http_is_told_without_codes_for_the_terminal() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_say_nonsense, args=(listener,))
        thread.start()
        with pytest.raises(NoAnswerError, match="does not answer: BadStatusLine") as caught:
            Source(Address.parse(f"127.0.0.1:{listener.getsockname()[1]}"), None).read()
        thread.join()
    assert str(caught.value).isprintable()


def _say_nonsense(listener: socket.socket) -> None:
    connection = listener.accept()[0]
    with connection:
        connection.recv(1000)
        connection.sendall(b"\x1b]0;mine\x07\x1b[2J\r\n\r\n")


def test_nobody_answers() -> None:
    with pytest.raises(NoAnswerError, match="connection refused"):
        Source(Address.parse(f"127.0.0.1:{free_port()}"), None).read()
