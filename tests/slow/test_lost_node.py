"""Nodes of unequal size; they are removed and added again under jobs, which notice but for time."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Read when Ray is imported or a process of it starts; see tests/ray/conftest.py.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from support.faults import actors
from support.node_jobs import NodeJob

from saqqara.cluster.on_ray.placement import Placement, PlacementError, alive_nodes, reserve
from saqqara.configs.schema import EngineConfig

pytestmark = [pytest.mark.slow, pytest.mark.ray]

OBJECT_STORE = {"object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for ranks."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **OBJECT_STORE},
    )
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add_node(cluster: Any) -> Iterator[Callable[..., Any]]:
    """Adds a node with room for all ranks, until the test is over."""
    nodes = []

    def add(**room: float) -> Any:
        nodes.append(cluster.add_node(num_cpus=2, **room, **OBJECT_STORE))
        return nodes[-1]

    yield add
    for node in nodes:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)


@pytest.mark.timeout(1200)
def test_a_job_survives_the_loss_of_either_node(
    cluster: Any, add_node: Callable[..., Any], tmp_path: Path
) -> None:
    nodes = [add_node() for _ in range(2)]
    job = NodeJob(tmp_path, num_rows=40)
    with job.running(cluster.address):
        for _ in range(2):
            job.await_rows()
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            job.await_rows()
            nodes.append(add_node())
    job.check_answers()
    assert sum(job.recoveries().values()) >= 2
    check_nothing_is_left()


@pytest.mark.timeout(600)
def test_the_controller_survives_the_loss_of_a_node_with_one_rank(
    cluster: Any, add_node: Callable[..., Any], tmp_path: Path
) -> None:
    nodes = [add_node() for _ in range(2)]
    job = NodeJob(tmp_path, num_rows=24, tensor_size=1)
    with job.running(cluster.address):
        job.await_rows()
        [controller] = actors("Controller")
        [without_it] = [node for node in nodes if controller.ppid() != raylet_of(node).pid]
        assert [rank.ppid() for rank in actors("RankProcess")].count(raylet_of(without_it).pid) == 1
        cluster.remove_node(without_it, allow_graceful=False)
        add_node()
        job.await_rows()
        assert actors("Controller") == [controller]
    job.check_answers()
    assert job.recoveries() == {"died": 1}
    check_nothing_is_left()


@pytest.mark.timeout(600)
def test_tensor_groups_stay_inside_nodes_of_unequal_size(
    add_node: Callable[..., Any],
) -> None:
    for num_gpus in (1, 3):
        add_node(num_gpus=num_gpus)
    assert sorted(gpus_of_ranks(reserve(gpu_config(pipeline=4, tensor=1)))) == [1, 3, 3, 3]

    with pytest.raises(PlacementError) as error:
        reserve(gpu_config(pipeline=2, tensor=2), timeout_seconds=3.0)
    message = str(error.value)
    assert "tensor_parallel_size=2 x pipeline_parallel_size=2 on device=cuda" in message
    assert "asked for 2 x {CPU: 0.02, GPU: 2}, each on one node" in message
    assert "CPU: 2, GPU: 1;" in message
    assert "CPU: 2, GPU: 3;" in message

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reserve, gpu_config(pipeline=2, tensor=2))
        add_node(num_gpus=2)
        assert gpus_of_ranks(waiting.result()) in ([2, 2, 3, 3], [3, 3, 2, 2])


def gpus_of_ranks(placement: Placement) -> list[float]:
    """By rank, the GPUs of its node, which tell nodes apart; gives the room back."""
    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0) for node in alive_nodes()}
    places = placement.places()
    placement.release()
    return [gpus[place.node_id] for place in places]


def gpu_config(pipeline: int, tensor: int) -> EngineConfig:
    sizes = {"pipeline_parallel_size": pipeline, "tensor_parallel_size": tensor}
    return EngineConfig(model="-", executor="ray", device="cuda", **sizes)


def raylet_of(node: Any) -> psutil.Process:
    [raylet] = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid)


def check_nothing_is_left() -> None:
    assert not [*actors("RankProcess"), *actors("Controller")]
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}
