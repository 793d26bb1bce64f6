"""Running rows again whose record is an error, and going on with other settings on purpose."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_client import FakeClient
from unit.batch.test_jobs import make_job, records

from saqqara.cluster.batch.files import ResultFile
from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.batch.retried import retried_path
from saqqara.cluster.batch.summary import cost_of, summary_table
from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.sampling import SamplingParams

LINES: list[Any] = [{"prompt": f"row {i}"} for i in range(9)]


def errors(job: BatchJob) -> list[int]:
    """Input lines whose record is an error."""
    return [record["line"] for record in records(job) if record["error"] is not None]


def with_errors(folder: Path) -> BatchJob:
    """A finished job of which lines 2, 5 and 6 have failed, and line 7 is no JSON."""
    job = make_job(folder, [*LINES[:6], "{", *LINES[7:]])
    summary = run_batch(job, FakeClient(fail=["row 1", "row 4", "row 5"]))
    assert (summary.answered, summary.errors) == (5, 4)
    assert errors(job) == [2, 5, 6, 7]
    return job


def test_rows_with_errors_run_again_and_replace_their_records(tmp_path: Path) -> None:
    job = with_errors(tmp_path)
    before = {record["line"]: record for record in records(job)}
    client = FakeClient(fail=["row 4"])
    summary = run_batch(replace(job, retry_errors=True), client)
    assert sorted(str(r.prompt) for r in client.submitted) == ["row 1", "row 4", "row 5"]
    assert (summary.answered, summary.errors, summary.resumed) == (2, 2, 5)
    assert summary.complete
    assert errors(job) == [5, 7]
    for record in records(job):
        if record["line"] not in (2, 6):
            assert record == before[record["line"]]
    assert not retried_path(job.output).exists()
    assert run_batch(job, FakeClient()).resumed_errors == 2  # without the flag nothing runs


def test_without_errors_there_is_nothing_to_retry(tmp_path: Path) -> None:
    job = make_job(tmp_path, LINES)
    run_batch(job, FakeClient())
    client = FakeClient()
    summary = run_batch(replace(job, retry_errors=True), client)
    assert summary.report is None
    assert client.submitted == []


@pytest.mark.parametrize("with_flag", [False, True])
def test_a_killed_retry_leaves_one_record_a_row(tmp_path: Path, with_flag: bool) -> None:
    job = with_errors(tmp_path)
    old = job.output.read_bytes()
    results = ResultFile(job.output, retry_errors=True)
    results.resume(json.loads(results.sidecar.read_text())["settings"])
    results.begin({})
    results.write({"line": 2, "text": "new", "error": None})
    # Killed here, amid the next line: the file is let go of, and nothing else happens.
    with retried_path(job.output).open("ab") as file:
        file.write(b'{"line": 5, "te')
    assert job.output.read_bytes() == old
    results._file.close()
    assert results._retried is not None
    results._retried.close()
    assert errors(job) == [2, 5, 6, 7]
    summary = run_batch(replace(job, retry_errors=with_flag), FakeClient())
    assert summary.complete
    assert [r for r in records(job) if r["line"] == 2] == [
        {"line": 2, "text": "new", "error": None}
    ]
    assert errors(job) == ([7] if with_flag else [5, 6, 7])


def test_a_retry_that_fails_keeps_what_it_has(tmp_path: Path) -> None:
    job = with_errors(tmp_path)
    with pytest.raises(EngineDeadError):
        run_batch(replace(job, retry_errors=True), FakeClient(per_poll=1, die_after=1))
    assert len(errors(job)) == 3
    assert len(records(job)) == 9


def test_a_job_cannot_slip_in_while_the_file_is_replaced(tmp_path: Path) -> None:
    job = with_errors(tmp_path)
    results = ResultFile(job.output, retry_errors=True)
    results.resume(json.loads(results.sidecar.read_text())["settings"])
    results.begin({})
    results.write({"line": 2, "text": "new", "error": None})
    inode = job.output.stat().st_ino
    results._put_in_place()
    assert job.output.stat().st_ino != inode
    with pytest.raises(ValueError, match="another job is writing"):
        ResultFile(job.output)
    results.close()
    ResultFile(job.output).close()


def test_a_job_that_opened_the_file_before_it_was_replaced_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = with_errors(tmp_path)

    def replaced_meanwhile(file: Any, how: int) -> None:
        shutil.copy(job.output, tmp_path / "new")
        os.replace(tmp_path / "new", job.output)

    monkeypatch.setattr("saqqara.cluster.batch.files.fcntl.flock", replaced_meanwhile)
    with pytest.raises(ValueError, match="another job is writing"):
        ResultFile(job.output)


def test_other_settings_are_refused_by_name_and_mixed_on_demand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path, LINES)
    with pytest.raises(EngineDeadError):
        run_batch(job, FakeClient(die_after=3))
    before = len(records(job))
    hot = replace(job, sampling=SamplingParams(max_tokens=2, temperature=0.5))
    with pytest.raises(ValueError, match=r"sampling.max_tokens was 4 and is now 2, sampling.temp"):
        run_batch(hot, FakeClient())
    with pytest.raises(ValueError, match="--mix-settings"):
        run_batch(hot, FakeClient())
    summary = run_batch(replace(hot, mix_settings=True), FakeClient())
    assert summary.resumed == before
    lengths = [record["usage"]["completion_tokens"] for record in records(job)]
    assert sorted(lengths) == [2] * (9 - before) + [4] * before
    (mixed,) = json.loads((tmp_path / "out.jsonl.job.json").read_text())["mixed"]
    assert mixed["rows_before"] == before
    assert "sampling.max_tokens was 4 and is now 2" in mixed["changed"]
    assert "will mix settings" in caplog.text


def test_another_input_is_never_mixed(tmp_path: Path) -> None:
    job = make_job(tmp_path, LINES)
    run_batch(job, FakeClient())
    other = make_job(tmp_path, [*LINES, {"prompt": "one more"}], mix_settings=True)
    with pytest.raises(ValueError, match="the input file has changed") as refused:
        run_batch(other, FakeClient())
    assert "--mix-settings" not in str(refused.value)


def test_cost_follows_from_price_hours_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run_batch(make_job(tmp_path, LINES, gpu_hour_price=2.0), FakeClient())
    assert summary.report is not None
    worker = summary.report.workers
    report = summary.report.model_copy(update={"workers": (*worker, None, None)})
    cost = cost_of(2.0, report, seconds=1800)
    assert cost is not None
    assert (cost.num_gpus, cost.gpu_hours, cost.total) == (2, 1.0, 2.0)
    assert cost.per_million_tokens == pytest.approx(2.0 / 110 * 1e6)
    assert cost.per_million_new_tokens == pytest.approx(2.0 / 10 * 1e6)
    print_table(summary_table([summary.model_copy(update={"cost": cost})]))
    assert "200,000.0000" in capsys.readouterr().out
    assert cost_of(None, report, 1.0) is None
