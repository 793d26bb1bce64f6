"""Where the ranks of a replica run: (pipeline, tensor) to the bundles of one placement group.

The ranks of one stage (its tensor group) exchange activations in every layer, so they belong on one
node; stages exchange one tensor per step and may span nodes. A bundle always lies on one node while
a placement group has one strategy for all its bundles. So each *stage* is one bundle, with room for
its whole tensor group, in one PACK group: the node constraint holds per stage, and the replica is
reserved as a whole or not at all (a group per stage could leave two replicas holding half of their
stages each). Without tensor parallelism that is one bundle per rank. Only where no node is large
enough for a tensor group does every rank get a bundle of its own.

Data parallelism is one placement group per replica, so that replicas start, fail and move alone.
"""

import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout

logger = logging.getLogger(__name__)

# A bundle must ask for something. Ranks on CPUs share a node's cores by their thread counts, and an
# application that holds Ray's CPUs (a Serve replica, a Data task) must not keep its engine out.
CPU_SHARE = 0.01
DEFAULT_TIMEOUT_SECONDS = 120.0
LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 1  # a cluster that has room grants it at once
_CONNECT_SECONDS = 3.0  # two tries of TCP
_MAX_THREADS = 32
_NODE_LABEL = "ray.io/node-id"  # every node has it

Strategy = Literal["PACK", "SPREAD"]


class PlacementError(RuntimeError):
    """The cluster cannot hold the replica; the message says what was asked and what there is."""


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """What one replica asks of the cluster.

    `bundle_of_rank[r]` is the index of the bundle that rank `r` runs in; `rank_gpus` is 1 or 0.
    """

    bundles: tuple[dict[str, float], ...]
    bundle_of_rank: tuple[int, ...]
    rank_gpus: int
    strategy: Strategy = "PACK"

    def __str__(self) -> str:
        kinds = Counter(show_resources(bundle) for bundle in self.bundles)
        return ", ".join(f"{count} x {{{kind}}}" for kind, count in kinds.items())


@dataclass(frozen=True, slots=True)
class RankPlace:
    """The node of one rank."""

    node_id: str
    address: str
    hostname: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Reserved room for one replica. Picklable; whoever reserved it calls `release`."""

    plan: PlacementPlan
    group: PlacementGroup

    def places(self) -> list[RankPlace]:
        """The node of every rank."""
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        node_of_bundle = ray.util.placement_group_table(self.group)["bundles_to_node_id"]
        ranks = [nodes[node_of_bundle[bundle]] for bundle in self.plan.bundle_of_rank]
        return [
            RankPlace(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"])
            for node in ranks
        ]

    def rank_options(self, rank: int) -> dict[str, Any]:
        """Options for the actor of a rank."""
        bundle = self.plan.bundle_of_rank[rank]
        return {
            "num_cpus": CPU_SHARE,
            "num_gpus": self.plan.rank_gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, bundle),
        }

    def companion_options(self) -> dict[str, Any]:
        """Options for an actor that asks for nothing, lives beside rank 0 and dies with it all."""
        return {
            "num_cpus": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, 0),
        }

    def wait_until_whole(self, timeout_seconds: float) -> None:
        """Wait until all room is there: Ray finds other nodes for what a lost node had.

        It does so once it has given the node up, which takes a minute for one that is cut off.

        Raises:
            PlacementError: there is none within `timeout_seconds`, or the room was given back.
        """
        deadline = time.monotonic() + timeout_seconds
        while (state := self._state()) != "CREATED":
            if state == "REMOVED" or time.monotonic() > deadline:
                raise PlacementError(
                    f"a node was lost and there is no other room for {self.plan} "
                    f"(its placement group is {state}); nodes: {describe_nodes()}"
                )
            time.sleep(_POLL_SECONDS)

    def _state(self) -> str:
        """Ray's word for how far the group is; a bundle on a node that is gone counts as lost."""
        table = ray.util.placement_group_table(self.group)
        nodes = set(table["bundles_to_node_id"].values())
        alive = {node["NodeID"] for node in alive_nodes()}
        if table["state"] == "CREATED" and (nodes - alive or unreachable_nodes(nodes)):
            return "RESCHEDULING"
        state: str = table["state"]
        return state

    def release(self) -> None:
        """Give the room back, killing what still runs in it; calling it again does nothing."""
        remove_placement_group(self.group)


