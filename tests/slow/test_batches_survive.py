"""A server of two replicas is killed half-way through a batch and started again: nothing is lost.

All of its processes get SIGKILL at once, as when a machine fails.
"""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Read when a process of Ray starts; see tests/ray/conftest.py.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import json

import openai
import pytest
import yaml
from openai import OpenAI
from openai.types import Batch
from support.api_server import ENGINE, KEY, MODEL, OTHER_KEY
from support.batch_lines import ENDED, completion_line, jsonl, named
from support.byte_llama import save_tiny_llama
from support.server import Server, running_server

from saqqara.cluster.batch_store.store import Store
from saqqara.configs.schema import BatchLimits

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUM_LINES = 200
NUM_TOKENS = 48
LEASE_SECONDS = 5.0
WAIT_SECONDS = 300.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Serve file of two replicas that share a folder."""
    folder = tmp_path_factory.mktemp("batches")
    save_tiny_llama(folder / "llama")
    args = {
        "model_loading_config": {"model_id": MODEL, "model_source": str(folder / "llama")},
        "engine_kwargs": ENGINE,
        "deployment_config": {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0}},
        "batch_dir": str(folder / "store"),
        "batches": {"lease_seconds": LEASE_SECONDS},
    }
    application = {
        "name": "saqqara",
        "route_prefix": "/",
        "import_path": "saqqara.cluster.on_ray.serve:build_app",
        "args": args,
    }
    file = folder / "server.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    return file


def client_of(server: Server, key: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=5, timeout=60)


def submit(client: OpenAI, name: str, num_lines: int) -> Batch:
    lines = [
        completion_line(f"{name}-{i}", f"{name} {i}", max_tokens=NUM_TOKENS, ignore_eos=True)
        for i in range(num_lines)
    ]
    file = client.files.create(file=named(jsonl(lines)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )


def num_completed(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed


def wait(client: OpenAI, batch: Batch, is_there: Any) -> Batch:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_there(batch := client.batches.retrieve(batch.id)):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def records(client: OpenAI, batch: Batch) -> Mapping[str, Any]:
    """Output by custom ids, each of which is there once."""
    assert batch.output_file_id is not None
    text = client.files.content(batch.output_file_id).text
    found = [json.loads(line) for line in text.splitlines()]
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found)
    return by_id


def kill_all(server: Server) -> None:
    """SIGKILL for the server and all that it has started."""
    processes = server.left_behind()
    server.process.send_signal(signal.SIGKILL)
    for process in processes:
        process.kill()
    server.process.wait()


def test_a_killed_server_goes_on_with_its_batches(config: Path, tmp_path: Path) -> None:
    keys = f"{KEY},{OTHER_KEY}"
    with running_server(tmp_path / "first", str(config), keys=keys) as server:
        mine, yours = client_of(server, KEY), client_of(server, OTHER_KEY)
        batch = submit(mine, "mine", NUM_LINES)
        theirs = submit(yours, "yours", NUM_LINES // 4)
        before = wait(mine, batch, lambda b: num_completed(b) >= NUM_LINES // 2)
        assert num_completed(before) < NUM_LINES
        kill_all(server)
    with running_server(tmp_path / "second", str(config), keys=keys) as server:
        mine, yours = client_of(server, KEY), client_of(server, OTHER_KEY)
        after = mine.batches.retrieve(batch.id)
        assert num_completed(after) >= num_completed(before)
        done = wait(mine, batch, lambda b: b.status in ENDED)
        assert done.status == "completed"
        assert num_completed(done) == NUM_LINES
        found = records(mine, done)
        assert list(found) == [f"mine-{i}" for i in range(NUM_LINES)]
        for record in found.values():
            usage = record["response"]["body"]["usage"]
            assert usage["completion_tokens"] == NUM_TOKENS
        assert done.usage is not None
        assert done.usage.output_tokens == NUM_LINES * NUM_TOKENS
        done = wait(yours, theirs, lambda b: b.status in ENDED)
        assert list(records(yours, done)) == [f"yours-{i}" for i in range(NUM_LINES // 4)]
        for look in (yours.batches.retrieve, yours.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                look(batch.id)
        with pytest.raises(openai.NotFoundError):
            yours.files.content(batch.input_file_id)
        assert [b.id for b in yours.batches.list()] == [theirs.id]
        assert server.stop() == 0


def test_a_server_that_is_asked_to_end_hands_its_batches_back(config: Path, tmp_path: Path) -> None:
    """At once, however long their lines are; the next server goes on without waiting."""
    with running_server(tmp_path / "first", str(config), keys=KEY) as server:
        client = client_of(server, KEY)
        batch = submit(client, "again", NUM_LINES)
        wait(client, batch, lambda b: num_completed(b) >= NUM_LINES // 4)
        assert server.stop() == 0
    store = Store(config.parent / "store", BatchLimits())
    done = store.progress.done_lines(batch.id)
    assert NUM_LINES // 4 <= len(done) < NUM_LINES
    lease = store.leases.claim("the test", 4)
    assert lease is not None
    assert lease.batch.id == batch.id
    assert store.progress.losses(batch.id) == {}
    store.leases.release(lease)
    store.close()
    with running_server(tmp_path / "second", str(config), keys=KEY) as server:
        client = client_of(server, KEY)
        batch = wait(client, batch, lambda b: b.status in ENDED)
        assert list(records(client, batch)) == [f"again-{i}" for i in range(NUM_LINES)]


def test_a_batch_whose_replica_is_killed_is_run_by_the_other(config: Path, tmp_path: Path) -> None:
    with running_server(tmp_path / "log", str(config), keys=KEY) as server:
        client = client_of(server, KEY)
        batch = submit(client, "taken", NUM_LINES)
        wait(client, batch, lambda b: num_completed(b) >= NUM_LINES // 4)
        store = Store(config.parent / "store", BatchLimits())
        with store.database.read() as db:
            query = "SELECT holder FROM batches WHERE id = ?"
            holder = str(db.execute(query, (batch.id,)).fetchone()["holder"])
        pid = holder.split(":")[1]
        assert int(pid) in {process.pid for process in server.left_behind()}
        os.kill(int(pid), signal.SIGKILL)
        batch = wait(client, batch, lambda b: b.status in ENDED)
        store.close()
        assert list(records(client, batch)) == [f"taken-{i}" for i in range(NUM_LINES)]
        assert num_completed(batch) == NUM_LINES
