"""A whole node is cut off the network in the middle of a job, which notices but for time.

The nodes are network namespaces of this machine, each with a raylet and its processes.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

# Read when Ray is imported or a process of it starts; see tests/ray/conftest.py.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray's own wait for a node that does not answer, shortened as docs/operations.md says.
os.environ.setdefault("RAY_health_check_timeout_ms", "5000")
os.environ.setdefault("RAY_health_check_failure_threshold", "3")
# A busy machine needs longer for three nodes at once.
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")

import pytest
import ray
from ray.cluster_utils import Cluster
from support.faults import first_loss
from support.lan import AGENT_PORTS, START_SECONDS, Lan, Node, why_none
from support.node_jobs import NodeJob

from saqqara.cluster.on_ray.placement import alive_nodes
from saqqara.cluster.recovery.pulse import CUT_OFF_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.ray]

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 10.0
STUCK_SECONDS = 300.0
ROOM = "--num-cpus=2"  # for all ranks


@pytest.fixture
def lan(tmp_path: Path) -> Iterator[Lan]:
    if reason := why_none():
        pytest.skip(f"needs a network of its own: {reason}")
    lan = Lan(tmp_path)
    yield lan
    lan.close()


@pytest.fixture
def cluster(lan: Lan) -> Iterator[Any]:
    """A head without room for ranks, and two nodes that have some."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100 * 2**20,
            "include_dashboard": False,
            "node_ip_address": lan.head,
            **AGENT_PORTS,
        },
    )
    for _ in range(2):
        lan.add().start_ray(cluster.address, ROOM)
    ray.init(address=cluster.address, log_to_driver=False)
    await_started(lan.nodes)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(1200)
def test_a_job_goes_on_where_a_node_with_ranks_is_cut_off(
    cluster: Any, lan: Lan, tmp_path: Path
) -> None:
    """First one with ranks alone, then one with ranks and the controller."""
    job = NodeJob(tmp_path, num_rows=80)
    with job.running(cluster.address):
        job.await_rows()
        # Each node has one stage, and one of them the controller.
        [cut_off] = [node for node in lan.nodes if not node.actors("Controller")]
        [left] = [node for node in lan.nodes if node is not cut_off]
        assert len(cut_off.actors("RankProcess")) == 2
        spare = lan.add()
        spare.start_ray(cluster.address, ROOM)
        cut_and_await_loss(cut_off, job.log_dir / "controller.log")
        job.await_rows()
        assert len([*left.actors("RankProcess"), *spare.actors("RankProcess")]) == 4
        cut_off.mend()
        job.await_report()

        await_started([spare])
        assert left.actors("Controller")
        assert len(left.actors("RankProcess")) >= 2
        cut_and_await_loss(left, job.log)
        job.await_rows()
        assert spare.actors("Controller")
        assert len(spare.actors("RankProcess")) == 4
    left.mend()
    for node in (cut_off, left):
        await_empty(node)
    job.check_answers()
    assert job.recoveries() == {"unreachable": 1, "controller": 1}
    assert not spare.actors("RankProcess") + spare.actors("Controller")
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}


def cut_and_await_loss(node: Node, log: Path) -> None:
    """Cut a node off; it is noticed within seconds, and what runs there ends itself."""
    inside = [*node.actors("RankProcess"), *node.actors("Controller")]
    at = time.time()
    node.cut()
    started = time.monotonic()
    while (noticed := first_loss(log, at)) is None:
        assert time.monotonic() < started + STUCK_SECONDS
        time.sleep(0.1)
    logger.info("cut at %s, noticed after %.1f s", datetime.fromtimestamp(at), noticed - at)
    assert noticed - at < NOTICE_SECONDS
    while left := [process for process in inside if process.is_running()]:
        assert time.monotonic() < started + 3 * CUT_OFF_SECONDS, left
        time.sleep(0.1)
    logger.info("ended itself after %.1f s", time.monotonic() - started)


def await_started(nodes: Sequence[Node]) -> None:
    """Wait until these nodes are part of the cluster."""
    deadline = time.monotonic() + START_SECONDS
    hosts = {node.host for node in nodes}
    while not hosts <= {node["NodeManagerAddress"] for node in alive_nodes()}:
        assert time.monotonic() < deadline
        for node in nodes:
            node.start_again_if_ended()
        time.sleep(0.1)


def await_empty(node: Node) -> None:
    """Wait until nothing runs inside: a raylet that was given up ends with all that it started."""
    deadline = time.monotonic() + START_SECONDS
    while left := node.processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
