"""Values of Parquet that JSON lacks are errors of their rows, never texts that are answered."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from unit.batch.test_many_files import ANSWERS

from saqqara.cluster.batch.lines import BadLine, Row
from saqqara.cluster.batch.parts.cutting import cut
from saqqara.cluster.batch.parts.rows import rows_of
from saqqara.cluster.batch.parts.storage import find_inputs

pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
pq = pytest.importorskip("pyarrow.parquet")

MOMENT = datetime.datetime(2026, 11, 29, 12)
STRINGS = pa.list_(pa.string())


def rows_in(path: Path, table: Any, prompt_column: str | None = None) -> list[Row | BadLine]:
    """The rows of a file with that table."""
    pq.write_table(table, path / "a.parquet")
    (part,), _ = cut(find_inputs([str(path / "a.parquet")]), 100, prompt_column)
    return list(rows_of(part, ANSWERS.parser(), prompt_column))


def test_bytes_are_text_in_utf_8(tmp_path: Path) -> None:
    columns = {
        "prompt": pa.array([b"ab", "gr\u00fc\u00df".encode(), b"a\xff"], pa.binary()),
        "custom_id": pa.array([b"x", b"y", b"z"], pa.large_binary()),
        "stop": pa.array([[b"."], None, None], pa.list_(pa.binary())),
    }
    first, second, third = rows_in(tmp_path, pa.table(columns))
    assert isinstance(first, Row)
    assert (first.requests[0].prompt, first.custom_id) == ("ab", "x")
    assert first.requests[0].sampling_params.stop == (".",)
    assert isinstance(second, Row)
    assert second.requests[0].prompt == "gr\u00fc\u00df"
    assert isinstance(third, BadLine)
    assert (third.line, third.message, third.field) == (3, "prompt: not UTF-8", "prompt")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("custom_id", pa.array([MOMENT]), "custom_id is a timestamp; it must be a string"),
        ("custom_id", pa.array([MOMENT.date()]), "custom_id is a date; it must be a string"),
        ("custom_id", pa.array([Decimal("1.5")]), "custom_id is a decimal; it must be a string"),
        ("custom_id", pa.array([b"\xff"]), "custom_id: not UTF-8"),
        ("custom_id", pa.array([{"a": 1}]), "custom_id is an object; it must be a string"),
        ("stop", pa.array([MOMENT]), "stop is a timestamp, which is no value of JSON"),
        ("stop", pa.array([[MOMENT.time()]]), "stop[0] is a time, which is no value of JSON"),
        ("stop", pa.array([Decimal(1)]), "stop is a decimal, which is no value of JSON"),
        ("retention", pa.array([{"budget": Decimal(9)}]), "retention.budget is a decimal, which"),
        (
            "logit_bias",
            pa.array([[("7", 1.0)]], pa.map_(pa.string(), pa.float64())),
            "logit_bias[0] is a pair of a map, which is no value of JSON",
        ),
    ],
)
def test_what_json_lacks_is_an_error_of_its_row(
    tmp_path: Path, column: str, values: Any, message: str
) -> None:
    (row,) = rows_in(tmp_path, pa.table({"prompt": ["abc"], column: values}))
    assert isinstance(row, BadLine)
    assert row.message.startswith(message)


@pytest.mark.parametrize("value", [MOMENT, MOMENT.date(), Decimal("1.50")])
def test_no_such_value_is_a_prompt(tmp_path: Path, value: Any) -> None:
    (row,) = rows_in(tmp_path, pa.table({"text": pa.array([value])}), "text")
    assert isinstance(row, BadLine)
    assert row.message.startswith("prompt is a ")


def test_the_record_of_such_a_row_is_that_of_its_line(tmp_path: Path) -> None:
    columns = {
        "custom_id": ["x"],
        "method": ["POST"],
        "url": ["/v1/completions"],
        "body": [{"prompt": MOMENT}],
    }
    (row,) = rows_in(tmp_path, pa.table(columns))
    assert isinstance(row, BadLine)
    assert (row.custom_id, row.url) == ("x", "/v1/completions")
    assert row.message.startswith("body.prompt is a timestamp")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"prompt": "a", "prompt": "b"}', "body: 'prompt' is there twice"),
        ("{'prompt'", "body is not JSON: "),
        (b'{"prompt": "a", "stop": {"x": 1, "x": 2}}', "body: 'x' is there twice"),
    ],
)
def test_a_body_of_text_is_read_as_a_line_is(tmp_path: Path, body: Any, message: str) -> None:
    columns = {
        "custom_id": ["x"],
        "method": ["POST"],
        "url": ["/v1/completions"],
        "body": [body],
    }
    (row,) = rows_in(tmp_path, pa.table(columns))
    assert isinstance(row, BadLine)
    assert row.message.startswith(message)


@pytest.mark.parametrize("prompt_column", [None, "text"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, prompt_column: str | None) -> None:
    name = prompt_column or "prompt"
    table = pa.table([["a"], ["b"]], names=[name, name])
    with pytest.raises(ValueError, match=rf"^input: .*a.parquet: column '{name}' is there twice$"):
        rows_in(tmp_path, table, prompt_column)


def test_columns_that_are_not_read_may_be_there_twice(tmp_path: Path) -> None:
    table = pa.table([["a"], [1], [2], [3]], names=["prompt", "x", "x", "prompt.more"])
    (row,) = rows_in(tmp_path, table)
    assert isinstance(row, Row)
    assert row.requests[0].prompt == "a"


def test_a_null_prompt_is_said_to_be_null(tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.array(["a", None]), "max_tokens": [None, 3]})
    first, second = rows_in(tmp_path, table)
    assert isinstance(first, Row)
    assert isinstance(second, BadLine)
    assert second.message == "prompt is null, so the line has no prompt"
