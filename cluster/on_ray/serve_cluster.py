"""The Serve that a server lives in: one of its own, or that of a cluster where others live, too.

On a cluster where Serve runs, its host and port are given, and every application but our own is
somebody else's: never replaced, never ended.
"""

import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client as serve_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saqqara.cluster.server.ports import DEFAULT_PORT, LOOPBACK, Binding, PortInUseError, check_port

logger = logging.getLogger(__name__)

_GOING = ("DELETING", "NOT_STARTED")  # what has, or will have, no route
_DELETE_SECONDS, _DELETE_POLL_SECONDS = 10.0, 0.1
_HEAD = "node:__internal_head__"  # a resource that Ray gives the head node alone


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is."""

    host: str
    port: int
    route_prefix: str
    app_name: str

    @property
    def url(self) -> str:
        """The base that the paths of the API follow."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


def starts_own_ray() -> bool:
    """Whether `controller.connect` will start a Ray for this process alone."""
    return not (ray.is_initialized() or os.environ.get("RAY_ADDRESS"))


def enter_serve(asked: Binding, *, owns_ray: bool) -> Place:
    """Start Serve, or join the one that runs; Ray must be connected.

    Raises:
        PortInUseError: Serve is to be started, and the port of the head node is taken.
        RuntimeError: another application has the route.
    """
    app_name = asked.app_name
    if not owns_ray:  # nobody else has this name, also if two servers come at the same moment
        app_name = f"{app_name}-{uuid.uuid4().hex[:8]}"
    client = serve_client(raise_if_no_controller_running=False)
    joins = client is not None
    if not joins:
        host, port = asked.host or LOOPBACK, DEFAULT_PORT if asked.port is None else asked.port
        if not owns_ray:
            _check_port_of_head(host, port)
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        client = serve_client()
    http = client.http_config  # another server may have started Serve a moment before us
    place = Place(http.host, http.port, asked.route_prefix, app_name)
    if joins:
        logger.info("Serve runs on this cluster and listens on %s:%d", http.host, http.port)
    for name, wanted, given in (("host", asked.host, http.host), ("port", asked.port, http.port)):
        if wanted is not None and wanted != given:
            logger.warning(
                "%s=%s has no effect: the Serve of this cluster has %s", name, wanted, given
            )
    _check_route(place)
    return place


def applications() -> Mapping[str, Any]:
    """Serve's details of every application, by name."""
    client = serve_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    found: Mapping[str, Any] = client.get_serve_details()["applications"]
    return found


def route_taken(place: Place, owner: str) -> RuntimeError:
    """The error for a route that another application has."""
    return RuntimeError(
        f"the application {owner!r} has the route {place.route_prefix} of this cluster's Serve: "
        f"choose another one with --route-prefix, such as --route-prefix /{place.app_name}"
    )


def leave_serve(app_name: str) -> None:
    """End our application, whatever state it is in, and nothing else.

    What it still runs is cut off: a server drains before, and one that starts has nothing. Serve
    gives up a replica that waits for room as slowly as one that finishes requests, so after
    `_DELETE_SECONDS` it is left to do the rest by itself.
    """
    if app_name not in applications():
        return
    serve.delete(app_name, _blocking=False)
    prefix = f"SERVE_REPLICA::{app_name}#"
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(prefix):
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
            except ValueError:  # it has ended meanwhile
                continue
    deadline = time.monotonic() + _DELETE_SECONDS
    while app_name in applications():
        if time.monotonic() > deadline:
            logger.info("Serve goes on deleting the application %s by itself", app_name)
            return
        time.sleep(_DELETE_POLL_SECONDS)


def _check_route(place: Place) -> None:
    for name, details in applications().items():
        if details["status"] not in _GOING and details.get("route_prefix") == place.route_prefix:
            raise route_taken(place, name)


def _check_port_of_head(host: str, port: int) -> None:
    """Raise what `check_port` raises there: Serve's proxy runs on the head node.

    Only that node can tell. Serve itself would share the port with whoever has it.
    """
    heads = [n for n in ray.nodes() if n["Alive"] and _HEAD in n["Resources"]]
    if not heads:
        return
    here = NodeAffinitySchedulingStrategy(heads[0]["NodeID"], soft=False)
    check = ray.remote(_why_not_to_be_had).options(num_cpus=0, scheduling_strategy=here)
    in_use, reason = ray.get(check.remote(host, port))
    if reason is not None:
        error = PortInUseError if in_use else RuntimeError
        raise error(f"{reason} (on the cluster's head node)")


def _why_not_to_be_had(host: str, port: int) -> tuple[bool, str | None]:
    try:
        check_port(host, port)
    except RuntimeError as error:
        return isinstance(error, PortInUseError), str(error)
    return False, None
