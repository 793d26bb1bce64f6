"""The files of a batch job: what may come in, what may go out, and errors that name the file."""

import dataclasses
import gzip
import os
import resource
import signal
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_client import FakeClient
from unit.batch.test_jobs import make_job, records, run

from saqqara.cluster.batch.job import run_batch
from saqqara.cluster.batch.lines import BadLine, Row, RowParser
from saqqara.cluster.batch.source import BatchSource
from saqqara.cluster.batch.summary import BatchSummary
from saqqara.cluster.errors import EngineDeadError
from saqqara.configs.schema import EngineConfig


def test_an_input_may_be_packed_with_gzip(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "ab"}, {"prompt": "cd"}])
    plain = run(job)
    job.input.write_bytes(gzip.compress(job.input.read_bytes()))
    assert run_batch(job, FakeClient()).resumed == 2  # the same lines, so the same job
    assert run(dataclasses.replace(job, overwrite=True)) == plain
    job.input.write_bytes(job.input.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"in\.jsonl is broken gzip"):
        run_batch(job, FakeClient())


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_that_is_too_long_costs_only_itself(tmp_path: Path, packed: bool) -> None:
    lines = [{"prompt": "x" * 5000}, {"prompt": "ab"}, {"prompt": "y" * 3000}]
    job = make_job(tmp_path, lines)
    if packed:
        job.input.write_bytes(gzip.compress(job.input.read_bytes()))
    with BatchSource(job.input, max_line_bytes=2000) as source:
        assert source.scan(tmp_path).num_rows == 3
        first, second, third = source.rows(RowParser("models/fake", {}))
    assert isinstance(second, Row)
    assert isinstance(first, BadLine)
    assert isinstance(third, BadLine)
    assert first.message == "the line is longer than 2000 bytes, the most that is read"
    assert (first.line, third.line) == (1, 3)


def test_memory_is_bounded_by_the_longest_line_that_is_read(tmp_path: Path) -> None:
    source = tmp_path / "bomb.gz"
    with gzip.open(source, "wb", compresslevel=1) as file:  # 48 MiB in one line, packed in 0.2
        for _ in range(48):
            file.write(b"0" * 2**20)
    with BatchSource(source, max_line_bytes=2**20) as bomb:
        tracemalloc.start()
        try:
            assert bomb.scan(tmp_path).num_rows == 1
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak_bytes < 2**23


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "x"}\n'.encode("utf-16"), "is UTF-16 or UTF-32, not UTF-8; convert it first"),
        ('{"prompt": "x"}\n'.encode("utf-16-le"), "iconv"),
        ('{"prompt": "x"}\n'.encode("utf-16-be"), "iconv"),
        (gzip.compress('{"prompt": "x"}\n'.encode("utf-16"), mtime=0), "iconv"),
        (b"\x28\xb5\x2f\xfd....", "is zstd"),
        (b"PK\x03\x04....", "is a zip archive"),
        (b"PAR1....", "is Parquet"),
    ],
)
def test_a_file_that_is_no_text_is_one_error_at_the_start(
    tmp_path: Path, content: bytes, said: str
) -> None:
    job = make_job(tmp_path, [])
    job.input.write_bytes(content)
    with pytest.raises(ValueError, match=r"input: .*in\.jsonl is ") as error:
        run_batch(job, FakeClient())
    assert said in str(error.value)


def test_a_pipe_is_read_and_can_be_resumed_with_the_same_lines(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(9)])
    text = job.input.read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    piped = dataclasses.replace(job, input=pipe)

    def fed(client: FakeClient, content: bytes = text) -> BatchSummary:
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        try:
            return run_batch(piped, client)
        finally:
            writer.join()

    with pytest.raises(EngineDeadError):
        fed(FakeClient(die_after=4, per_poll=1))
    assert fed(FakeClient()).resumed == 4
    assert len(records(piped)) == 9
    assert run_batch(job, FakeClient()).resumed == 9  # a file with these lines is the same job
    with pytest.raises(ValueError, match="the input file has changed"):
        fed(FakeClient(), text + b"{}")


