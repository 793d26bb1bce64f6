"""The server on Ray Serve: replicas that own an engine each and answer HTTP.

A replica with one rank runs the worker in its own process; with more, it places them as actors in
the placement group that Serve reserves with it, so a replica starts, moves and ends as a whole.

`build_app` is what `serve run` and `serve deploy` import: `saqqara.cluster.serve:build_app`.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig, ServeConfig
from saqqara.workers.layout import MeshLayout
from saqqara.workers.models.spec import load_spec

from .api_keys import KEYS_VARIABLE, ApiKeys
from .controller import connect
from .engine import Engine, Executor, LocalExecutor
from .executor import RayExecutor
from .generation import Generation
from .http_app import make_app
from .model_fit import check_fits, check_fits_if_local
from .placement import (
    Placement,
    PlacementPlan,
    largest_node_gpus,
    plan_in_bundles,
    plan_placement,
    uses_gpus,
)
from .rank_process import usable_cores
from .ray_metrics import RaySink
from .report import EngineReport
from .serve_router import RefusingRouter
from .settings import serve_config, served_engine
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

APP_NAME = "saqqara"
LOOPBACK = "127.0.0.1"
_ACCELERATOR_SHARE = 0.001  # how Ray asks for a node that has an accelerator of this type
_RAY_SETTINGS = {  # for a Ray that the server starts itself
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs more than Serve's 5
    "RAY_worker_niceness": "0",  # Ray runs workers as background jobs, which a server is not
}
_STDERR = 2  # Serve puts an object without a file in the place of sys.stderr
_SWITCH_SECONDS = 0.0005  # what the event loop may have to wait for the thread of the engine
_ANSWER_SECONDS = 30.0  # for a replica to say that it has drained
_SPARE_REQUESTS = 64  # beyond the queue, so that a full one is answered and not waited for


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What Serve starts for one replica: its settings, its actor, and its room for ranks.

    `placement` is None where the worker runs in the replica's process.
    """

    config: ServeConfig
    engine: EngineConfig
    keys: ApiKeys
    actor_options: dict[str, Any]
    placement: PlacementPlan | None


@serve.ingress()
class Replica:
    """One engine and its HTTP API; what `serve.deployment` runs."""

    def __init__(self, plan: ReplicaPlan) -> None:
        sys.setswitchinterval(_SWITCH_SECONDS)
        _show_stacks_when_asked()
        config = plan.engine
        tokenizer = config.tokenizer or config.model
        name = plan.config.model_loading_config.model_id
        spec = load_spec(config.model)  # first, since it says best what is wrong with a folder
        check_fits(config, spec)
        engine = Engine(
            config,
            _executor(plan),
            Tokenizer.load(tokenizer),
            spec,
            sinks=[RaySink(name)],
            model_name=name,
        )
        self._keys = plan.keys
        self._generation = Generation(plan.config, config, engine, Tokenizer.load(tokenizer))

    def __serve_build_asgi_app__(self) -> Any:
        """The HTTP application, as Serve asks for it."""
        return make_app(self._generation, self._keys)

    async def check_health(self) -> None:
        """Raise if the engine has failed, upon which Serve starts another replica."""
        self._generation.engine.check()

    async def drain(self, timeout_seconds: float) -> int:
        """Take nothing more and wait for what runs; returns how many requests are left."""
        self._generation.admission.close()
        await self._generation.admission.wait_idle(timeout_seconds)
        return self._generation.admission.num_requests

    async def report(self) -> EngineReport:
        """The engine's measurements."""
        return await self._generation.engine.report()


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """A Serve application from the fields of `ServeConfig`, as they stand in a Serve YAML file.

    API keys are read here, once, from `api_key_file` and `SAQQARA_API_KEYS`; replicas get hashes.

    Raises:
        ValueError: a field is wrong; names it.
    """
    return application(serve_config(args))


def application(config: ServeConfig) -> serve.Application:
    """A Serve application: `deployment_config.num_replicas` replicas of the engine.

    Raises:
        ValueError: a setting is wrong; names the field.
    """
    engine = served_engine(config)
    Retention.parse(
        engine.retention, engine.budget
    )  # rather than in every replica, again and again
    plan = plan_replica(config, engine, ApiKeys.load(config.api_key_file))
    given = config.deployment_config
    options: dict[str, Any] = {
        "ray_actor_options": plan.actor_options,
        "max_ongoing_requests": given.max_ongoing_requests
        or plan.engine.max_num_seqs + config.limits.max_queue + _SPARE_REQUESTS,
        "graceful_shutdown_timeout_s": given.graceful_shutdown_timeout_s,
        "health_check_period_s": given.health_check_period_s,
        "health_check_timeout_s": given.health_check_timeout_s,
    }
    if given.autoscaling_config is None:
        options["num_replicas"] = given.num_replicas
    else:
        options["autoscaling_config"] = given.autoscaling_config
    if (given.autoscaling_config or {}).get("min_replicas") != 0:  # there, a request must wait
        options["request_router_config"] = RequestRouterConfig(request_router_class=RefusingRouter)
    if plan.placement is not None:
        options["placement_group_bundles"] = [dict(b) for b in plan.placement.bundles]
        strategy = config.placement_group_config
        options["placement_group_strategy"] = "PACK" if strategy is None else strategy.strategy
    deployment = serve.deployment(Replica, name="engine")
    return deployment.options(**options).bind(plan)


