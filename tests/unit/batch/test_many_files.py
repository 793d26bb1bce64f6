"""A job over many files: each row has one record, in a folder that grows by whole parts.

The engine is a fake; replicas on Ray are in tests/ray.
"""

import gzip
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.fake_client import FakeClient

from saqqara.cluster.batch.answers import AnswerSettings
from saqqara.cluster.batch.files import WriteError
from saqqara.cluster.batch.parts import folder as folders
from saqqara.cluster.batch.parts.cutting import cut
from saqqara.cluster.batch.parts.folder import OutputFolder
from saqqara.cluster.batch.parts.job import PartsJob, run_parts
from saqqara.cluster.batch.parts.job_file import JobFile, only_writer, settle
from saqqara.cluster.batch.parts.storage import find_inputs
from saqqara.cluster.batch.stop import Stopped
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig

ANSWERS = AnswerSettings(
    config=EngineConfig(model="models/fake", max_num_seqs=2), sampling=SamplingParams(max_tokens=4)
)
Rows = list[dict[str, Any]]


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    """Objects become JSON."""
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    data = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def make_job(folder: Path, *counts: int, **settings: Any) -> PartsJob:
    """A job over files with so many rows each, three rows a part."""
    for number, count in enumerate(counts):
        rows = [{"prompt": f"file {number} row {i}", "custom_id": f"{i}"} for i in range(count)]
        write_lines(folder / f"in/{number}.jsonl", rows)
    given: dict[str, Any] = {"answers": ANSWERS, "part_rows": 3} | settings
    return PartsJob((str(folder / "in/*.jsonl"),), str(folder / "out"), **given)


def records(output: str | Path) -> Rows:
    """All records by file and line; fails if a row has two."""
    found: Rows = []
    for path in sorted(Path(output).glob("part-*.jsonl")):
        found += map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ids = [(record["file"], record["line"]) for record in found]
    assert len(set(ids)) == len(ids)
    return sorted(found, key=lambda record: (record["file"], record["line"]))


def run(job: PartsJob, **client: Any) -> Rows:
    """Run a job to its end with a fake engine."""
    assert run_parts(job, FakeClient(**client)).complete
    return records(job.output)


def prompts(client: FakeClient) -> list[str]:
    """What the engine was asked."""
    return sorted(str(request.prompt) for request in client.submitted)


def test_rows_of_all_files_have_one_record_each(tmp_path: Path) -> None:
    job = make_job(tmp_path, 7, 0, 4)
    client = FakeClient()
    summary = run_parts(job, client)
    found = records(job.output)
    ids = [("0.jsonl", n) for n in range(1, 8)] + [("2.jsonl", n) for n in range(1, 5)]
    assert [(record["file"], record["line"]) for record in found] == ids
    assert found[0] == {
        "file": "0.jsonl",
        "line": 1,
        "custom_id": "0",
        "text": "0 wo",
        "finish_reason": "length",
        "usage": {
            "prompt_tokens": 12,
            "completion_tokens": 4,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "error": None,
    }
    assert (summary.rows, summary.answered, summary.errors) == (11, 11, 0)
    assert client.closed
    assert client.max_waiting <= ANSWERS.most_in_flight(client)
    assert sorted(p.name for p in Path(job.output).iterdir()) == [
        *("_job.json", "_job.lock", "_resolved.json"),
        *(f"part-{i:06d}.jsonl" for i in range(5)),
    ]


def test_a_rows_noise_follows_its_file_and_line(tmp_path: Path) -> None:
    """Requests have the same ids however the input is cut, and wherever its folder lies."""
    ids = []
    for place, part_rows in [("a", 2), ("b", 100)]:
        client = FakeClient()
        run_parts(make_job(tmp_path / place, 5, 3, part_rows=part_rows), client)
        ids.append(sorted(request.request_id for request in client.submitted))
    assert ids[0] == ids[1]
    assert ids[0] == [
        f"{f}.jsonl:{n}" for f, count in [(0, 5), (1, 3)] for n in range(1, count + 1)
    ]


def test_the_next_part_fills_what_the_last_rows_of_one_leave(tmp_path: Path) -> None:
    class Slow(FakeClient):
        """Answers the first row last."""

        def poll(self, timeout_seconds: float = 0.0) -> list[Any]:
            first = [r for r in self.waiting if r.request_id == "0.jsonl:1"]
            if first and len(self.submitted) < 6:
                self.waiting.remove(first[0])
                outputs = super().poll(timeout_seconds)
                self.waiting.append(first[0])
                return outputs
            return super().poll(timeout_seconds)

    assert len(run(make_job(tmp_path, 6))) == 6
    assert run_parts(make_job(tmp_path / "slow", 6), Slow()).complete  # else it waits for ever


@pytest.mark.parametrize("die_after", [0, 1, 4, 8])
def test_a_job_that_dies_goes_on_with_what_is_not_committed(tmp_path: Path, die_after: int) -> None:
    job = make_job(tmp_path, 7, 4)
    with pytest.raises(EngineDeadError, match="rank 1 died"):
        run_parts(job, FakeClient(die_after=die_after, per_poll=1))
    there = {(r["file"], r["line"]) for r in records(job.output)}
    client = FakeClient()
    summary = run_parts(job, client)
    assert summary.complete
    assert summary.resumed == len(there)
    assert len(client.submitted) == 11 - len(there)
    assert len(records(job.output)) == 11


def test_a_part_that_was_written_and_not_committed_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, 9)
    commit = folders.StagedPart.commit

    def killed(staged: folders.StagedPart) -> None:
        raise SystemExit  # between the write of the data and its commit

    monkeypatch.setattr(folders.StagedPart, "commit", killed)
    monkeypatch.setattr(folders.StagedPart, "__exit__", lambda self, *_: self._file.close())
    with pytest.raises(SystemExit):
        run_parts(job, FakeClient())
    assert records(job.output) == []
    assert list((tmp_path / "out/_staging").iterdir())
    monkeypatch.setattr(folders.StagedPart, "commit", commit)
    assert len(run(job)) == 9
    assert not (tmp_path / "out/_staging").exists()


