"""The ends of processes: what Ray says of them, in our words, and whether they are gone."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saqqara.cluster.errors import Cause, ControllerLostError, EngineDeadError, WorkerDiedError

from .placement import PlacementError, alive_nodes, unreachable_nodes
from .rank_process import ProcessInfo, end_processes

logger = logging.getLogger(__name__)

_TASK_SECONDS = 30.0  # for Ray to start a process on another node


def cause_of(error: Exception) -> Cause:
    """How a rank was lost, by the error of its call."""
    if isinstance(error, ActorUnavailableError):
        return "unreachable"
    return "failed" if isinstance(error, RayTaskError) else "died"


def one_line(error: BaseException) -> str:
    """Type and first line of an error; the rest is in its log."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def exit_reason(error: Exception) -> str:
    """The part of Ray's message that says how a process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((text for text in lines if "exit detail" in text), lines[-1] if lines else "")
    return line.split(" Some common causes")[0] or type(error).__name__


def engine_error(
    error: RayTaskError | RayActorError, log_file: Path, *, is_silent: bool
) -> Exception:
    """What the failed call of a controller means to whoever uses the engine.

    Args:
        error: of the call.
        log_file: the controller's.
        is_silent: whether the controller was ended because it gave no sign of life.
    """
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, EngineDeadError | PlacementError | ValueError):
            return error.cause
        if isinstance(error.cause, WorkerDiedError):
            return EngineDeadError(str(error.cause))
        return EngineDeadError(
            f"the controller failed: {one_line(error.cause)}; its log: {log_file}"
        )
    what = "has fallen silent" if is_silent else f"has died: {exit_reason(error)}"
    return ControllerLostError(f"the controller {what}; its log: {log_file}")


def end_on_nodes(processes: Iterable[tuple[str, ProcessInfo]], timeout_seconds: float) -> list[int]:
    """Make sure that processes which were told to end have left their nodes; ids of the others.

    An actor outlives `ray.kill` by seconds, and its memory with it. Nodes that are lost or cut off
    are not waited for: what runs there ends itself (see `recovery.pulse`).

    Args:
        processes: each with the id of its node.
        timeout_seconds: how long they are waited for, on each node.
    """
    by_node: defaultdict[str, list[ProcessInfo]] = defaultdict(list)
    for node_id, process in processes:
        by_node[node_id].append(process)
    here = ray.get_runtime_context().get_node_id()
    own = by_node.pop(here, [])
    cut_off = unreachable_nodes(by_node)
    for address in cut_off.values():
        logger.warning("node %s does not answer: its ranks end themselves", address)
    end = ray.remote(end_processes)
    calls = {}
    for node_id in by_node.keys() & ({node["NodeID"] for node in alive_nodes()} - cut_off.keys()):
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        calls[node_id] = end.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(
            by_node[node_id], timeout_seconds
        )
    left = end_processes(own, timeout_seconds)
    for node_id, call in calls.items():
        try:
            left += ray.get(call, timeout=timeout_seconds + _TASK_SECONDS)
        except RayError as error:
            logger.warning("nobody can say what is left on node %s: %s", node_id, error)
    return left
