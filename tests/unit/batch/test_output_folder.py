"""What an output folder may hold, what is removed from it, and what is never mixed in it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_client import FakeClient
from unit.batch.test_many_files import make_job, records, run

from saqqara.cluster.batch.parts import job_file
from saqqara.cluster.batch.parts.folder import OutputFolder
from saqqara.cluster.batch.parts.job import PartsJob, run_parts
from saqqara.cluster.batch.parts.job_file import clear_results, read_job_file
from saqqara.cluster.batch.parts.storage import filesystem
from saqqara.cluster.errors import EngineDeadError


def half_done(folder: Path) -> PartsJob:
    """A job that died when half of it was there."""
    job = make_job(folder, 9)
    with pytest.raises(EngineDeadError):
        run_parts(job, FakeClient(die_after=5, per_poll=1))
    assert records(job.output)
    return job


@pytest.mark.parametrize("name", ["part-000000.jsonl", "part-00000.parquet", "notes.txt"])
def test_overwrite_leaves_a_folder_of_others_alone(tmp_path: Path, name: str) -> None:
    job = make_job(tmp_path, 3, overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    client = FakeClient()
    with pytest.raises(ValueError, match="not empty and not a batch job's"):
        run_parts(job, client)
    assert client.submitted == []
    assert (tmp_path / "out" / name).read_text() == "precious"


def test_overwrite_removes_what_a_job_has_written_and_nothing_else(tmp_path: Path) -> None:
    job = make_job(tmp_path, 9)
    run(job)
    for name in ("part-00000-of-spark.jsonl", "part-list.txt"):
        (tmp_path / "out" / name).write_text("precious")
    (tmp_path / "out/part-000007.parquet").write_text("of an older job")
    assert run_parts(replace(job, overwrite=True, part_rows=9), FakeClient()).answered == 9
    assert sorted(path.name for path in (tmp_path / "out").glob("part-*")) == [
        *("part-00000-of-spark.jsonl", "part-000000.jsonl", "part-list.txt")
    ]


@pytest.mark.parametrize("text", ["{", '{"format": 0}'])
def test_overwrite_helps_where_a_job_cannot_be_read(tmp_path: Path, text: str) -> None:
    job = make_job(tmp_path, 3)
    run(job)
    (tmp_path / "out/_job.json").write_text(text)
    with pytest.raises(ValueError, match="--overwrite"):
        run_parts(job, FakeClient())
    assert run_parts(replace(job, overwrite=True), FakeClient()).answered == 3


@pytest.mark.parametrize("removed", range(6))
def test_an_overwrite_that_is_killed_leaves_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    job = make_job(tmp_path, 9)
    run(job)
    folder = OutputFolder(job.output, "jsonl")
    folder.write_json("_summary.json", {"rows": 9})
    fs, path = filesystem(job.output)

    class Dying:
        """A file system whose process is killed once so many files are removed."""

        left = removed

        def __getattr__(self, name: str) -> Any:
            return getattr(fs, name)

        def rm(self, name: str) -> None:
            if not self.left:
                raise SystemExit
            self.left -= 1
            fs.rm(name)

    dying = Dying()
    monkeypatch.setattr(job_file, "filesystem", lambda url: (dying, path))
    with pytest.raises(SystemExit):
        clear_results(folder)
    monkeypatch.undo()
    assert read_job_file(folder) is not None
    assert run_parts(job, FakeClient()).complete
    assert len(records(job.output)) == 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_kind": "parquet"}, "output_format was 'jsonl' and is now 'parquet'"),
        ({"prompt_column": "question"}, "prompt_column was None and is now 'question'"),
    ],
)
def test_formats_and_columns_are_never_mixed(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    job = half_done(tmp_path)
    before = json.loads((tmp_path / "out/_job.json").read_text())
    client = FakeClient()
    with pytest.raises(ValueError, match=words) as refused:
        run_parts(replace(job, mix_settings=True, **change), client)
    assert "--mix-settings" not in str(refused.value)
    assert client.submitted == []
    assert json.loads((tmp_path / "out/_job.json").read_text()) == before
    assert len(run(job)) == 9


def test_settings_may_change_while_nothing_has_come_of_a_job(tmp_path: Path) -> None:
    job = make_job(tmp_path, 4)

    def refuse() -> FakeClient:
        raise ValueError("budget: more than this model has")

    with pytest.raises(ValueError, match="more than this model has"):
        run_parts(job, make_client=refuse)
    assert (tmp_path / "out/_job.json").exists()
    answers = replace(job.answers, return_token_ids=True)
    assert run_parts(replace(job, answers=answers), FakeClient()).complete
    with pytest.raises(ValueError, match="holds results of other settings"):
        run_parts(job, FakeClient())


def test_a_part_that_was_removed_is_made_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, 7)
    before = run(job)
    (tmp_path / "out/part-000001.jsonl").unlink()
    client = FakeClient()
    summary = run_parts(job, client)
    assert (summary.answered, summary.resumed, summary.complete) == (3, 4, True)
    assert records(job.output) == before


@pytest.mark.parametrize("retry_errors", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines, lines[0]], r"record 4 is one too many, of line \d of 0.jsonl"),
        (lambda lines: lines[1:], "it has 2 records of 3 rows"),
        (lambda lines: [lines[0], "["], "what comes after 1 records is no batch result"),
        (lambda lines: ["[" * 100_000], "what comes after 0 records is no batch result"),
    ],
)
def test_a_part_that_has_not_one_record_a_row_is_an_error(
    tmp_path: Path, retry_errors: bool, change: Callable[[list[str]], list[str]], said: str
) -> None:
    job = make_job(tmp_path, 7, retry_errors=retry_errors)
    run(job, fail=["file 0 row 4"])
    part = tmp_path / "out/part-000000.jsonl"
    part.write_text("\n".join(change(part.read_text().splitlines())) + "\n")
    if not retry_errors:  # a finished folder is not read
        (tmp_path / "out/part-000002.jsonl").unlink()
    with pytest.raises(ValueError, match=f"part-000000.jsonl in .* was changed: {said}"):
        run_parts(job, FakeClient())