def uses_gpus(config: EngineConfig) -> bool:
    """Whether the ranks need a GPU each; `auto` takes GPUs if the cluster has any."""
    if config.device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) >= 1)
    return config.device == "cuda"


def plan_placement(
    layout: MeshLayout, gpu: bool, largest_node_gpus: int = 0, strategy: Strategy = "PACK"
) -> PlacementPlan:
    """Bundles of one replica.

    Args:
        layout: tensor and pipeline sizes.
        gpu: whether every rank needs a GPU.
        largest_node_gpus: GPUs of the largest node; decides whether a tensor group fits on one.
        strategy: PACK puts stages close together, SPREAD on different nodes where it can.
    """
    split = gpu and 1 <= largest_node_gpus < layout.tensor_size
    if split:
        logger.warning(
            "tensor_parallel_size=%d exceeds the %d GPUs of the largest node: the ranks of a stage "
            "will talk across nodes in every layer",
            layout.tensor_size,
            largest_node_gpus,
        )
    ranks_per_bundle = 1 if split else layout.tensor_size
    bundle = {"CPU": round(CPU_SHARE * ranks_per_bundle, 4)}
    if gpu:
        bundle["GPU"] = float(ranks_per_bundle)
    ranks = range(layout.world_size)
    return PlacementPlan(
        bundles=tuple(dict(bundle) for _ in range(layout.world_size // ranks_per_bundle)),
        bundle_of_rank=tuple(rank // ranks_per_bundle for rank in ranks),
        rank_gpus=int(gpu),
        strategy=strategy,
    )


def plan_in_bundles(
    layout: MeshLayout, gpu: bool, bundles: Sequence[dict[str, float]]
) -> PlacementPlan:
    """The plan of a replica whose bundles somebody else has chosen: one per rank or per stage.

    Raises:
        ValueError: their number fits neither.
    """
    if len(bundles) == layout.world_size:
        bundle_of_rank = tuple(range(layout.world_size))
    elif len(bundles) == layout.pipeline_size:
        bundle_of_rank = tuple(rank // layout.tensor_size for rank in range(layout.world_size))
    else:
        raise ValueError(
            f"placement_group_config.bundles: there are {len(bundles)}; tensor_parallel_size="
            f"{layout.tensor_size} x pipeline_parallel_size={layout.pipeline_size} needs one per "
            f"rank ({layout.world_size}) or one per stage ({layout.pipeline_size})"
        )
    return PlacementPlan(tuple(dict(b) for b in bundles), bundle_of_rank, int(gpu))


def pulse_host(places: Sequence[RankPlace]) -> str:
    """Where processes at these places can reach this one."""
    here = _here()
    if all(place.node_id == here for place in places):
        return LOOPBACK
    address: str = ray.util.get_node_ip_address()
    return address


def largest_node_gpus() -> int:
    """GPUs of the node that has the most."""
    return max((int(node["Resources"].get("GPU", 0)) for node in alive_nodes()), default=0)


def reserve(
    config: EngineConfig,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    strategy: Strategy = "PACK",
) -> Placement:
    """Reserve room for one replica, waiting for the cluster to free it or to grow.

    Nodes that do not answer are passed over, also where Ray has not given them up yet.

    Raises:
        PlacementError: there is no room within `timeout_seconds`.
    """
    gpu = uses_gpus(config)
    layout = MeshLayout(config.tensor_parallel_size, config.pipeline_parallel_size)
    plan = plan_placement(layout, gpu, largest_node_gpus(), strategy)
    group = placement_group(
        [dict(b) for b in plan.bundles],
        strategy=plan.strategy,
        bundle_label_selector=_elsewhere(unreachable_nodes(), len(plan.bundles)),
    )
    if not group.wait(_PATIENCE_SECONDS):
        logger.warning("waiting for the cluster to have room for %s", plan)
        # Ray counts in whole seconds here.
        if not group.wait(max(0, math.ceil(timeout_seconds) - _PATIENCE_SECONDS)):
            message = _no_room(config, plan, timeout_seconds)
            remove_placement_group(group)
            raise PlacementError(message)
    return Placement(plan, group)


def _elsewhere(unreachable: Mapping[str, str], num_bundles: int) -> list[dict[str, str]] | None:
    """Selectors that keep bundles off these nodes, which are addresses by id."""
    if not unreachable:
        return None
    logger.warning("passing over nodes that do not answer: %s", ", ".join(unreachable.values()))
    return [{_NODE_LABEL: f"!in({','.join(unreachable)})"}] * num_bundles


def _no_room(config: EngineConfig, plan: PlacementPlan, waited_seconds: float) -> str:
    free = ray.available_resources()
    hint = "use device='cpu', smaller sizes, or add nodes" if plan.rank_gpus else "add nodes"
    return (
        f"the cluster has no room for tensor_parallel_size={config.tensor_parallel_size} x "
        f"pipeline_parallel_size={config.pipeline_parallel_size} on "
        f"device={'cuda' if plan.rank_gpus else 'cpu'} after {waited_seconds:g} s: asked for "
        f"{plan}, each on one node; nodes: {describe_nodes()}; free in all: "
        f"{show_resources(free) or 'nothing'}; {hint}"
    )


def describe_nodes() -> str:
    """The nodes of the cluster, and what each has in all."""
    nodes = [
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): "
        f"{show_resources(node['Resources']) or 'neither CPU nor GPU'}"
        for node in alive_nodes()
    ]
    return "; ".join(nodes) or "none"


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray says of the nodes that it takes for alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def unreachable_nodes(node_ids: Iterable[str] | None = None) -> dict[str, str]:
    """Nodes that Ray takes for alive, but whose raylet takes no connection from here.

    Ray gives up a node that does not answer only after a minute (`RAY_health_check_*` of the head
    node), and meanwhile places on it what can never start.

    Args:
        node_ids: those that are asked; default: all.

    Returns:
        Address by node id.
    """
    here = _here()
    asked = [
        node
        for node in alive_nodes()
        if node["NodeID"] != here and (node_ids is None or node["NodeID"] in node_ids)
    ]
    if not asked:
        return {}
    with ThreadPoolExecutor(min(len(asked), _MAX_THREADS)) as pool:
        answers = list(pool.map(_answers, asked))
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node, does_answer in zip(asked, answers, strict=True)
        if not does_answer
    }


def _here() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def _answers(node: dict[str, Any]) -> bool:
    address = (node["NodeManagerAddress"], node["NodeManagerPort"])
    try:
        socket.create_connection(address, _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def show_resources(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs of a mapping of resources."""
    kinds = [(name, resources[name]) for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join(f"{name}: {amount:g}" for name, amount in kinds)


def given_gpu(actor: Any) -> Any:
    """Ask an actor which GPU Ray has given it; a reference to what `own_gpu` says there."""
    return actor.__ray_call__.remote(_own_gpu)


def _own_gpu(_: object) -> int | None:
    own = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return own_gpu(own, os.environ.get("CUDA_VISIBLE_DEVICES"))


def own_gpu(own: Sequence[str], visible: str | None) -> int | None:
    """Which of the GPUs that this process sees Ray has given it, as torch counts them.

    Ray shows a rank its own GPU alone, unless it was told not to; then all of the host are seen.

    Args:
        own: Ray's ids of the rank's GPUs.
        visible: `CUDA_VISIBLE_DEVICES`; None: all are.

    Returns:
        Its number, or None for a rank without a GPU.

    Raises:
        ValueError: the rank does not see its GPU.
    """
    if not own:
        return None
    if visible is None and own[0].isdecimal():
        return int(own[0])
    seen = [part.strip() for part in (visible or "").split(",")]
    if own[0] not in seen:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible!r} does not show GPU {own[0]!r}, which the rank has "
            f"from Ray"
        )
    return seen.index(own[0])
