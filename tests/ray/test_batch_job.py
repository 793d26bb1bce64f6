"""A batch job on Ray, stopped and killed, it and its processes: it ends with each row once.

`make chaos` does the same at random and for longer.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from support.faults import actors, inflict

from saqqara.cluster.batch.summary import BatchSummary
from saqqara.configs.schema import EngineConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_ROWS = 40
Ended = subprocess.CompletedProcess[str]
TIMEOUT_SECONDS = 180  # Ray starts slowly on a busy machine


def rows_of(output: Path) -> int:
    """Whole lines of the results so far."""
    return output.read_bytes().count(b"\n") if output.exists() else 0


def end_at(num_rows: int, signum: signal.Signals, command: list[str], output: Path) -> Ended:
    """Run a job until it has written some rows, and end it with a signal."""
    job = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while rows_of(output) < num_rows:
            assert job.poll() is None, "the job ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(job.pid, signum)
        _, said = job.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        job.kill()
        job.wait()
    return subprocess.CompletedProcess(command, job.returncode, "", said)


def end_under_faults(command: list[str], output: Path, log_dir: Path) -> Ended:
    """Run a job to its end while a rank is killed, one is stopped, and its controller is killed."""
    job = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    chance = random.Random(0)
    try:
        for kind in ("kill rank", "stop rank", "kill controller"):
            wanted = rows_of(output) + 4
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while rows_of(output) < wanted:
                assert job.poll() is None, "the job ended before its processes could be lost"
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert inflict(kind, psutil.Process(job.pid), log_dir, chance) is not None
        _, said = job.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        job.kill()
        job.wait()
    return subprocess.CompletedProcess(command, job.returncode, "", said)


def environment() -> dict[str, str]:
    """That of a process which uses the Ray of this folder's tests."""
    return os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.mark.timeout(600)
def test_a_job_on_ray_goes_on_after_a_stop_a_kill_and_lost_processes(
    tiny_config: EngineConfig, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": f"row {i} " * (1 + i % 9), "custom_id": f"id-{i}"} for i in range(NUM_ROWS)]
    rows[7]["prompt"] = "too long " * 200
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "saqqara.cli", "batch", str(source)]
    command += ["--output", str(output), "--config", "ray-pp2", "--model", tiny_config.model]
    command += ["--load-format", "dummy", "--dtype", "float32", "--device", "cpu"]
    command += ["--max-model-len", "256", "--max-num-seqs", "2", "--kv-memory-gib", "0.02"]
    command += ["--num-threads", "1", "--log-dir", str(tmp_path / "logs"), "--check-integrity"]
    command += ["--retention", "pyramidkv", "--budget", "40", "--ignore-eos", "--max-tokens", "40"]

    stopped = end_at(4, signal.SIGTERM, command, output)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert f"stopped by SIGTERM: {rows_of(output)} of {NUM_ROWS} rows" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    killed = end_at(rows_of(output) + 4, signal.SIGKILL, command, output)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = end_under_faults(command, output, tmp_path / "logs")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(record["line"] for record in records) == list(range(1, NUM_ROWS + 1))
    for record in records:
        assert record["custom_id"] == f"id-{record['line'] - 1}"
        if record["line"] == 8:
            assert "max_model_len" in record["error"]["message"]
        else:
            assert record["usage"]["completion_tokens"] == 40
    text = output.with_name("out.jsonl.summary.json").read_text()
    summary = BatchSummary.model_validate_json(text)
    assert summary.complete
    assert 8 <= summary.resumed < NUM_ROWS
    assert summary.integrity == "ok, owners proved"
    assert summary.report is not None
    assert summary.report.recoveries["controller"] == 1
    log = (tmp_path / "logs" / "controller.log").read_text()
    for cause in ("died", "unreachable"):
        assert f"workers are lost ({cause})" in log
    assert not [*actors("RankProcess"), *actors("Controller")]
    states = [group["state"] for group in ray.util.placement_group_table().values()]
    assert set(states) == {"REMOVED"}
    assert "rank 1 on" in done.stderr  # the start-up log says what runs where