def plan_replica(config: ServeConfig, engine: EngineConfig, keys: ApiKeys) -> ReplicaPlan:
    """What one replica asks of the cluster; Ray must be connected where `device` is `auto`.

    Raises:
        ValueError: `placement_group_config` does not fit the engine, or the engine not the model.
    """
    check_fits_if_local(engine)
    gpu = uses_gpus(engine)
    actor = dict(config.deployment_config.ray_actor_options)
    if engine.executor == "local":
        if config.placement_group_config is not None:
            raise ValueError(
                "placement_group_config: an engine of one rank runs in its replica and needs none; "
                "use deployment_config.ray_actor_options"
            )
        actor.setdefault("num_cpus", 1)
        if gpu:
            actor.setdefault("num_gpus", 1)
        if config.accelerator_type is not None:
            actor.setdefault("accelerator_type", config.accelerator_type)
        return ReplicaPlan(config, engine, keys, actor, None)
    layout = MeshLayout(engine.tensor_parallel_size, engine.pipeline_parallel_size)
    if config.placement_group_config is not None:
        bundles = config.placement_group_config.bundles
        placement = plan_in_bundles(layout, gpu, bundles)
        actor.setdefault("num_cpus", 0)  # the bundles are sized for the ranks
    else:
        placement = plan_placement(layout, gpu, largest_node_gpus() if gpu else 0)
        actor.setdefault("num_cpus", 1)
        first, *others = placement.bundles
        first = {**first, "CPU": first["CPU"] + actor["num_cpus"]}
        placement = replace(placement, bundles=(first, *others))
    if config.accelerator_type is not None:
        node = {f"accelerator_type:{config.accelerator_type}": _ACCELERATOR_SHARE}
        placement = replace(placement, bundles=tuple({**b, **node} for b in placement.bundles))
    return ReplicaPlan(config, engine, keys, actor, placement)


def _executor(plan: ReplicaPlan) -> Executor:
    """The worker in this process, or ranks in the replica's placement group."""
    if plan.placement is None:
        # Ray tells OpenMP to use as many threads as the actor has CPUs, which only counts for it.
        threads = plan.engine.num_threads or usable_cores()
        return LocalExecutor(plan.engine.model_copy(update={"num_threads": threads}))
    group = ray.util.get_current_placement_group()
    assert group is not None, "Serve reserves a placement group for replicas with several ranks"
    return RayExecutor(plan.engine, placement=Placement(plan.placement, group))


def run_server(config: ServeConfig, host: str, port: int, *, drain_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs and end.

    Ray is that of `RAY_ADDRESS`, or a local one that ends with the server.

    Args:
        config: the server's settings.
        host: address to bind to.
        port: port to bind to; 0 takes a free one.
        drain_seconds: how long running requests may take after the signal.

    Raises:
        ValueError: a setting is wrong; names the field.
        RuntimeError: the replicas did not start.
    """
    port = port or free_port(host)
    if host != LOOPBACK and not (config.api_key_file or os.environ.get(KEYS_VARIABLE)):
        logger.warning("anybody who reaches %s may use this server: it has no API keys", host)
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    _show_stacks_when_asked()
    owns_ray = connect()
    signals: SimpleQueue[int] = SimpleQueue()  # an Event could be set while its own lock is held
    previous = {
        number: signal.signal(number, lambda number, _: signals.put(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        handle = start(config, host, port)
        logger.info(
            "serving %s at http://%s:%d/v1", config.model_loading_config.model_id, host, port
        )
        signals.get()
        logger.info("finishing what runs, taking nothing more")
        left = drain(handle, drain_seconds)
        if left:
            logger.warning("%d requests were cut off after %g s", left, drain_seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if owns_ray:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete(APP_NAME)


def _show_stacks_when_asked() -> None:
    """Have SIGUSR1 write the stack of every thread to stderr, which shows what a process does."""
    faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)


def start(config: ServeConfig, host: str, port: int, name: str = APP_NAME) -> DeploymentHandle:
    """Start the server on the Ray that is connected, and wait until its replicas are ready.

    Raises:
        ValueError: a setting is wrong; names the field.
        RuntimeError: the replicas did not start.
    """
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    handle: DeploymentHandle = serve.run(application(config), name=name, route_prefix="/")
    return handle


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


def free_port(host: str = LOOPBACK) -> int:
    """A port that was free a moment ago: Serve does not tell which one it takes for 0."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
    return port