def test_a_signal_ends_a_job_with_whole_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path, 12)

    class Stopping(FakeClient):
        def poll(self, timeout_seconds: float = 0.0) -> list[Any]:
            if self.answered >= 7:  # two parts are whole
                os.kill(os.getpid(), signal.SIGTERM)
                return []
            return super().poll(timeout_seconds)

    client = Stopping(per_poll=1)
    with pytest.raises(Stopped) as stopped:
        run_parts(job, client)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert client.closed
    there = len(records(job.output))
    assert there % 3 == 0
    assert f"stopped by SIGTERM: {there} of 12 rows are in" in caplog.text
    assert run_parts(job, FakeClient()).resumed == there


def test_a_finished_job_does_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path, 4, 4)
    run(job, fail=["file 1 row 2"])
    before = {p: p.stat().st_mtime_ns for p in Path(job.output).iterdir()}
    client = FakeClient()
    summary = run_parts(job, client)
    assert (summary.resumed, summary.resumed_errors, summary.report) == (8, 1, None)
    assert client.submitted == []
    assert {p: p.stat().st_mtime_ns for p in Path(job.output).iterdir()} == before


def test_rows_with_errors_are_made_again_and_the_others_stay(tmp_path: Path) -> None:
    job = make_job(tmp_path, 7)
    run(job, fail=["file 0 row 1", "file 0 row 6"])
    parts = [tmp_path / f"out/part-00000{i}.jsonl" for i in range(3)]
    before = [part.stat().st_ino for part in parts]
    client = FakeClient(fail=["file 0 row 6"])
    summary = run_parts(replace(job, retry_errors=True), client)
    assert prompts(client) == ["file 0 row 1", "file 0 row 6"]
    assert (summary.resumed, summary.answered, summary.errors) == (5, 1, 1)
    assert [r["line"] for r in records(job.output) if r["error"] is not None] == [7]
    replaced = [part.stat().st_ino != old for part, old in zip(parts, before, strict=True)]
    assert replaced == [True, False, True]  # whole files take their places, none is written to
    assert run_parts(job, FakeClient()).resumed_errors == 1


def test_a_retry_that_dies_keeps_the_old_records(tmp_path: Path) -> None:
    job = make_job(tmp_path, 3)
    run(job, fail=["file 0 row 1"])
    old = (tmp_path / "out/part-000000.jsonl").read_bytes()
    with pytest.raises(EngineDeadError):
        run_parts(replace(job, retry_errors=True), FakeClient(die_after=0))
    assert (tmp_path / "out/part-000000.jsonl").read_bytes() == old


