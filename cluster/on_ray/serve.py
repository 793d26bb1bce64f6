"""The server on Ray Serve: replicas that own an engine each and answer HTTP.

A replica with one rank runs the worker in its own process; with more, it places them as actors in
the placement group that Serve reserves with it, so a replica starts, moves and ends as a whole.

`build_app` is what `serve run` and `serve deploy` import: `saqqara.cluster.on_ray.serve:build_app`.
"""

import faulthandler
import gc
import logging
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingPolicy, RequestRouterConfig

from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.chat import read_template
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import Executor, LocalExecutor
from saqqara.cluster.engine.model_fit import check_fits, check_fits_if_local
from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.presets import with_profile
from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.cluster.server.app import make_app
from saqqara.cluster.server.generation import Generation
from saqqara.cluster.settings import serve_config, served_engine
from saqqara.compression.retention import Retention
from saqqara.configs.autoscaling import AutoscalingConfig
from saqqara.configs.schema import EngineConfig, ServeConfig
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.models.spec import load_spec

from .executor import RayExecutor
from .metrics import RaySink
from .placement import (
    Placement,
    PlacementPlan,
    largest_node_gpus,
    plan_in_bundles,
    plan_placement,
    uses_gpus,
)
from .router import LOAD, LeastLoadedRouter, LoadPolicy
from .serve_start import ReplicaStartError, one_line_reason

logger = logging.getLogger(__name__)

_ACCELERATOR_SHARE = 0.001  # how Ray asks for a node that has an accelerator of this type
_STDERR = 2  # Serve puts an object without a file in the place of sys.stderr
_SWITCH_SECONDS = 0.0005  # what the event loop may have to wait for the thread of the engine
# Serve counts requests whose bodies are still on their way, and holds back those beyond this: then
# slow clients would block `/health`. What the engine takes on is bounded by the admission queue.
_MAX_ONGOING_REQUESTS = 100_000
_LOAD_SECONDS = 1.0  # between two times that routers hear of a replica's load
_DRAIN_POLL_SECONDS = 0.2  # of Serve, for the requests of a replica that is to end


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What Serve starts for one replica: its settings, its actor, and its room for ranks.

    `placement` is None where the worker runs in the replica's process; `chat_template` is the text
    of the file that the settings name.
    """

    config: ServeConfig
    engine: EngineConfig
    keys: ApiKeys
    actor_options: dict[str, Any]
    placement: PlacementPlan | None
    chat_template: str | None = None


@serve.ingress()
class Replica:
    """One engine and its HTTP API; what `serve.deployment` runs."""

    def __init__(self, plan: ReplicaPlan) -> None:
        # Serve starts a process for each replica and calls nothing before this constructor.
        sys.setswitchinterval(_SWITCH_SECONDS)
        show_stacks_when_asked()
        self._plan = plan
        try:
            self._store = open_store(plan.config)
            self._generation = _start(plan)
            # What is there now stays: without it, each full collection would halt all for a second.
            gc.collect()
            gc.freeze()
        except Exception as error:
            logger.exception("the replica cannot start")
            raise ReplicaStartError(one_line_reason(error)) from None

    def __serve_build_asgi_app__(self) -> Any:
        """The HTTP application, as Serve asks for it."""
        config = self._plan.config
        return make_app(
            self._generation,
            self._plan.keys,
            config.allowed_origins,
            self._store,
            ui=config.ui,
            allowed_hosts=config.allowed_hosts,
        )

    async def check_health(self) -> None:
        """Raise if the engine has failed, upon which Serve starts another replica."""
        self._generation.engine.check()

    async def drain(self, timeout_seconds: float) -> int:
        """Take nothing more and wait for what runs; returns how many requests are left."""
        self._generation.admission.close()
        await self._generation.admission.wait_idle(timeout_seconds)
        return self._generation.admission.num_requests

    def record_routing_stats(self) -> dict[str, float]:
        """What Serve tells its routers of this replica."""
        return {LOAD: self.load}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve tells the rule for the number of replicas."""
        return {LOAD: self.load}

    @property
    def load(self) -> float:
        """Sequences, also waiting ones, by slots, or the share of pages in use if that is more."""
        stats = self._generation.live_stats()
        num_sequences = stats.queue.running + stats.queue.waiting
        return max(num_sequences / self._generation.max_num_seqs, stats.kv_cache.usage)

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
    engine = checked_engine(config)
    plan = plan_replica(config, engine, ApiKeys.load(config.api_key_file))
    return planned_application(plan)


