"""Prompts from Parquet and answers to it: only the columns that a request has are read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_client import FakeClient
from unit.batch.test_many_files import ANSWERS, prompts, records

from saqqara.cluster.batch.parts.cutting import cut
from saqqara.cluster.batch.parts.folder import SCHEMA
from saqqara.cluster.batch.parts.job import PartsJob, run_parts
from saqqara.cluster.batch.parts.parquet import parquet_rows, used_columns
from saqqara.cluster.batch.parts.storage import find_inputs

pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
pq = pytest.importorskip("pyarrow.parquet")


def write_table(path: Path, columns: dict[str, Any], group_rows: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group_rows)


def make_job(path: Path, **settings: Any) -> PartsJob:
    """A job over one file, three rows a part."""
    given = {"part_rows": 3} | settings
    return PartsJob((str(path / "*.parquet"),), str(path / "out"), ANSWERS, **given)


def numbered(count: int) -> list[str]:
    return [f"row {i}" for i in range(count)]


@pytest.mark.parametrize("group_rows", [1, 2, 4, 5, 100])
@pytest.mark.parametrize("part_rows", [1, 3, 4, 100])
def test_every_row_is_read_once_however_the_file_is_cut(
    tmp_path: Path, group_rows: int, part_rows: int
) -> None:
    write_table(tmp_path / "a.parquet", {"prompt": numbered(11)}, group_rows)
    parts, _ = cut(find_inputs([str(tmp_path / "a.parquet")]), part_rows)
    read: list[str] = []
    for part in parts:
        assert part.first_line == len(read) + 1
        with (tmp_path / "a.parquet").open("rb") as file:
            found = list(parquet_rows(file, part.start, part.stop, None, "a"))
        assert len(found) == part.num_rows
        read += [json.loads(str(line))["prompt"] for line in found]
    assert read == numbered(11)
    assert len(parts) == -(-11 // max(part_rows, 1)) or group_rows > 1


def test_columns_become_the_fields_of_requests_and_others_are_not_read(tmp_path: Path) -> None:
    columns = {
        "prompt": ["abcdef", "ghi", None],
        "max_tokens": [2, None, 3],
        "custom_id": ["x", "y", "z"],
        "embedding": [[0.5] * 8] * 3,
    }
    write_table(tmp_path / "a.parquet", columns)
    job = make_job(tmp_path)
    summary = run_parts(job, FakeClient())
    first, second, third = records(job.output)
    assert (first["custom_id"], first["text"]) == ("x", "fe")
    assert second["text"] == "ihg"
    assert "prompt is null" in third["error"]["message"]
    assert (summary.answered, summary.errors) == (2, 1)
    names = [*columns, "id"]
    assert set(used_columns(names, None, "a")) == {"prompt", "max_tokens", "custom_id"}


def test_bytes_of_unused_columns_are_never_read(tmp_path: Path) -> None:
    """The file's other columns are overwritten, and nobody notices."""
    columns = {"prompt": numbered(6), "noise": [f"{i}" * 5000 for i in range(6)]}
    write_table(tmp_path / "a.parquet", columns)
    file = tmp_path / "a.parquet"
    metadata = pq.read_metadata(file)
    data = bytearray(file.read_bytes())
    for group in range(metadata.num_row_groups):
        noise = metadata.row_group(group).column(1)
        start = noise.dictionary_page_offset or noise.data_page_offset
        data[start : start + noise.total_compressed_size] = b"\xee" * noise.total_compressed_size
    file.write_bytes(data)
    client = FakeClient()
    assert run_parts(make_job(tmp_path), client).answered == 6
    assert prompts(client) == numbered(6)


def test_chats_and_openai_columns(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    chats = pa.array([[{"role": "user", "content": "chat"}]], pa.list_(message))
    write_table(tmp_path / "chats.parquet", {"messages": chats})
    openai = {
        "custom_id": ["a", "b"],
        "method": ["POST", "POST"],
        "url": ["/v1/completions"] * 2,
        "body": ['{"model": "fake", "prompt": "abc"}', "{"],
    }
    write_table(tmp_path / "openai.parquet", openai)
    job = make_job(tmp_path)
    run_parts(job, FakeClient())
    chat, good, bad = records(job.output)
    assert chat["text"] == "tahc"
    assert good["response"]["body"]["choices"][0]["text"] == "cba"
    assert bad["error"]["param"] == "body"


def test_the_column_with_the_prompts_may_have_any_name(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", {"text": ["abc"], "prompt": ["not this"]})
    client = FakeClient()
    assert run_parts(make_job(tmp_path, prompt_column="text"), client).answered == 1
    assert prompts(client) == ["abc"]


def test_a_file_without_prompts_is_one_line_with_its_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", {"text": ["abc"], "n": [1]})
    with pytest.raises(ValueError, match=r"a\.parquet has no column for prompts.*'text', 'n'"):
        run_parts(make_job(tmp_path), FakeClient())
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'txt'; it has 'text', 'n'"):
        run_parts(make_job(tmp_path, prompt_column="txt"), FakeClient())


@pytest.mark.parametrize("keep", [10, -20, -3])
def test_a_torn_file_is_one_line(tmp_path: Path, keep: int) -> None:
    write_table(tmp_path / "a.parquet", {"prompt": numbered(6)})
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"a\.parquet is broken Parquet") as refused:
        run_parts(make_job(tmp_path), FakeClient())
    assert "\n" not in str(refused.value)


def test_a_broken_place_costs_its_rows(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", {"prompt": numbered(8)}, group_rows=4)
    file = tmp_path / "a.parquet"
    column = pq.read_metadata(file).row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)
    job = make_job(tmp_path, part_rows=4)
    summary = run_parts(job, FakeClient())
    assert (summary.answered, summary.errors) == (4, 4)
    message = records(job.output)[4]["error"]["message"]
    assert message.startswith("rows 5 to 8 of a.parquet cannot be read: ")


def test_a_changed_file_is_another_input(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", {"prompt": numbered(6)})
    job = make_job(tmp_path)
    run_parts(job, FakeClient())
    write_table(tmp_path / "a.parquet", {"prompt": numbered(5)})
    with pytest.raises(ValueError, match=r"a\.parquet of the input has changed"):
        run_parts(job, FakeClient())


def test_answers_as_parquet(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", {"prompt": numbered(7)})
    job = make_job(tmp_path, output_kind="parquet")
    run_parts(job, FakeClient(fail=["row 4"]))
    table = pq.read_table(tmp_path / "out", schema=None).sort_by("line")
    assert [(f.name, str(f.type)) for f in table.schema] == list(SCHEMA)
    rows = table.to_pylist()
    assert [row["line"] for row in rows] == list(range(1, 8))
    assert (rows[0]["text"], rows[0]["prompt_tokens"], rows[0]["error"]) == ("0 wo", 5, None)
    assert (rows[4]["text"], rows[4]["error"]) == (None, "its pages do not fit")
    assert json.loads(rows[0]["record"])["file"] == "a.parquet"
    summary = run_parts(replace(job, retry_errors=True), FakeClient())
    assert (summary.resumed, summary.answered, summary.errors) == (6, 1, 0)