def test_other_settings_are_refused_and_mixed_on_demand(tmp_path: Path) -> None:
    job = make_job(tmp_path, 6)
    with pytest.raises(EngineDeadError):
        run_parts(job, FakeClient(die_after=5, per_poll=1))  # one of two parts is there
    answers = replace(ANSWERS, sampling=SamplingParams(max_tokens=2))
    other = replace(job, answers=answers)
    with pytest.raises(ValueError, match=r"sampling.max_tokens was 4 and is now 2"):
        run_parts(other, FakeClient())
    assert run_parts(replace(other, mix_settings=True), FakeClient()).complete
    (mixed,) = json.loads((tmp_path / "out/_job.json").read_text())["mixed"]
    assert mixed["changed"] == ["sampling.max_tokens was 4 and is now 2"]
    # Smaller parts change no answer: the job keeps to its own.
    assert run_parts(replace(other, part_rows=1), FakeClient()).resumed == 6


def test_another_input_is_refused_by_the_name_of_its_file(tmp_path: Path) -> None:
    job = make_job(tmp_path, 4, 4)
    run(job)
    write_lines(tmp_path / "in/1.jsonl", [{"prompt": "other"}])
    for mix in (False, True):
        with pytest.raises(ValueError, match=r"1\.jsonl of the input has changed"):
            run_parts(replace(job, mix_settings=mix), FakeClient())
    assert len(run(replace(job, overwrite=True))) == 5


def test_bad_rows_cost_only_themselves(tmp_path: Path) -> None:
    job = make_job(tmp_path, 2, 2)
    lines = ["{", {"prompt": "fine"}, "", {"prmpt": "x"}, "\udcff", {"prompt": "x" * 2000}]
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (tmp_path / "in/0.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    found = [r for r in run(job) if r["file"] == "0.jsonl"]
    assert [(r["line"], r["error"] is None) for r in found] == [
        *((1, False), (2, True), (4, False), (5, False), (6, False)),
    ]
    assert "not UTF-8" in found[3]["error"]["message"]
    assert found[4]["error"]["message"] == "prompt has 2000 tokens; at most 1000 fit"


def test_openai_records_say_their_file(tmp_path: Path) -> None:
    job = make_job(tmp_path, 1, 1)
    body = {"model": "fake", "prompt": "abc"}
    line = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body}
    write_lines(tmp_path / "in/1.jsonl", [line])
    (record,) = [r for r in run(job) if r["file"] == "1.jsonl"]
    assert record["id"] == "batch_req_1.jsonl:1"
    assert record["response"]["body"]["choices"][0]["text"] == "cba"


def test_packed_files_and_folders_of_clouds(tmp_path: Path) -> None:
    cloud = fsspec.filesystem("memory")
    write_lines(tmp_path / "x/a.jsonl.gz", [{"prompt": f"row {i}"} for i in range(8)])
    for name in ("b.jsonl", "c.jsonl"):
        cloud.pipe(f"/bucket/in/{name}", b'{"prompt": "cloud"}\n' * 4)
    inputs = (str(tmp_path / "x/*.gz"), "memory://bucket/in/*.jsonl")
    job = PartsJob(inputs, "memory://bucket/out", ANSWERS, part_rows=3)
    with pytest.raises(EngineDeadError):
        run_parts(job, FakeClient(die_after=12, per_poll=1))
    summary = run_parts(job, FakeClient())
    assert summary.complete
    assert summary.rows == 16
    folder = OutputFolder(job.output, "jsonl")
    found = [(r["file"], r["line"]) for i in range(5) for r in folder.records(i)]
    assert len(set(found)) == len(found) == 16
    assert run_parts(job, FakeClient()).report is None
    cloud.rm("/bucket", recursive=True)


def test_a_file_that_changes_while_the_job_runs_ends_it(tmp_path: Path) -> None:
    job = make_job(tmp_path, 6)

    class Meanwhile(FakeClient):
        def describe(self) -> Any:
            file = tmp_path / "in/0.jsonl"
            file.write_text(file.read_text().replace("file", "life"))
            return super().describe()

    with pytest.raises(ValueError, match=r"in/0\.jsonl was changed while the job ran"):
        run_parts(job, Meanwhile())
    assert records(job.output) == []


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fs: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    job = make_job(tmp_path, 3)
    monkeypatch.setattr(folders, "_sync", full)
    with pytest.raises(WriteError, match=r"cannot write .*/out: No space left on device"):
        run_parts(job, FakeClient())


def _folder_as_input(job: PartsJob, tmp_path: Path) -> PartsJob:
    return replace(job, inputs=(str(tmp_path / "in"),))


def _file_as_output(job: PartsJob, tmp_path: Path) -> PartsJob:
    (tmp_path / "taken").write_text("mine")
    return replace(job, output=str(tmp_path / "taken"))


