"""A replica is one placement group: a bundle per tensor group, all of them or none."""

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from saqqara.cluster.on_ray import placement
from saqqara.cluster.on_ray.placement import (
    CPU_SHARE,
    PlacementError,
    own_gpu,
    plan_placement,
    reserve,
)
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout


def test_a_tensor_group_is_one_bundle_so_it_lies_on_one_node() -> None:
    plan = plan_placement(MeshLayout(tensor_size=2, pipeline_size=3), gpu=True, largest_node_gpus=8)
    assert plan.bundles == ({"CPU": 2 * CPU_SHARE, "GPU": 2.0},) * 3
    assert plan.bundle_of_rank == (0, 0, 1, 1, 2, 2)
    assert plan.rank_gpus == 1


def test_without_tensor_parallelism_there_is_a_bundle_per_rank() -> None:
    plan = plan_placement(MeshLayout(tensor_size=1, pipeline_size=2), gpu=False)
    assert plan.bundles == ({"CPU": CPU_SHARE},) * 2
    assert plan.bundle_of_rank == (0, 1)
    assert plan.rank_gpus == 0


@pytest.mark.parametrize(
    ("own", "visible", "index"),
    [
        ([], None, None),
        (["5"], "5", 0),  # Ray shows a rank its own GPU alone
        (["5"], None, 5),  # all of the host
        (["5"], "4, 5,6", 1),  # those that its node has
        (["GPU-1f"], "GPU-0c,GPU-1f", 1),
    ],
)
def test_a_rank_finds_its_gpu_among_those_it_sees(
    own: list[str], visible: str | None, index: int | None
) -> None:
    assert own_gpu(own, visible) == index


@pytest.mark.parametrize("visible", [None, "", "0,1", "GPU-0c"])
def test_a_rank_that_does_not_see_its_gpu_says_so(visible: str | None) -> None:
    with pytest.raises(ValueError, match="does not show GPU 'GPU-1f'"):
        own_gpu(["GPU-1f"], visible)


def test_a_tensor_group_larger_than_any_node_is_split_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = plan_placement(MeshLayout(tensor_size=4, pipeline_size=2), gpu=True, largest_node_gpus=2)
    assert plan.bundles == ({"CPU": CPU_SHARE, "GPU": 1.0},) * 8
    assert plan.bundle_of_rank == tuple(range(8))
    assert "exceeds the 2 GPUs of the largest node" in caplog.text


@pytest.mark.parametrize("layout", [MeshLayout(1, 1), MeshLayout(3, 1), MeshLayout(4, 3)])
def test_every_rank_has_its_share_of_a_bundle(layout: MeshLayout) -> None:
    plan = plan_placement(layout, gpu=True, largest_node_gpus=8)
    for name, share in (("CPU", CPU_SHARE), ("GPU", 1.0)):
        for index, bundle in enumerate(plan.bundles):
            ranks = plan.bundle_of_rank.count(index)
            assert bundle[name] == pytest.approx(ranks * share)


@pytest.mark.usefixtures("ray_cluster")
def test_reserve_and_release_leave_nothing_behind() -> None:
    # Tests before this one have let go of everything, but Ray may be slow to say so.
    before = ray.cluster_resources()["CPU"]
    _wait_for(lambda: ray.available_resources()["CPU"] == pytest.approx(before))
    room = reserve(_config(tensor_parallel_size=2, pipeline_parallel_size=2))
    places = room.places()
    assert len(places) == 4
    assert len({place.node_id for place in places}) == 1
    _wait_for(lambda: ray.available_resources()["CPU"] == pytest.approx(before - 4 * CPU_SHARE))
    room.release()
    room.release()
    _wait_for(lambda: ray.available_resources()["CPU"] == pytest.approx(before))


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_room_says_what_was_asked_and_what_there_is() -> None:
    before = ray.cluster_resources()["CPU"]
    with pytest.raises(PlacementError) as error:
        reserve(
            _config(tensor_parallel_size=4, pipeline_parallel_size=2, device="cuda"),
            timeout_seconds=0.5,
        )
    message = str(error.value)
    assert "tensor_parallel_size=4 x pipeline_parallel_size=2 on device=cuda" in message
    assert "asked for 2 x {CPU: 0.04, GPU: 4}" in message
    assert "CPU: 2" in message, "what there is"
    assert "device='cpu'" in message, "what would be right"
    _wait_for(lambda: ray.available_resources()["CPU"] == pytest.approx(before))


@pytest.mark.usefixtures("ray_cluster")
def test_nodes_that_do_not_answer_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    [node] = placement.alive_nodes()
    monkeypatch.setattr(placement, "_here", lambda: "another node")
    assert not placement.unreachable_nodes(), "its raylet takes connections"
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = node | {"NodeManagerAddress": "127.0.0.1"}
        closed["NodeManagerPort"] = server.getsockname()[1]
    monkeypatch.setattr(placement, "alive_nodes", lambda: [closed])
    assert placement.unreachable_nodes() == {node["NodeID"]: "127.0.0.1"}
    assert not placement.unreachable_nodes([]), "nobody asked"
    with pytest.raises(PlacementError, match="no room"):
        reserve(_config(), timeout_seconds=1.0)


def _config(**settings: Any) -> EngineConfig:
    return EngineConfig(model="-", executor="ray", **{"device": "cpu", **settings})


def _wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Ray's picture of free resources is a moment old."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still false after {seconds:g} s"
        time.sleep(0.05)
