"""Waiting for an application of Serve to run: what it waits for, and why it cannot start."""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from saqqara.cluster.errors import WorkerDiedError

from .placement import PlacementError, describe_nodes, show_resources
from .serve_cluster import Place, applications

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_LOG_SECONDS = 5.0  # between lines that say what is waited for, at first
_MAX_LOG_SECONDS = 60.0
_START_FAILED = re.compile(r"ReplicaStartError: (.+)")
_RAISED = re.compile(
    r"^(?:\w+\.)*(\w+(?:Error|Exception|Interrupt|Exit))(?:: (.*))?$", re.MULTILINE
)
_SERVES_OWN_WORDS = re.compile(r"^.*?Error:\n", re.DOTALL)


class ReplicaStartError(RuntimeError):
    """A replica cannot start; the message, in one line, says why."""


def wait_until_running(place: Place, requested: Mapping[str, float], num_replicas: int) -> None:
    """Wait until the application runs, saying from time to time what it waits for.

    Args:
        place: where the application is.
        requested: what one replica asks of the cluster.
        num_replicas: how many were asked for.

    Raises:
        ReplicaStartError: it cannot start; Serve would try again, with the same outcome.
    """
    started = time.monotonic()
    next_line, pause = _LOG_SECONDS, _LOG_SECONDS
    while True:
        application = applications().get(place.app_name)
        if application is None:
            raise ReplicaStartError(f"the application {place.app_name!r} was deleted")
        if application["status"] == "RUNNING":
            return
        if (why := failure(application)) is not None:
            raise ReplicaStartError(why)
        seconds = time.monotonic() - started
        if seconds >= next_line:
            logger.info("%s (%.0f s)", _waits_for(application, requested, num_replicas), seconds)
            pause = min(2 * pause, _MAX_LOG_SECONDS)
            next_line = seconds + pause
        time.sleep(_POLL_SECONDS)


def failure(application: Mapping[str, Any]) -> str | None:
    """Why an application cannot start, from Serve's details of it; None: it still may."""
    for deployment in application["deployments"].values():
        message = deployment.get("message", "")
        if "Error:\n" in message or deployment.get("status") in ("UNHEALTHY", "DEPLOY_FAILED"):
            return reason_of(message)
    if application["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
        return reason_of(application.get("message", ""))
    return None


def reason_of(message: str) -> str:
    """The error within a message of Serve's, in one line."""
    if found := _START_FAILED.findall(message):
        return str(found[-1]).strip()
    if raised := _RAISED.findall(message):
        kind, text = raised[-1]
        return f"{kind}: {text}" if text else str(kind)
    lines = _SERVES_OWN_WORDS.sub("", message, count=1).split("\n")
    return " ".join(line.strip() for line in lines if line.strip()) or "Serve does not say why"


def one_line_reason(error: Exception) -> str:
    """What an error says to whoever starts a server; its trace is in the replica's log."""
    text = " ".join(str(error).split())
    if text and isinstance(error, ValueError | OSError | PlacementError | WorkerDiedError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _waits_for(
    application: Mapping[str, Any], requested: Mapping[str, float], num_replicas: int
) -> str:
    replicas = list(_replicas(application))
    placed = [replica for replica in replicas if replica.get("pid") is not None]
    ready = [replica for replica in placed if replica.get("state") == "RUNNING"]
    if len(placed) < num_replicas and not _has_room(requested):
        return (
            f"waiting for the cluster to have room for replica {len(placed) + 1} of "
            f"{num_replicas}: it asks for {show_resources(requested)}; free in all: "
            f"{show_resources(ray.available_resources()) or 'nothing'}; nodes: {describe_nodes()}"
        )
    return f"starting: {len(ready)} of {num_replicas} replicas are ready"


def _replicas(application: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for deployment in application["deployments"].values():
        yield from deployment["replicas"]


def _has_room(requested: Mapping[str, float]) -> bool:
    free = ray.available_resources()
    return all(free.get(name, 0) >= amount for name, amount in requested.items())
