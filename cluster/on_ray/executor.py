"""Runs the ranks of one replica as Ray actors.

Ray starts the processes, carries plans and results (small, so they travel inside the calls and not
through the object store) and tells us when a process dies. Activations go between the ranks
directly, over the mesh. Plain actors with ordered calls: a plan costs one call per rank.

A rank that dies, raises or hangs takes its group with it: the others may be blocked in a collective
with it and would wait for ever. They are killed, and every future gets a `WorkerDiedError`.
"""

import logging
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from saqqara.cluster.engine.executor import settle
from saqqara.cluster.errors import WorkerDiedError
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo

from .placement import Placement, RankPlace, reserve
from .rank_process import ProcessInfo, RankProcess, WorkerFactory, new_log_dir

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PROGRESS_SECONDS = 3.0  # between words about how far the start is
_SETTLE_SECONDS = 2.0  # peers of a dead rank fail too; this long to find out who was first
_CLOSE_SECONDS = 5.0
_DRAIN_SECONDS = 30.0


_Step = tuple[list[Any], Future[list[StepResult]]]


class RayExecutor:
    """One replica's ranks as Ray actors; Ray must be connected.

    Args:
        config: the engine's settings.
        placement: room for the ranks, which stays the caller's to release; default: reserved here.
        log_dir: folder of the per-rank logs; default: `config.log_dir` or a new one in the cache.
        make_worker: makes a rank's worker; default: `saqqara.workers.worker.Worker`.
        on_progress: told every few seconds how far the ranks' start is, in words.
        start_timeout_seconds: how long starting the ranks may take, loading weights included.
        step_timeout_seconds: how long a rank may take for a step before it counts as hung; longer
            than ranks wait for each other (`MeshLayout`'s groups: 600), whose error says more.

    Raises:
        PlacementError: the cluster has no room for the ranks.
        ValueError: a setting that the model or a machine cannot meet, as the worker says.
        WorkerDiedError: a rank did not start.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        placement: Placement | None = None,
        log_dir: Path | None = None,
        make_worker: WorkerFactory | None = None,
        on_progress: Callable[[str], None] | None = None,
        start_timeout_seconds: float = 1800.0,
        step_timeout_seconds: float = 900.0,
    ) -> None:
        self.layout = MeshLayout(config.tensor_parallel_size, config.pipeline_parallel_size)
        self.log_dir = log_dir or new_log_dir(config)
        self._owns_placement = placement is None
        self._placement = placement or reserve(config)
        self._actors: list[Any] = []
        self._places: list[RankPlace] = []
        self._processes: list[ProcessInfo] = []
        self._failure: WorkerDiedError | None = None
        self._closed = False
        self._step_timeout_seconds = step_timeout_seconds
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        device = "cuda" if self._placement.plan.rank_gpus else "cpu"
        config = config.model_copy(update={"device": device})
        try:
            self._workers = self._start(config, make_worker, start_timeout_seconds)
        except BaseException:
            self._closed = True
            self._kill()
            raise
        self._gatherer = threading.Thread(target=self._gather, name="gather-results", daemon=True)
        self._gatherer.start()

    @property
    def workers(self) -> list[WorkerInfo]:
        """What each worker is, by rank."""
        return self._workers

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Start a step on every rank; steps run in the order of these calls.

        Returns:
            A future of one result per rank, or of the `WorkerDiedError` that ended the group.
        """
        future: Future[list[StepResult]] = Future()
        with self._lock:
            assert not self._closed, "execute after shutdown"
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            payload = pickle.dumps(plan, protocol=5)
            calls = [actor.execute.remote(payload) for actor in self._actors]
            self._steps.put((calls, future))
        return future

    def check_integrity(self) -> None:
        """Prove page ownership on every rank.

        Raises:
            AssertionError: what does not match, and where.
            WorkerDiedError: a rank is gone.
        """
        if self._failure is not None:
            raise self._failure
        calls = [actor.check_integrity.remote() for actor in self._actors]
        for rank, call in enumerate(calls):
            try:
                ray.get(call)
            except RayTaskError as error:
                if isinstance(error.cause, AssertionError):
                    raise AssertionError(f"rank {rank}: {error.cause}") from error
                raise self._fail(calls, error) from error
            except RayError as error:
                raise self._fail(calls, error) from error

    def shutdown(self) -> None:
        """Finish the steps that were started, then end the ranks and release their room.

        Calling it again does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._steps.put(None)
        self._gatherer.join(_DRAIN_SECONDS)
        if self._failure is None and not self._gatherer.is_alive():
            closing = [actor.close.remote() for actor in self._actors]
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        self._kill()
        # Killing makes the calls of a step that did not end fail, which ends its future.
        self._gatherer.join(_DRAIN_SECONDS)

    def _start(
        self, config: EngineConfig, make_worker: WorkerFactory | None, timeout_seconds: float
    ) -> list[WorkerInfo]:
        self._places = self._placement.places()
        addresses = [place.address for place in self._places]
        actor_class = ray.remote(RankProcess)
        for rank, address in enumerate(addresses):
            options = self._placement.rank_options(rank)
            self._actors.append(
                actor_class.options(max_restarts=0, max_task_retries=0, **options).remote(
                    rank,
                    str(self._log_file(rank)),
                    addresses.count(address),
                    config.num_threads,
                )
            )
        self._processes = self._collect(
            [actor.prepare.remote() for actor in self._actors],
            timeout_seconds,
            "rank processes are up",
        )
        one_host = len(set(addresses)) == 1
        store = None
        if self.layout.world_size > 1:
            # Within one host loopback always works, whatever the host's name resolves to.
            host = LOOPBACK if one_host else addresses[0]
            [store] = self._collect(
                [self._actors[0].open_store.remote(host)], timeout_seconds, "stores are open"
            )
        calls = [
            actor.start.remote(
                config, self.layout, store, LOOPBACK if one_host else address, make_worker
            )
            for actor, address in zip(self._actors, addresses, strict=True)
        ]
        workers: list[WorkerInfo] = self._collect(
            calls, timeout_seconds, "ranks have loaded their part of the model"
        )
        logger.info("%d ranks have started, logs in %s", len(workers), self.log_dir)
        return workers

    def _collect(self, calls: list[Any], timeout_seconds: float, what: str) -> list[Any]:
        """Results of a start-up phase, or the error that tells the user most."""
        try:
            self._wait(calls, timeout_seconds, what)
            return ray.get(calls, timeout=0)  # type: ignore[no-any-return]
        except GetTimeoutError as error:
            done, late = ray.wait(calls, num_returns=len(calls), timeout=0)
            ranks = [calls.index(call) for call in late] or [calls.index(call) for call in done]
            raise WorkerDiedError(
                f"ranks {ranks} have not started within {timeout_seconds:g} s; logs: "
                f"{', '.join(str(self._log_file(rank)) for rank in ranks)}",
                ranks[0],
                str(self._log_file(ranks[0])),
            ) from error
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                raise error.cause from error
            raise self._fail(calls, error) from error

    def _wait(self, calls: list[Any], timeout_seconds: float, what: str) -> None:
        """Wait until all calls have ended well or one has not; say how many have now and then."""
        deadline = time.monotonic() + timeout_seconds
        pending = list(calls)
        while pending:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            done, pending = ray.wait(pending, timeout=min(left, PROGRESS_SECONDS))
            ray.get(done)
            if not done:
                text = f"{len(calls) - len(pending)} of {len(calls)} {what}"
                logger.info("%s", text)
                if self._on_progress is not None:
                    self._on_progress(text)

    def _gather(self) -> None:
        """Thread: turns the results of each step into its future, in order."""
        while (step := self._steps.get()) is not None:
            calls, future = step
            settle(future, partial(self._results, calls))

    def _results(self, calls: Sequence[Any]) -> list[StepResult]:
        """The results of a step, or the `WorkerDiedError` that ended the group."""
        if self._failure is not None:
            raise self._failure
        try:
            # Raises as soon as one of the calls has failed, whatever the others do.
            results: list[StepResult] = ray.get(calls, timeout=self._step_timeout_seconds)
        except Exception as error:
            failure = self._fail(calls, error)
        else:
            return results
        raise failure

    def _fail(self, calls: Sequence[Any], first_error: Exception) -> WorkerDiedError:
        """Tear the group down after an error of one of `calls` (one per rank); say whose it was."""
        with self._lock:
            if self._failure is None:
                self._failure = self._diagnose(calls, first_error)
                self._failure.__cause__ = first_error
                logger.error("%s", self._failure)
                self._kill()
            return self._failure

    def _diagnose(self, calls: Sequence[Any], first_error: Exception) -> WorkerDiedError:
        # The peers of a process that dies get "connection closed" at once, often before Ray knows
        # of the death. So look at all ranks, and blame a dead process before one that raised.
        errors: dict[int, Exception] = {}
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_SETTLE_SECONDS)
        for rank, call in enumerate(calls):
            if call in done:
                try:
                    ray.get(call)
                except Exception as error:
                    errors[rank] = error
        if not errors and isinstance(first_error, GetTimeoutError):
            return self._hung([rank for rank, call in enumerate(calls) if call not in done])
        if not errors:
            return WorkerDiedError(f"the ranks cannot be reached: {first_error}")
        rank = min(errors, key=lambda r: (not isinstance(errors[r], RayActorError), r))
        message = self._describe(rank, errors[rank])
        others = [r for r in errors if r != rank]
        if others:
            message += f" (ranks {others} failed with it)"
        return WorkerDiedError(message, rank, str(self._log_file(rank)))

    def _hung(self, ranks: Sequence[int]) -> WorkerDiedError:
        if not ranks:  # they answered just after the time was over
            ranks = range(len(self._actors))
        who = ", ".join(self._name(rank) for rank in ranks)
        message = f"{who} did not end a step within {self._step_timeout_seconds:g} s"
        log_file = str(self._log_file(ranks[0]))
        return WorkerDiedError(f"{message}; its log: {log_file}", ranks[0], log_file)

    def _name(self, rank: int) -> str:
        place = self._places[rank]
        pid = f", pid {self._processes[rank].pid}" if self._processes else ""
        return f"rank {rank} of {self.layout.world_size} on {place.hostname} ({place.address}{pid})"

    def _describe(self, rank: int, error: Exception) -> str:
        who = self._name(rank)
        if isinstance(error, RayTaskError):
            what = f"failed: {one_line(error.cause)}"
        else:
            what = f"died: {exit_reason(error)}"
        return f"{who} {what}; its log: {self._log_file(rank)}"

    def _log_file(self, rank: int) -> Path:
        return self.log_dir / f"rank-{rank}.log"

    def _kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._owns_placement:
            self._placement.release()


def one_line(error: BaseException) -> str:
    """Type and first line of an error; the rest is in its log."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def exit_reason(error: Exception) -> str:
    """The part of Ray's message that says how a process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((text for text in lines if "exit detail" in text), lines[-1] if lines else "")
    return line.split(" Some common causes")[0] or type(error).__name__
