"""Which ranks and nodes die and when, and how long that keeps a replica from working.

A rank that dies, dies as a process: its GPU is there, and the group is started again in its place.
A node that dies takes its GPUs along until it returns; every GPU is in use, so its replicas wait
for it. GPUs are numbered from 0 on, replica by replica; each node holds whole tensor groups.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saqqara.configs.shown import shown

from .json_lines import check_seconds, objects_in

Cause = Literal["rank", "node"]
_MOST_DRAWN = 100_000
_KEYS = {"seconds", "rank", "node", "back_after_seconds"}


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """A rank or a node dies.

    Attributes:
        seconds: when.
        cause: what dies.
        number: of the GPU or the node.
        back_after_seconds: until a node is there again; of a rank 0.
    """

    seconds: float
    cause: Cause
    number: int
    back_after_seconds: float = 0.0


@dataclass(frozen=True, slots=True, order=True)
class Outage:
    """A replica does not work from `start` until `back`, in seconds."""

    start: float
    back: float
    cause: Cause


@dataclass(frozen=True, slots=True)
class Placement:
    """Where replicas lie; each has `pipeline` groups of `tensor` GPUs."""

    tensor: int
    pipeline: int
    replicas: int
    gpus_per_node: int

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.tensor * self.pipeline * self.replicas

    @property
    def num_nodes(self) -> int:
        """Nodes that have a tensor group on them."""
        return -(-self.pipeline * self.replicas // self._groups_per_node)

    @property
    def _groups_per_node(self) -> int:
        return self.gpus_per_node // self.tensor

    def replica_of(self, rank: int) -> int:
        """The replica of a GPU."""
        return rank // (self.tensor * self.pipeline)

    def replicas_on(self, node: int) -> range:
        """The replicas that have a part on a node."""
        first = node * self._groups_per_node
        last = min(first + self._groups_per_node, self.pipeline * self.replicas) - 1
        return range(first // self.pipeline, last // self.pipeline + 1)


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How often ranks and nodes die, each on average once in so many hours; None: never.

    `node_return_seconds` pass until a node is there again.
    """

    rank_mtbf_hours: float | None = None
    node_mtbf_hours: float | None = None
    node_return_seconds: float = 600.0

    def draw(self, placement: Placement, seconds: float, seed: int) -> list[Fault]:
        """The faults of so many seconds.

        Raises:
            ValueError: they are more than can be simulated.
        """
        rng = np.random.default_rng([seed, 2])
        ranks = _drawn("rank", self.rank_mtbf_hours, placement.num_gpus, seconds, rng)
        nodes = _drawn("node", self.node_mtbf_hours, placement.num_nodes, seconds, rng)
        faults = [Fault(time, "rank", number) for time, number in ranks]
        faults += [Fault(t, "node", number, self.node_return_seconds) for t, number in nodes]
        return sorted(faults)


def outages(
    faults: Iterable[Fault], placement: Placement, detect_seconds: float, restart_seconds: float
) -> list[list[Outage]]:
    """The outages of each replica, in order; a fault during one makes it longer.

    Args:
        faults: in any order.
        placement: of the replicas.
        detect_seconds: until a fault is noticed.
        restart_seconds: until ranks have started, weights and all, once their GPUs are there.
    """
    by_replica: defaultdict[int, list[Outage]] = defaultdict(list)
    for fault in sorted(faults):
        away = max(detect_seconds, fault.back_after_seconds)
        for replica in _hit(fault, placement):
            found = Outage(fault.seconds, fault.seconds + away + restart_seconds, fault.cause)
            known = by_replica[replica]
            if known and known[-1].back >= found.start:
                longer = max(known[-1].back, found.back)
                known[-1] = Outage(known[-1].start, longer, known[-1].cause)
            else:
                known.append(found)
    return [by_replica[replica] for replica in range(placement.replicas)]


def read_faults(path: Path, placement: Placement) -> list[Fault]:
    """Faults from JSON lines of `seconds` and `rank`, or `node` with `back_after_seconds`.

    Raises:
        ValueError: no such file, or a line is wrong; names it.
    """
    rows = objects_in(path, "faults", ["seconds"], _KEYS)
    return [_fault(where, row, placement) for where, row in rows]


def _fault(where: str, row: Mapping[str, Any], placement: Placement) -> Fault:
    if ("rank" in row) == ("node" in row):
        raise ValueError(f"{where} needs seconds, and rank or node")
    cause: Cause = "rank" if "rank" in row else "node"
    if cause == "rank" and "back_after_seconds" in row:
        raise ValueError(f"{where}: back_after_seconds is for nodes; a rank is started again")
    number, most = row[cause], placement.num_gpus if cause == "rank" else placement.num_nodes
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < most:
        raise ValueError(f"{where}: {cause} must be one of 0 to {most - 1}, not {shown(number)}")
    seconds = check_seconds(where, "seconds", row["seconds"])
    back = row.get("back_after_seconds", 0.0)
    return Fault(seconds, cause, number, check_seconds(where, "back_after_seconds", back))


def _hit(fault: Fault, placement: Placement) -> Sequence[int]:
    if fault.cause == "rank":
        return (placement.replica_of(fault.number),)
    return placement.replicas_on(fault.number)


def _drawn(
    what: Cause, mtbf_hours: float | None, number: int, seconds: float, rng: np.random.Generator
) -> list[tuple[float, int]]:
    """Times, and which of so many it is that dies."""
    if mtbf_hours is None:
        return []
    expected = number * seconds / (3600 * mtbf_hours)
    if expected > _MOST_DRAWN:
        raise ValueError(
            f"{what}_mtbf_hours: one death in {mtbf_hours:g} hours is {expected:.3g} deaths while "
            f"requests arrive; at most {_MOST_DRAWN:,} are simulated"
        )
    num_faults = int(rng.poisson(expected))
    times = rng.uniform(0.0, seconds, num_faults).tolist()
    return list(zip(times, rng.integers(0, number, num_faults).tolist(), strict=True))
