"""A batch job on Ray workers, killed half-way: the same command ends with each row exactly once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from saqqara.cluster.batch_summary import BatchSummary
from saqqara.configs.schema import EngineConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_ROWS = 40
TIMEOUT_SECONDS = 180  # Ray starts slowly on a busy machine


@pytest.mark.timeout(420)
def test_a_killed_job_on_ray_goes_on(tiny_config: EngineConfig, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": f"row {i} " * (1 + i % 9), "custom_id": f"id-{i}"} for i in range(NUM_ROWS)]
    rows[7]["prompt"] = "too long " * 200
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "saqqara.cluster.cli", "batch", str(source)]
    command += ["--output", str(output), "--config", "ray-pp2", "--model", tiny_config.model]
    command += ["--load-format", "dummy", "--dtype", "float32", "--device", "cpu"]
    command += ["--max-model-len", "256", "--max-num-seqs", "2", "--kv-memory-gib", "0.02"]
    command += ["--num-threads", "1", "--log-dir", str(tmp_path / "logs"), "--check-integrity"]
    command += ["--retention", "pyramidkv", "--budget", "40", "--ignore-eos", "--max-tokens", "40"]
    address = ray.get_runtime_context().gcs_address
    env = os.environ | {"RAY_ADDRESS": address}

    job = subprocess.Popen(command, env=env)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not output.exists() or output.read_bytes().count(b"\n") < 8:
            assert job.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(job.pid, signal.SIGKILL)
        job.wait()

    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
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
    assert "rank 1 on" in done.stderr  # the start-up log says what runs where
