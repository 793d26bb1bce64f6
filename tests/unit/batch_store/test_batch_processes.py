"""Real processes over one store: side by side, and killed at any moment."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import batch_process
from support.stores import ME, content_of, new_batch

from saqqara.cluster.batch_store.store import Store
from saqqara.configs.schema import BatchLimits

LEASE_SECONDS = 1.0
NUM_LINES = 20
END_SECONDS = 120


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, BatchLimits(lease_seconds=LEASE_SECONDS))
    yield store
    store.close()


def start(folder: Path) -> "subprocess.Popen[str]":
    """A process that runs batches."""
    command = [sys.executable, batch_process.__file__, str(folder), str(LEASE_SECONDS)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)


def check_output(store: Store, batch_id: str) -> set[str]:
    """Every line is there once, in order; by which processes."""
    batch = store.batches.get(ME, batch_id)
    assert (batch.status, batch.num_completed) == ("completed", NUM_LINES)
    records = [json.loads(line) for line in content_of(store, batch.output_file_id).splitlines()]
    assert [r["custom_id"] for r in records] == [f"row-{i}" for i in range(1, NUM_LINES + 1)]
    return {r["response"]["by"] for r in records}


def test_processes_side_by_side_run_each_batch_once(store: Store, tmp_path: Path) -> None:
    """Also where one is so slow that another takes its batch over, as with this short a lease."""
    batches = [new_batch(store, NUM_LINES) for _ in range(4)]
    processes = [start(tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=END_SECONDS)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    for batch in batches:
        check_output(store, batch.id)
    num_lines = sum(word != "lost" for words in said for word in words)
    assert num_lines == len(batches) * NUM_LINES  # nor was a line committed twice


def test_a_process_that_is_killed_loses_nothing_and_doubles_nothing(
    store: Store, tmp_path: Path
) -> None:
    batch = new_batch(store, NUM_LINES)
    said: list[str] = []
    for num_lines in (1, 5, 11):
        process = start(tmp_path)
        assert process.stdout is not None
        said += [process.stdout.readline().strip() for _ in range(num_lines)]
        process.kill()
        rest, _ = process.communicate(timeout=END_SECONDS)
        said += rest.split()
        done = len(store.progress.done_lines(batch.id))
        assert done in (len(said), len(said) + 1)  # killed between a commit and its word
    last = start(tmp_path)
    rest, _ = last.communicate(timeout=END_SECONDS)
    assert last.returncode == 0
    assert len(check_output(store, batch.id)) > 1
    assert len(set(said + rest.split())) == len(said + rest.split())  # nor committed twice
