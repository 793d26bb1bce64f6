"""What makes a file no input of a batch, by its lines; what stands in the bodies costs a line only.

The first test is a file with nothing wrong.
"""

import io
import json
from typing import Any

import pytest
from support.batch_lines import completion_line, jsonl

from saqqara.cluster.batch_store.inputs import MAX_ERRORS, check_input, read_input
from saqqara.cluster.batch_store.records import LineError
from saqqara.configs.schema import BatchLimits

URL = "/v1/completions"


def check(content: bytes, **limits: Any) -> tuple[int, tuple[LineError, ...]]:
    return check_input(io.BytesIO(content), URL, BatchLimits(**limits))


def test_lines_are_counted_and_read_with_their_numbers() -> None:
    lines = [completion_line("a"), completion_line("b", stream=True, nonsense=1)]
    content = b"\xef\xbb\xbf" + jsonl(lines[:1]) + b"\n  \r\n" + jsonl(lines[1:]).rstrip()
    assert check(content) == (2, ())
    read = list(read_input(io.BytesIO(content), BatchLimits()))
    assert [(line.number, line.custom_id) for line in read] == [(1, "a"), (4, "b")]
    assert [line.body for line in read] == [line["body"] for line in lines]


def wrapped(**fields: Any) -> bytes:
    line = {**completion_line("b"), **fields}
    return json.dumps({k: v for k, v in line.items() if v is not None}).encode()


BAD_LINES: list[tuple[bytes, str, str | None]] = [
    (b"{", "invalid_json_line", None),
    (b"[1]", "invalid_json_line", None),
    (b"\xff\xfe", "invalid_json_line", None),
    (b'{"custom_id": "\\ud800"}', "invalid_json_line", None),
    (b'{"custom_id": "b", "custom_id": "b"}', "invalid_json_line", "custom_id"),
    (b"[" * 100_000, "invalid_json_line", None),
    (wrapped(custom_id=None), "invalid_value", "custom_id"),
    (wrapped(custom_id=7), "invalid_value", "custom_id"),
    (wrapped(custom_id=""), "invalid_value", "custom_id"),
    (wrapped(custom_id="x" * 513), "invalid_value", "custom_id"),
    (wrapped(custom_id="a"), "duplicate_custom_id", "custom_id"),
    (wrapped(method="GET"), "invalid_value", "method"),
    (wrapped(url="/v1/chat/completions"), "invalid_value", "url"),
    (wrapped(url=["/v1/completions"]), "invalid_value", "url"),
    (wrapped(url="https://example.com/v1/completions"), "invalid_value", "url"),
    (wrapped(body=None), "invalid_value", "body"),
    (wrapped(body=[]), "invalid_value", "body"),
    (wrapped(more=1), "unknown_parameter", "more"),
]


@pytest.mark.parametrize(("line", "code", "param"), BAD_LINES)
def test_a_line_that_is_no_request_of_the_endpoint_is_named(
    line: bytes, code: str, param: str | None
) -> None:
    content = jsonl([completion_line("a")]) + line + b"\n" + jsonl([completion_line("c")])
    num_lines, errors = check(content)
    assert num_lines == 3
    assert [(e.code, e.line, e.param) for e in errors] == [(code, 2, param)]
    assert len(errors[0].message) < 500


def test_a_line_longer_than_may_be_is_named_and_the_others_are_read() -> None:
    content = jsonl([completion_line("a"), completion_line("b", "x" * 5000), completion_line("c")])
    num_lines, errors = check(content, max_line_bytes=1000)
    assert (num_lines, [(e.code, e.line) for e in errors]) == (3, [("line_too_long", 2)])


def test_a_file_without_an_end_of_line_is_read_in_pieces() -> None:
    class Counting(io.BytesIO):
        largest = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            self.largest = max(self.largest, len(line))
            return line

    file = Counting(b"x" * 5_000_000)
    _, errors = check_input(file, URL, BatchLimits(max_line_bytes=1000))
    assert [e.code for e in errors] == ["line_too_long"]
    assert file.largest <= 2**20


def test_more_lines_than_may_be_and_more_errors_than_are_read() -> None:
    lines = [completion_line(str(i)) for i in range(5)]
    assert [e.code for e in check(jsonl(lines), max_lines=4)[1]] == ["too_many_lines"]
    assert check(jsonl(lines), max_lines=5) == (5, ())
    assert len(check(b"{\n" * 10_000)[1]) == MAX_ERRORS


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_lines_is_no_input(content: bytes) -> None:
    assert [e.code for e in check(content)[1]] == ["empty_file"]
