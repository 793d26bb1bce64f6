"""Nodes are removed from a cluster and added again under a job, which notices but for time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Read when Ray is imported or a process of it starts; see tests/ray/conftest.py.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import ray
from ray.cluster_utils import Cluster
from support import chaos_job
from support.byte_llama import save_tiny_llama
from support.faults import actors

from saqqara.cluster.batch.job import run_batch
from saqqara.cluster.batch.summary import BatchSummary

pytestmark = pytest.mark.slow

NUM_ROWS = 40
STUCK_SECONDS = 300.0
RETENTIONS = ("full", {"method": "h2o", "budget": "25%", "decode": {"slack_pages": 1}})


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for ranks, and two nodes that have some."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100 * 2**20,
            "include_dashboard": False,
        },
    )
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(1200)
def test_a_job_survives_the_loss_of_either_node(cluster: Any, tmp_path: Path) -> None:
    nodes = [add_node(cluster) for _ in range(2)]
    source, model = tmp_path / "in.jsonl", tmp_path / "model"
    save_tiny_llama(model)
    rows = [
        {
            "prompt": f"row {i} " * (5 + i % 20),
            "max_tokens": 100,
            "retention": RETENTIONS[i % 2],
            "temperature": 0.8 if i % 3 == 0 else 0.0,
            "seed": i,
        }
        for i in range(NUM_ROWS)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = chaos_job.make_job(source, tmp_path / "alone.jsonl", model, tmp_path / "logs")
    sizes = {"executor": "local", "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    assert run_batch(replace(alone, config=alone.config.model_copy(update=sizes))).complete

    output, summary_file = tmp_path / "out.jsonl", tmp_path / "summary"
    arguments = [source, output, model, tmp_path / "logs", summary_file]
    env = os.environ | {"RAY_ADDRESS": cluster.address}
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, chaos_job.__file__, *map(str, arguments)]
        job = subprocess.Popen(command, env=env, stderr=log)
    try:
        for _ in range(3):
            await_rows(output, 4, job, tmp_path / "log")
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            await_rows(output, 4, job, tmp_path / "log")
            nodes.append(add_node(cluster))
        assert job.wait(STUCK_SECONDS) == 0, (tmp_path / "log").read_text()[-4000:]
    finally:
        job.kill()
        job.wait()
    assert tokens(output) == tokens(alone.output)
    summary = BatchSummary.model_validate_json(summary_file.read_text())
    assert summary.integrity == "ok, owners proved"
    assert summary.report is not None
    assert sum(summary.report.recoveries.values()) >= 3
    assert not [*actors("RankProcess"), *actors("Controller")]
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}


def add_node(cluster: Any) -> Any:
    """Another node with room for all ranks."""
    return cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)


def await_rows(output: Path, more: int, job: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the job has written so many rows more."""

    def num_rows() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    wanted = num_rows() + more
    deadline = time.monotonic() + STUCK_SECONDS
    while num_rows() < wanted:
        assert job.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def tokens(output: Path) -> dict[int, list[int]]:
    """The tokens of each line's answer; a line has one record, and it is no error."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(record["line"] for record in records) == list(range(1, NUM_ROWS + 1))
    assert not [record for record in records if record.get("error") is not None]
    return {record["line"]: record["token_ids"] for record in records}