class Meanwhile(FakeClient):
    """Does something once, while the job runs."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__()
        self.action: Callable[[], object] | None = action

    def poll(self, timeout_seconds: float = 0.0) -> list[Any]:
        if self.action is not None:
            self.action()
            self.action = None
        return super().poll(timeout_seconds)


def test_an_input_that_is_written_to_while_the_job_runs_is_an_error(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(9)])

    def append() -> None:
        with job.input.open("ab") as file:
            file.write(b'{"prompt": "one more"}\n')

    with pytest.raises(ValueError, match=r"in\.jsonl was changed while the job ran"):
        run_batch(job, Meanwhile(append))
    with pytest.raises(ValueError, match="the input file has changed"):
        run_batch(job, FakeClient())


def test_an_input_changed_behind_its_times_is_an_error_at_the_end(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(9)])
    before = job.input.stat()

    def change() -> None:
        with job.input.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"X")
        os.utime(job.input, ns=(before.st_atime_ns, before.st_mtime_ns))

    with BatchSource(job.input) as source:
        source.scan(tmp_path)
        change()
        with pytest.raises(ValueError, match="was changed while the job ran"):
            list(source.rows(RowParser("models/fake", {})))


def test_an_input_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(9)])

    def replace() -> None:
        (tmp_path / "new").write_text("{}\n")
        os.replace(tmp_path / "new", job.input)

    assert run_batch(job, Meanwhile(replace)).answered == 9


def test_overwriting_waits_for_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}])
    run(job)
    before = job.output.read_bytes()
    anew = make_job(tmp_path, [{"prompt": "y"}], overwrite=True)

    def launch(config: EngineConfig) -> FakeClient:
        assert job.output.read_bytes() == before
        with pytest.raises(ValueError, match="another job is writing"):
            run_batch(anew, FakeClient())
        raise ValueError("there is no such model")

    monkeypatch.setattr("saqqara.cluster.batch.job.launch_lasting", launch)
    with pytest.raises(ValueError, match="no such model"):
        run_batch(anew)
    assert job.output.read_bytes() == before
    assert run_batch(make_job(tmp_path, [{"prompt": "x"}]), FakeClient()).resumed == 1
    assert run(make_job(tmp_path, [{"prompt": "y"}], overwrite=True))[0]["text"] == "y"


def test_output_files_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}])
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").hardlink_to(job.input)
    os.mkfifo(tmp_path / "pipe")
    for output, said in [
        (tmp_path / "folder", "folder is a folder; it must be a file"),
        (tmp_path / "pipe", "pipe is a pipe or a device; it must be a file"),
        (tmp_path / "out.jsonl.gz", "leave .gz off"),
        (job.input / "out.jsonl", "cannot write"),
        (tmp_path / "link.jsonl", "link.jsonl is the input"),
        (Path("/proc/out.jsonl"), "cannot write /proc/out.jsonl"),
    ]:
        with pytest.raises(ValueError, match=r"^output: ") as error:
            run_batch(dataclasses.replace(job, output=output), FakeClient())
        assert said in str(error.value)
    with pytest.raises(ValueError, match="folder is a folder; it must be a file of JSON lines"):
        run_batch(dataclasses.replace(job, input=tmp_path / "folder"), FakeClient())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": 3}', b"\xff\xfe"])
def test_a_broken_sidecar_is_named(tmp_path: Path, content: bytes) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}])
    run(job)
    sidecar = tmp_path / "out.jsonl.job.json"
    sidecar.write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.jsonl\.job\.json is damaged"):
        run_batch(job, FakeClient())
    sidecar.unlink()
    sidecar.mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*out\.jsonl\.job\.json: Is a directory"):
        run_batch(job, FakeClient())
    sidecar.rmdir()
    sidecar.write_text('{"settings": {"model": "models/fake"}}')
    with pytest.raises(ValueError, match="another version of Saqqara"):
        run_batch(job, FakeClient())


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(200)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a disk that is full then
    try:
        with pytest.raises(
            RuntimeError, match=r"cannot write .*out\.jsonl: File too large"
        ) as error:
            run_batch(job, FakeClient())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    there = len(records(job))
    assert there > 20
    assert f"{there} rows are there; the same command goes on from them" in str(error.value)
    assert run_batch(job, FakeClient()).resumed == there
    assert len(records(job)) == 200


def test_a_job_of_no_rows_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job(tmp_path, ["", ""])
    assert run_batch(job).rows == 0
    assert "in.jsonl has no rows" in caplog.text
