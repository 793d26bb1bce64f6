"""An engine on a Ray cluster: the actor that owns it, and the client that speaks to the actor.

The controller schedules and keeps the queue; its ranks are actors beside it. It lives in its
replica's placement group, so removing the group ends everything, however it got there.
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from saqqara.cluster.engine.client import EngineDescription, LocalClient, Rejection
from saqqara.cluster.engine.model_fit import check_fits, check_fits_if_local
from saqqara.cluster.engine.report import BatchRows, EngineReport
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.presets import with_profile
from saqqara.cluster.recovery.pulse import Pulse, PulseAddress, PulseMonitor
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import load_spec

from .executor import RayExecutor
from .exits import end_on_nodes, engine_error, exit_reason
from .group import PROGRESS_SECONDS
from .metrics import RaySink
from .placement import (
    DEFAULT_TIMEOUT_SECONDS,
    Placement,
    Strategy,
    pulse_host,
    reserve,
)
from .rank_process import ProcessInfo, WorkerFactory, log_process_to, new_log_dir, this_process

logger = logging.getLogger(__name__)

CONTROLLER_LOG = "controller.log"
OBJECT_STORE_BYTES = 128 * 2**20  # plans and results are small and travel inside the calls
_CONCURRENT_CALLS = 16  # a waiting poll must not hold up submit, abort or report
_SHUTDOWN_SECONDS = 120.0
_GONE_SECONDS = 30.0  # for processes that were killed


def connect(address: str | None = None, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> bool:
    """Connect to Ray: the cluster at `address`, else that of `RAY_ADDRESS`, else a local one.

    Inside a Ray job `RAY_ADDRESS` is set. A local one has an object store of `object_store_bytes`
    and no dashboard.

    Returns:
        Whether a local Ray was started, which the caller then ends with `ray.shutdown()`.
    """
    if ray.is_initialized():
        return False
    # Ray says that a future version will leave CUDA_VISIBLE_DEVICES alone for actors without GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _own_sigterm_handler():
        if address is not None or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, log_to_driver=False)
            return False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray runs workers as background jobs, which ranks are not.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        return True


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keep our own handler of SIGTERM, if there is one: `ray.init` puts its in its place."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        own = callable(handler) and threading.current_thread() is threading.main_thread()
        if own:
            signal.signal(signal.SIGTERM, handler)


def start_controller(
    config: EngineConfig,
    *,
    metrics_host: str = "127.0.0.1",
    make_worker: WorkerFactory | None = None,
    placement_timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    strategy: Strategy = "PACK",
) -> "ControllerClient":
    """Start an engine on Ray and wait until it can take requests; connects to Ray if need be.

    Args:
        config: the engine's settings.
        metrics_host: address that /metrics is served on, if `config.metrics_port` is set.
        make_worker: makes a rank's worker; default: `saqqara.workers.worker.Worker`.
        placement_timeout_seconds: how long to wait for the cluster to have room.
        strategy: whether the stages are put on few nodes or on many.

    Raises:
        PlacementError: the cluster has no room.
        ValueError: a setting that the model or a machine cannot meet.
        EngineDeadError: a rank or the controller did not start.
    """
    check_fits_if_local(config)
    started_ray = connect()
    log_dir = new_log_dir(config)
    try:
        placement = reserve(config, placement_timeout_seconds, strategy)
        try:
            return _start(config, placement, log_dir, metrics_host, make_worker, started_ray)
        except BaseException:
            placement.release()
            raise
    except BaseException:
        if started_ray:
            ray.shutdown()
        raise


def _start(
    config: EngineConfig,
    placement: Placement,
    log_dir: Path,
    metrics_host: str,
    make_worker: WorkerFactory | None,
    started_ray: bool,
) -> "ControllerClient":
    actor_class = ray.remote(Controller).options(
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=_CONCURRENT_CALLS,
        **placement.companion_options(),
    )
    actor = actor_class.remote(config, placement, str(log_dir), metrics_host, make_worker)
    try:
        return ControllerClient(actor, placement, log_dir / CONTROLLER_LOG, started_ray)
    except BaseException:
        ray.kill(actor, no_restart=True)
        raise


class Controller:
    """The actor: an engine over a `RayExecutor`, stepped by a thread of the actor.

    Its methods are those of `EngineClient`; `start` comes first.
    """

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        log_dir: str,
        metrics_host: str,
        make_worker: WorkerFactory | None,
    ) -> None:
        self._started = time.monotonic()
        self._config = config
        self._placement = placement
        self._log_dir = log_dir
        self._metrics_host = metrics_host
        self._make_worker = make_worker
        self._executor: RayExecutor | None = None
        self._client: LocalClient | None = None
        self._pulse: Pulse | None = None
        self._progress = "its ranks are starting"

    def progress(self) -> str:
        """How far `start` is, in words."""
        return self._progress

    def prepare(self, pulse: PulseAddress) -> ProcessInfo:
        """Send the process's output to its log, and beat; the first call.

        A controller whose driver is gone ends itself. A driver that is stopped may go on.
        """
        log_process_to(str(Path(self._log_dir) / CONTROLLER_LOG))
        self._pulse = Pulse(pulse, 0, cut_off_seconds=math.inf)
        return this_process()

    def start(self) -> EngineDescription:
        """Start the ranks and the engine."""
        check_fits(self._config, load_spec(self._config.model))
        self._config = with_profile(self._config)
        executor = self._executor = RayExecutor(
            self._config,
            placement=self._placement,
            log_dir=Path(self._log_dir),
            make_worker=self._make_worker,
            on_progress=self._note_progress,
        )
        self._note_progress("the ranks are up, the scheduler starts")
        self._client = LocalClient(
            self._config,
            executor,
            sinks=[RaySink(self._config.model)],
            metrics_host=self._metrics_host,
        )
        if self._pulse is not None:
            self._pulse.note_up()
        return replace(
            self._client.describe(),
            log_dir=self._log_dir,
            start_seconds=time.monotonic() - self._started,
        )

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        """See `EngineClient.submit`."""
        return self._running().submit(requests)

    def poll(self, timeout_seconds: float) -> list[RequestOutput | ScoreOutput]:
        """See `EngineClient.poll`."""
        return self._running().poll(timeout_seconds)

    def abort(self, request_ids: list[str]) -> None:
        """See `EngineClient.abort`."""
        self._running().abort(request_ids)

    def report(self) -> tuple[EngineReport, list[tuple[str, ProcessInfo]]]:
        """See `EngineClient.report`; with it, the ranks' processes and the ids of their nodes."""
        return self._running().report(), self.processes()

    def processes(self) -> list[tuple[str, ProcessInfo]]:
        """The ranks' processes and the ids of their nodes."""
        return [] if self._executor is None else self._executor.processes

    def reset_stats(self) -> None:
        """See `EngineClient.reset_stats`."""
        self._running().reset_stats()

    def note_rows(self, rows: BatchRows) -> None:
        """See `EngineClient.note_rows`."""
        self._running().note_rows(rows)

    def end_conversation(self, conversation_id: str, owner: str) -> bool:
        """See `EngineClient.end_conversation`."""
        return self._running().end_conversation(conversation_id, owner)

    def reset_prefix_cache(self) -> bool:
        """See `EngineClient.reset_prefix_cache`."""
        return self._running().reset_prefix_cache()

    def shutdown(self) -> None:
        """Stop the engine and its ranks."""
        if self._client is not None:
            self._client.shutdown()
        if self._pulse is not None:
            self._pulse.close()

    def _note_progress(self, text: str) -> None:
        self._progress = text

    def _running(self) -> LocalClient:
        assert self._client is not None, "the controller has not started"
        return self._client