def checked_engine(config: ServeConfig) -> EngineConfig:
    """The engine's settings; what can be checked here is not left to every replica.

    Raises:
        ValueError: a setting is wrong; names the field.
    """
    engine = served_engine(config)
    Retention.parse(engine.retention, engine.budget)
    return engine


def planned_application(plan: ReplicaPlan) -> serve.Application:
    """A Serve application of replicas as planned."""
    config = plan.config
    given = config.deployment_config
    options: dict[str, Any] = {
        "ray_actor_options": plan.actor_options,
        "max_ongoing_requests": given.max_ongoing_requests or _MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": given.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_SECONDS,
        "health_check_period_s": given.health_check_period_s,
        "health_check_timeout_s": given.health_check_timeout_s,
        "max_surge_percent": given.max_surge_percent,
    }
    scaling = given.autoscaling_config
    if scaling is None:
        options["num_replicas"] = given.num_replicas
    else:
        options["autoscaling_config"] = _autoscaling(scaling)
    options["request_router_config"] = RequestRouterConfig(
        request_router_class=LeastLoadedRouter,
        # Without a replica a request must wait for the one that it starts.
        request_router_kwargs={"waits": scaling is not None and scaling.min_replicas == 0},
        request_routing_stats_period_s=_LOAD_SECONDS,
    )
    if plan.placement is not None:
        options["placement_group_bundles"] = [dict(b) for b in plan.placement.bundles]
        strategy = config.placement_group_config
        options["placement_group_strategy"] = "PACK" if strategy is None else strategy.strategy
    deployment = serve.deployment(Replica, name="engine")
    return deployment.options(**options).bind(plan)


def _autoscaling(scaling: AutoscalingConfig) -> dict[str, Any]:
    """What Serve is told: its own fields, and our rule unless another one was given."""
    told = scaling.for_serve()
    if scaling.follows_load:
        told["policy"] = AutoscalingPolicy(
            policy_function=LoadPolicy, policy_kwargs={"target_load": scaling.target_load}
        )
    return told


def plan_replica(config: ServeConfig, engine: EngineConfig, keys: ApiKeys) -> ReplicaPlan:
    """What one replica asks of the cluster; Ray must be connected where `device` is `auto`.

    Raises:
        ValueError: `placement_group_config` does not fit the engine, or the engine not the model.
    """
    check_fits_if_local(engine)
    template = None if config.chat_template is None else read_template(config.chat_template)
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
        return ReplicaPlan(config, engine, keys, actor, None, template)
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
    return ReplicaPlan(config, engine, keys, actor, placement, template)


def _start(plan: ReplicaPlan) -> Generation:
    """The engine of a replica, ready for requests."""
    tokenizer = plan.engine.tokenizer or plan.engine.model
    name = plan.config.model_loading_config.model_id
    spec = load_spec(plan.engine.model)  # first, since it says best what is wrong with a folder
    check_fits(plan.engine, spec)
    config = with_profile(plan.engine)
    engine = Engine(
        config,
        _executor(replace(plan, engine=config)),
        Tokenizer.load(tokenizer, plan.chat_template),
        spec,
        sinks=[RaySink(name)],
        model_name=name,
        replica_id=serve.get_replica_context().replica_id.unique_id,
    )
    return Generation(plan.config, config, engine, Tokenizer.load(tokenizer, plan.chat_template))


def open_store(config: ServeConfig) -> Store | None:
    """The files and batches of a server, if it is to have any.

    Raises:
        ValueError: the folder cannot be used.
    """
    return None if config.batch_dir is None else Store(Path(config.batch_dir), config.batches)


def _executor(plan: ReplicaPlan) -> Executor:
    """The worker in this process, or ranks in the replica's placement group."""
    if plan.placement is None:
        # Ray tells OpenMP to use as many threads as the actor has CPUs, which only counts for it.
        threads = plan.engine.num_threads or usable_cores()
        return LocalExecutor(plan.engine.model_copy(update={"num_threads": threads}))
    group = ray.util.get_current_placement_group()
    assert group is not None, "Serve reserves a placement group for replicas with several ranks"
    return RayExecutor(plan.engine, placement=Placement(plan.placement, group))


def show_stacks_when_asked() -> None:
    """Have SIGUSR1 write the stack of every thread to stderr, which shows what a process does."""
    faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)
