"""What `saqqara serve` runs: a server from its start until it is asked to end."""

import logging
import os
import signal
from collections import Counter
from collections.abc import Mapping

import psutil
import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.cluster.server.ports import LOOPBACK, Binding
from saqqara.cluster.server.stop_signals import StopSignals
from saqqara.configs.schema import EngineConfig, ServeConfig

from .controller import connect
from .placement import PlacementError
from .serve import (
    ReplicaPlan,
    checked_engine,
    plan_replica,
    planned_application,
    show_stacks_when_asked,
)
from .serve_cluster import (
    Place,
    applications,
    enter_serve,
    leave_serve,
    route_taken,
    starts_own_ray,
)
from .serve_start import wait_until_running

logger = logging.getLogger(__name__)

# A piece of a stream on its way through the proxy costs a third of what it does by object
# references and with a second event loop. The replica has its gRPC port in any case.
PROXY_SETTINGS = {"RAY_SERVE_PROXY_USE_GRPC": "1", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
_RAY_SETTINGS = PROXY_SETTINGS | {  # for a Ray that the server starts itself
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs more than Serve's 5
    "RAY_worker_niceness": "0",  # Ray runs workers as background jobs, which a server is not
}
_ANSWER_SECONDS = 30.0  # for a replica to say that it has drained
_KILL_SECONDS = 3.0  # for processes that were told to end


def run_server(
    config: ServeConfig, asked: Binding, signals: StopSignals, *, drain_seconds: float
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs and end.

    Ray is that of `RAY_ADDRESS`, or a local one that ends with the server. A signal that comes
    while the server starts, or waits for room, ends it there.

    Args:
        config: the server's settings.
        asked: where to listen.
        signals: taken since before this was imported.
        drain_seconds: how long running requests may take after the signal.

    Raises:
        ValueError: a setting is wrong; names the field.
        PortInUseError: somebody listens on the port that the cluster's Serve is to have.
        PlacementError: the server's own Ray is too small.
        ReplicaStartError: the replicas did not start; says why.
        RuntimeError: another application has the route.
    """
    engine, keys = checked_engine(config), ApiKeys.load(config.api_key_file)
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    show_stacks_when_asked()
    _Server(config, engine, keys, asked, signals, starts_own_ray()).run(drain_seconds)


class _Server:
    """One run of a server; ends what it has started, however far it came."""

    def __init__(
        self,
        config: ServeConfig,
        engine: EngineConfig,
        keys: ApiKeys,
        asked: Binding,
        signals: StopSignals,
        owns_ray: bool,
    ) -> None:
        self._config = config
        self._engine = engine
        self._keys = keys
        self._asked = asked
        self._signals = signals
        self._owns_ray = owns_ray
        self._app_name: str | None = None

    def run(self, drain_seconds: float) -> None:
        try:
            try:
                with self._signals.interrupting():
                    handle = self._start()
            except SystemExit as end:
                # `ray.init` puts a handler of its own in our place, which exits with the signal.
                if not self._signals.came and end.code != signal.SIGTERM:
                    raise
                logger.info("asked to end before the server was ready")
                return
            self._signals.wait()
            logger.info("finishing what runs, taking nothing more")
            if left := drain(handle, drain_seconds):
                logger.warning("%d requests were cut off after %g s", left, drain_seconds)
        finally:
            self._end()

    def _start(self) -> DeploymentHandle:
        connect()
        self._signals.install()
        self._signals.check()
        plan = plan_replica(self._config, self._engine, self._keys)
        if self._owns_ray:
            check_room(plan, self._config.deployment_config.most_replicas)
        place = enter_serve(self._asked, owns_ray=self._owns_ray)
        if place.host != LOOPBACK and not self._keys:
            logger.warning(
                "anybody who reaches %s may use this server: it has no API keys", place.host
            )
        self._app_name = place.app_name
        handle = self._deploy(place, plan)
        num_replicas = self._config.deployment_config.first_replicas
        wait_until_running(place, total_of(plan), num_replicas)
        model = self._config.model_loading_config.model_id
        logger.info("serving %s at %s/v1", model, place.url)
        return handle

    def _deploy(self, place: Place, plan: ReplicaPlan) -> DeploymentHandle:
        app = serve.RunTarget(
            planned_application(plan), name=place.app_name, route_prefix=place.route_prefix
        )
        try:
            [handle] = serve.run_many([app], wait_for_applications_running=False)
        except RayServeException as error:  # somebody was faster
            for name, details in applications().items():
                if details.get("route_prefix") == place.route_prefix and name != place.app_name:
                    raise route_taken(place, name) from None
            raise RuntimeError(f"Serve does not take the application: {error}") from error
        return handle

    def _end(self) -> None:
        if self._owns_ray:
            _end_own_ray()
        elif ray.is_initialized():
            if self._app_name is not None:
                leave_serve(self._app_name)
            ray.shutdown()


def check_room(plan: ReplicaPlan, num_replicas: int) -> None:
    """Raise if a Ray of this machine alone can never hold the replicas.

    Raises:
        PlacementError: what is asked for, and what there is.
    """
    there = ray.cluster_resources()
    asked = {name: amount * num_replicas for name, amount in total_of(plan).items()}
    if missing := [name for name, amount in asked.items() if amount > there.get(name, 0)]:
        has = {name: there.get(name, 0) for name in missing}
        raise PlacementError(
            f"this machine has no room for num_replicas={num_replicas}: asked for "
            f"{_show_all(asked)}; there is {_show_all(has)}"
        )


def total_of(plan: ReplicaPlan) -> dict[str, float]:
    """What one replica and its ranks ask for, by resource."""
    total: Counter[str] = Counter()
    if plan.placement is not None:
        for bundle in plan.placement.bundles:
            total.update(bundle)
        return dict(total)
    options = plan.actor_options
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    total.update({name: options[option] for name, option in names.items() if options.get(option)})
    total.update(options.get("resources") or {})
    return dict(total)


def _show_all(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {amount:g}" for name, amount in resources.items())


def drain(handle: DeploymentHandle, timeout_seconds: float) -> int:
    """Have every replica take nothing more and finish; returns how many requests are left.

    A replica that is gone or does not answer has nothing that could be waited for, and the others
    are waited for all the same.
    """
    try:
        answers: list[int | Exception] = handle.broadcast("drain", timeout_seconds).results(
            timeout_s=timeout_seconds + _ANSWER_SECONDS, return_exceptions=True
        )
    except (DeploymentUnavailableError, TimeoutError) as error:
        answers = [error]
    left = 0
    for answer in answers:
        if isinstance(answer, Exception):
            logger.warning("a replica could not finish: %s: %s", type(answer).__name__, answer)
        else:
            left += answer
    return left


def _end_own_ray() -> None:
    """End the Ray of this process, also if it was interrupted while it started.

    Serve is not asked to shut down before: it has drained, and takes seconds for it.
    """
    children = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(children, timeout=_KILL_SECONDS)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=_KILL_SECONDS)