class ControllerClient:
    """An engine behind a `Controller` actor; an `EngineClient`, made by `start_controller`."""

    def __init__(self, actor: Any, placement: Placement, log_file: Path, owns_ray: bool) -> None:
        self._actor = actor
        self._placement = placement
        self._log_file = log_file
        self._owns_ray = owns_ray
        self._closed = False
        self._is_silent = False
        self._own: tuple[str, ProcessInfo] | None = None
        self._ranks: list[tuple[str, ProcessInfo]] = []
        [self._place, *_] = placement.places()  # that of rank 0
        self._monitor = PulseMonitor(pulse_host([self._place]), self._note_loss)
        try:
            self._description: EngineDescription = self._start()
        except BaseException:
            self._monitor.close()
            raise

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        """Queue requests; a bad one costs only itself and comes back as a `Rejection`."""
        rejections: list[Rejection] = self._call("submit", list(requests))
        return rejections

    def poll(self, timeout_seconds: float = 0.0) -> list[RequestOutput | ScoreOutput]:
        """Outputs since the last call; waits up to `timeout_seconds` for the first."""
        outputs: list[RequestOutput | ScoreOutput] = self._call("poll", timeout_seconds)
        return outputs

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests; unknown or finished ids are ignored."""
        self._call("abort", list(request_ids))

    def report(self) -> EngineReport:
        """Measurements since the start or the last `reset_stats`."""
        report: EngineReport
        report, self._ranks = self._call("report")
        return report

    def reset_stats(self) -> None:
        """Start the measurements anew."""
        self._call("reset_stats")

    def note_rows(self, rows: BatchRows) -> None:
        """Show in the metrics how far the batch job is that runs on this engine."""
        self._call("note_rows", rows)

    def end_conversation(self, conversation_id: str, owner: str = "") -> bool:
        """See `EngineClient.end_conversation`."""
        return bool(self._call("end_conversation", conversation_id, owner))

    def reset_prefix_cache(self) -> bool:
        """See `EngineClient.reset_prefix_cache`."""
        return bool(self._call("reset_prefix_cache"))

    def metrics_address(self) -> str | None:
        """Where /metrics is served, or None."""
        return self._description.metrics_address

    def describe(self) -> EngineDescription:
        """Configuration, workers and addresses."""
        return self._description

    def shutdown(self) -> None:
        """End engine, ranks and controller, and Ray if `start_controller` started it."""
        if self._closed:
            return
        self._closed = True
        if not ray.is_initialized():  # its end was the end of everything
            return
        try:
            ray.get(self._actor.shutdown.remote(), timeout=_SHUTDOWN_SECONDS)
        except RayError as error:
            logger.warning("the controller did not shut down cleanly: %s", exit_reason(error))
        self._monitor.close()
        ray.kill(self._actor, no_restart=True)
        self._placement.release()
        known = [*([self._own] if self._own else []), *self._ranks]
        if left := end_on_nodes(known, _GONE_SECONDS):
            logger.error("processes of the engine are still there: %s", left)
        if self._owns_ray:
            ray.shutdown()

    def _start(self) -> EngineDescription:
        """Wait for the engine's start, and say how far it is now and then."""
        started = time.monotonic()
        prepared = self._actor.prepare.remote(self._monitor.address)
        call = self._actor.start.remote()
        while not ray.wait([call], timeout=PROGRESS_SECONDS)[0]:
            seconds = time.monotonic() - started
            logger.info("starting the engine: %s (%.0f s)", self._progress(), seconds)
        self._own = (self._place.node_id, self._result(prepared))
        description: EngineDescription = self._result(call)
        self._ranks = self._call("processes")
        return description

    def _note_loss(self, _: int, is_closed: bool) -> None:
        """The controller is dead, or silent and of no use, says the thread of the monitor.

        Killing it makes the calls fail that wait for it.
        """
        if not is_closed and not self._closed:
            self._is_silent = True
            ray.kill(self._actor, no_restart=True)

    def _progress(self) -> str:
        try:
            text: str = ray.get(self._actor.progress.remote(), timeout=1.0)
        except RayError:  # what is wrong, the call of `start` says
            return "its controller's process is starting"
        return text

    def _call(self, method: str, *args: Any) -> Any:
        if self._closed:  # a call to an actor would start another Ray
            raise EngineDeadError("the engine was shut down")
        return self._result(getattr(self._actor, method).remote(*args))

    def _result(self, call: Any) -> Any:
        """What a call of the actor has come to, its errors as those of an engine."""
        try:
            return ray.get(call)
        except (RayTaskError, RayActorError) as error:
            raise engine_error(error, self._log_file, is_silent=self._is_silent) from error