def _other_folder(job: PartsJob, tmp_path: Path) -> PartsJob:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    return replace(job, output=str(tmp_path / "full"))


def _packed_otherwise(job: PartsJob, tmp_path: Path) -> PartsJob:
    (tmp_path / "in/1.jsonl").write_bytes(b"PK\x03\x04....")
    return job


def _port(job: PartsJob, tmp_path: Path) -> PartsJob:
    config = ANSWERS.config.model_copy(update={"metrics_port": 8001})
    return replace(job, num_replicas=2, answers=replace(ANSWERS, config=config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job, _: replace(job, inputs=("nowhere/*.jsonl",)), "no file matches 'nowhere"),
        (lambda job, _: replace(job, inputs=("gone.jsonl",)), "cannot read .*gone.jsonl"),
        (lambda job, _: replace(job, inputs=("xyz://a/b",)), "xyz"),
        (
            lambda job, _: replace(job, output=job.output + ".jsonl"),
            "comes? out as a folder|come out",
        ),
        (lambda job, path: replace(job, output=str(path / "in")), "lies in .*; choose another"),
        (_folder_as_input, r"in is a folder; name its files, such as '.*/in/\*\.jsonl'"),
        (_file_as_output, "taken is a file"),
        (_other_folder, "full is not empty and not a batch job's"),
        (_packed_otherwise, r"1\.jsonl is a zip archive"),
        (_port, "metrics_port"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_starts(
    tmp_path: Path, change: Callable[[PartsJob, Path], PartsJob], message: str
) -> None:
    job = change(make_job(tmp_path, 2, 2), tmp_path)
    client = FakeClient()
    with pytest.raises(ValueError, match=message) as refused:
        run_parts(job, client)
    assert "\n" not in str(refused.value)
    assert client.submitted == []
    assert not (tmp_path / "full").exists() or os.listdir(tmp_path / "full") in (
        ["precious.txt"],
        ["_job.lock", "precious.txt"],
        ["precious.txt", "_job.lock"],
    )


def test_one_job_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    job = make_job(tmp_path, 2)
    with (
        only_writer(OutputFolder(job.output, "jsonl")),
        pytest.raises(ValueError, match="another job is writing"),
    ):
        run_parts(job, FakeClient())
    assert len(run(job)) == 2


def test_another_devices_answers_are_not_mixed_in(tmp_path: Path) -> None:
    job = make_job(tmp_path, 6)
    folder = OutputFolder(job.output, "jsonl")
    JobFile({}, part_rows=3).write(folder)
    settle(folder, {"device": "cuda"}, mix_settings=False)
    settle(folder, {"device": "cuda", "dtype": "bfloat16"}, mix_settings=False)
    with pytest.raises(ValueError, match="device was 'cuda' and is now 'cpu'"):
        settle(folder, {"device": "cpu"}, mix_settings=False)
    settle(folder, {"device": "cpu"}, mix_settings=True)
    assert folder.read_json("_resolved.json") == {"device": "cpu", "dtype": "bfloat16"}
    (mixed,) = json.loads((tmp_path / "out/_job.json").read_text())["mixed"]
    assert mixed == {"parts_before": 0, "changed": ["device was 'cuda' and is now 'cpu'"]}


def test_parts_cover_every_line_once(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "{"x" * (i % 7)}"}}' for i in range(20)] + ["", "  ", "last"]
    write_lines(tmp_path / "a.jsonl", lines)
    data = (tmp_path / "a.jsonl").read_bytes()
    for part_rows in (1, 3, 100):
        parts, _ = cut(find_inputs([str(tmp_path / "a.jsonl")]), part_rows)
        assert b"".join(data[part.start : part.stop] for part in parts) == data
        assert sum(part.num_rows for part in parts) == 21
        assert all(part.num_rows <= part_rows for part in parts)
        for part in parts:
            assert part.first_line == data[: part.start].count(b"\n") + 1


def test_relative_paths_mean_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tmp_path, 3)
    monkeypatch.chdir(tmp_path)

    class Elsewhere(FakeClient):
        def describe(self) -> Any:
            monkeypatch.chdir("/")
            return super().describe()

    assert run_parts(PartsJob(("in/*.jsonl",), "out", ANSWERS), Elsewhere()).complete
    assert len(records(tmp_path / "out")) == 3


def test_a_file_that_two_patterns_find_is_read_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, 2, 2)
    job = replace(job, inputs=(*job.inputs, str(tmp_path / "in/1.jsonl")))
    assert len(run(job)) == 4
