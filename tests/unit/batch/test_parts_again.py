"""Parts that run again, replicas that start at once, and boards that are lost: counts stay true.

What Ray does to replicas is done here by hand, to one in this process.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_client import FakeClient
from unit.batch.test_many_files import ANSWERS, make_job, prompts, records, run

from saqqara.cluster.batch.parts.folder import OutputFolder, StagedPart
from saqqara.cluster.batch.parts.job import run_parts
from saqqara.cluster.batch.parts.job_file import JobFile
from saqqara.cluster.batch.parts.pool import LocalPool, Tally
from saqqara.cluster.batch.parts.replica import (
    PartCounts,
    PartReplica,
    PartResult,
    PartWork,
    ReplicaSettings,
)
from saqqara.cluster.batch.records import Record
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.on_ray.data import Board


@pytest.fixture
def killed_after_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is run twice: the first replica dies between its commit and its report."""
    once = PartReplica.run

    def twice(replica: PartReplica, work: PartWork) -> PartResult | None:
        once(replica, work)
        return once(replica, work)

    monkeypatch.setattr(PartReplica, "run", twice)


@pytest.mark.usefixtures("killed_after_commit")
def test_a_part_that_was_committed_already_counts_as_this_runs(tmp_path: Path) -> None:
    client = FakeClient(fail=["file 0 row 1"])
    summary = run_parts(make_job(tmp_path, 5), client)
    assert (summary.answered, summary.errors, summary.resumed) == (4, 1, 0)
    assert len(client.submitted) == 5


def test_a_retried_part_that_was_committed_already_counts_as_this_runs(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = make_job(tmp_path, 7)
    run(job, fail=["file 0 row 0", "file 0 row 1", "file 0 row 6"])
    request.getfixturevalue("killed_after_commit")
    client = FakeClient(fail=["file 0 row 1"])
    summary = run_parts(replace(job, retry_errors=True), client)
    assert summary.complete
    assert (summary.answered, summary.errors, summary.resumed) == (2, 1, 4)
    assert prompts(client) == [f"file 0 row {row}" for row in (0, 1, 1, 6)]  # once if it is good
    assert [r["line"] for r in records(job.output) if r["error"] is not None] == [2]


def test_records_that_stay_are_never_all_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, 9, part_rows=9)
    run(job, fail=["file 0 row 8"])
    num_read = num_written = 0
    read, write = OutputFolder.records, StagedPart.write

    def reading(folder: OutputFolder, index: int) -> Iterator[Record]:
        nonlocal num_read
        for record in read(folder, index):
            num_read += 1
            yield record

    def writing(staged: StagedPart, record: Record) -> None:
        nonlocal num_written
        num_written += 1
        assert num_read - 9 == num_written  # the driver has read all of them, too
        write(staged, record)

    monkeypatch.setattr(OutputFolder, "records", reading)
    monkeypatch.setattr(StagedPart, "write", writing)
    assert run_parts(replace(job, retry_errors=True), FakeClient()).complete
    assert num_written == 9


def test_counts_do_not_depend_on_the_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board that was lost begins anew and knows nothing."""
    monkeypatch.setattr(LocalPool, "tally", lambda pool: Tally())
    job = make_job(tmp_path, 7)
    summary = run_parts(job, FakeClient(fail=["file 0 row 1"]))
    assert (summary.answered, summary.errors) == (6, 1)
    assert summary.complete
    assert summary.report is not None
    finished = json.loads((tmp_path / "out/_job.json").read_text())["finished"]
    assert finished == {"rows": 7, "errors": 1}


def test_the_last_measurements_of_a_replica_count_in_any_order() -> None:
    early = FakeClient().report()
    late = early.model_copy(update={"wall_seconds": 5.0})
    busy = late.model_copy(update={"pages_leaked": None})
    for reports in ([early, busy, late], [late, early, busy]):
        tally = Tally()
        for report in reports:
            tally.note("a", PartCounts(0, answered=1), report)
        assert tally.reports == {"a": late}
    known, shown = Tally({0: PartCounts(0, 3)}), Tally({0: PartCounts(0, 1), 1: PartCounts(1, 2)})
    assert known.over(shown).totals() == (5, 0)


@pytest.mark.parametrize("mix", [False, True])
def test_replicas_that_start_at_once_come_to_one_kind_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: bool
) -> None:
    folder = OutputFolder(str(tmp_path), "jsonl")
    JobFile({}, part_rows=3).write(folder)
    settings = ReplicaSettings(ANSWERS, folder, mix_settings=mix)
    monkeypatch.setattr(
        "saqqara.cluster.batch.parts.replica.resolved_settings",
        lambda *_: {"dtype": threading.current_thread().name},
    )
    both_have_read = threading.Barrier(2)
    read = OutputFolder.read_json

    def slow(opened: OutputFolder, name: str) -> Any:
        data = read(opened, name)
        if name == "_resolved.json":
            with suppress(threading.BrokenBarrierError):
                both_have_read.wait(0.5)  # without a turn for each, both find nothing
        return data

    monkeypatch.setattr(OutputFolder, "read_json", slow)
    board, turn = Board(Tally()), threading.Lock()
    errors: list[Exception] = []

    def alone(call: Callable[[], None]) -> None:
        with turn:  # as Ray runs the calls of an actor
            error = board.call(call)
        if error is not None:
            raise error

    def start() -> None:
        try:
            replica = PartReplica(settings, "", Tally().note, alone, FakeClient())
        except ValueError as error:
            errors.append(error)
        else:
            replica.close()

    threads = [threading.Thread(target=start, name=dtype) for dtype in ("bfloat16", "float16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mixed = json.loads((tmp_path / "_job.json").read_text())["mixed"]
    assert (len(errors), len(mixed)) == ((0, 1) if mix else (1, 0))
    told = mixed[0]["changed"][0] if mix else str(errors[0])
    assert "dtype was '" in told


def test_a_board_hands_errors_back() -> None:
    def fail() -> None:
        raise ValueError("in its own words")

    board = Board(Tally())
    assert repr(board.call(fail)) == "ValueError('in its own words')"
    assert board.call(lambda: None) is None


class ShortPool(LocalPool):
    """Ends without an error, and without the last seven parts that it was given."""

    def begin(self, works: Sequence[PartWork]) -> None:
        """Leave some out."""
        super().begin(works[:-7])


def test_replicas_that_end_short_are_an_error_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, 9, 18)  # three parts, and six
    with monkeypatch.context() as patch:
        patch.setattr("saqqara.cluster.batch.parts.job.LocalPool", ShortPool)
        with pytest.raises(EngineDeadError, match=r"without 7 parts .*run the same comm") as error:
            run_parts(job, FakeClient())
    assert "(0.jsonl from line 7, 1.jsonl from line 1, " in str(error.value)
    assert ", 1.jsonl from line 10, 2 more);" in str(error.value)
    assert run_parts(job, FakeClient()).resumed == 6
    assert len(records(job.output)) == 27
