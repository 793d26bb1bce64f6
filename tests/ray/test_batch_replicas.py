"""A batch job over several replicas on Ray: one engine each, rows once, signals and deaths."""

import json
import logging
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from saqqara.cluster.batch.answers import AnswerSettings
from saqqara.cluster.batch.parts.folder import OutputFolder
from saqqara.cluster.batch.parts.job import PartsJob, run_parts
from saqqara.cluster.batch.parts.job_file import committed
from saqqara.cluster.batch.parts.pool import Event
from saqqara.cluster.batch.parts.ray_pool import RayPool
from saqqara.cluster.batch.parts.replica import PartResult
from saqqara.cluster.batch.stop import Stopped
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig

pytest.importorskip("ray.data", reason="the extra `data` is not installed")
pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray Data sets settings of its own that it calls deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\..*"),
]

NUM_FILES, NUM_ROWS = 3, 14


def make_job(config: EngineConfig, folder: Path) -> PartsJob:
    """Files with a bad row each, four rows a part; two replicas with an engine in their process."""
    (folder / "in").mkdir()
    for number in range(NUM_FILES):
        rows = [{"prompt": f"file {number} row {i}"} for i in range(NUM_ROWS)]
        lines = [json.dumps(row) for row in rows]
        lines[3] = "{"
        (folder / f"in/{number}.jsonl").write_text("\n".join(lines))
    answers = AnswerSettings(
        config=config.model_copy(update={"executor": "local"}),
        sampling=SamplingParams(max_tokens=5, temperature=1.0, ignore_eos=True),
    )
    inputs = (str(folder / "in/*.jsonl"),)
    return PartsJob(inputs, str(folder / "out"), answers, part_rows=4, num_replicas=2)


def texts(output: str) -> dict[tuple[str, int], Any]:
    """Text of each row, None for errors; fails if a row has two records."""
    found: dict[tuple[str, int], Any] = {}
    for path in sorted(Path(output).glob("part-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert (record["file"], record["line"]) not in found
            found[record["file"], record["line"]] = record["text"]
    return found


def replica_processes() -> list[int]:
    """Processes of this job's replicas."""
    actors = ray._private.state.actors().values()
    found = [
        a["Pid"] for a in actors if "MapWorker" in a["ActorClassName"] and a["State"] == "ALIVE"
    ]
    assert found, [(a["ActorClassName"], a["State"]) for a in actors]
    return found


def stop_after_a_part(job: PartsJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a job until a part is committed, then send it a signal; it ends with its replicas."""
    replicas: list[int] = []

    class Stopping(RayPool):
        """Is sent the signal."""

        def next(self, timeout_seconds: float) -> Event:
            event = super().next(timeout_seconds)
            if isinstance(event, PartResult) and not replicas:
                replicas.extend(replica_processes())
                os.kill(os.getpid(), signal.SIGTERM)
            return event

    with monkeypatch.context() as patch:
        patch.setattr("saqqara.cluster.batch.parts.ray_pool.RayPool", Stopping)
        with pytest.raises(Stopped) as stopped:
            run_parts(job)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert not [thread for thread in threading.enumerate() if thread.name == "ray-data"]
    processes = [psutil.Process(pid) for pid in replicas if psutil.pid_exists(pid)]
    assert psutil.wait_procs(processes, timeout=10)[1] == []


@pytest.mark.timeout(420)
def test_rows_are_answered_once_by_a_job_that_is_stopped_and_replicas_of_which_one_dies(
    tiny_config: EngineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job = make_job(tiny_config, tmp_path)
    stop_after_a_part(job, monkeypatch)
    there = len(texts(job.output))
    assert 0 < there < NUM_FILES * NUM_ROWS
    [said] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    text = f"stopped by SIGTERM: ([0-9]+) of {NUM_FILES * NUM_ROWS} rows are in {job.output}; "
    counted = re.match(text, said.getMessage())
    assert counted is not None, said.getMessage()
    assert 0 < int(counted[1]) <= there, "a replica that is ended may commit one part more"
    assert "Traceback" not in capfd.readouterr().err
    killed: list[int] = []

    class Killing(RayPool):
        """Kills a replica's process once a part is committed, and the board with it."""

        def next(self, timeout_seconds: float) -> Event:
            event = super().next(timeout_seconds)
            if isinstance(event, PartResult) and not killed:
                replicas = replica_processes()
                os.kill(replicas[0], signal.SIGKILL)
                killed.append(replicas[0])
                ray.kill(self._fleet._board, no_restart=False)
            return event

    monkeypatch.setattr("saqqara.cluster.batch.parts.ray_pool.RayPool", Killing)
    summary = run_parts(job)
    assert killed
    found = texts(job.output)
    assert len(found) == NUM_FILES * NUM_ROWS
    assert [key for key, text in found.items() if text is None] == [
        (f"{n}.jsonl", 4) for n in range(NUM_FILES)
    ]
    assert summary.resumed == there
    assert summary.answered + summary.errors == NUM_FILES * NUM_ROWS - there
    assert summary.all_errors == NUM_FILES
    assert summary.report is not None
    assert summary.num_replicas == 2
    assert run_parts(job).report is None  # nothing is left
    alone = replace(job, num_replicas=1, output=str(tmp_path / "alone"))
    assert run_parts(alone).complete
    assert texts(alone.output) == found  # noise follows the row, not its replica or neighbours


def test_a_replica_that_cannot_start_is_one_line(tiny_config: EngineConfig, tmp_path: Path) -> None:
    job = make_job(tiny_config, tmp_path)
    config = job.answers.config.model_copy(update={"kv_memory_gib": 1e-6})
    with pytest.raises(ValueError, match="kv_memory_gib"):
        run_parts(replace(job, answers=replace(job.answers, config=config)))
    assert committed(OutputFolder(job.output, "jsonl")) == set()
