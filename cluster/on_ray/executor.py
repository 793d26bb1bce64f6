"""Runs the ranks of one replica as Ray actors.

Ray starts the processes, carries plans and results (small, so they travel inside the calls and not
through the object store) and tells us when a process dies. Activations go between the ranks
directly, over the mesh. Plain actors with ordered calls: a plan costs one call per rank.

When a rank is lost its group is torn down, and every future gets a `WorkerDiedError`; `recover`
starts another group.
"""

import logging
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from saqqara.cluster.engine.executor import settle
from saqqara.cluster.errors import NotRecoverableError, WorkerDiedError
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import Grammar, StepPlan, StepResult, WorkerInfo

from .group import RankGroup
from .placement import DEFAULT_TIMEOUT_SECONDS, Placement, reserve
from .rank_process import ProcessInfo, WorkerFactory, new_log_dir

logger = logging.getLogger(__name__)

_COMPILE_SECONDS = 60.0
_MAX_COMPILING = 4  # grammars that are waited for; a rank compiles one after the other
_DRAIN_SECONDS = 30.0
_GONE_SECONDS = 30.0  # for the processes of a group that was killed

_Step = tuple[RankGroup, list[Any], Future[list[StepResult]]]


class RayExecutor:
    """One replica's ranks as Ray actors; Ray must be connected.

    Args:
        config: the engine's settings.
        placement: room for the ranks, which stays the caller's to release; default: reserved here.
        log_dir: folder of the per-rank logs; default: `config.log_dir` or a new one in the cache.
        make_worker: makes a rank's worker; default: `saqqara.workers.worker.Worker`.
        on_progress: told every few seconds how far the ranks' start is, in words.
        start_timeout_seconds: how long starting the ranks may take, loading weights included.
        step_timeout_seconds: how long a rank may take for a step before it counts as hung, if
            nobody gives it up before; longer than ranks wait for each other (`MeshLayout`'s groups:
            600), whose error says more.

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
        device = "cuda" if self._placement.plan.rank_gpus else "cpu"
        self._config = config.model_copy(update={"device": device})
        self._make_worker = make_worker
        self._on_progress = on_progress
        self._start_timeout_seconds = start_timeout_seconds
        self._step_timeout_seconds = step_timeout_seconds
        self._closed = False
        self._lock = threading.Lock()
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        self._oldest_calls: list[Any] = []
        self._compiling = ThreadPoolExecutor(_MAX_COMPILING, thread_name_prefix="compile-grammar")
        self._group = self._new_group()
        try:
            self._group.start(start_timeout_seconds)
        except BaseException:
            self._closed = True
            self._release()
            raise
        self._gatherer = threading.Thread(target=self._gather, name="gather-results", daemon=True)
        self._gatherer.start()

    @property
    def workers(self) -> list[WorkerInfo]:
        """What each worker is, by rank."""
        return self._group.workers

    @property
    def failure(self) -> WorkerDiedError | None:
        """How the ranks were lost, if they are; heartbeats tell although nothing runs."""
        return self._group.failure

    @property
    def processes(self) -> list[tuple[str, ProcessInfo]]:
        """Those of the ranks, each with the id of its node."""
        return self._group.processes

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Start a step on every rank; steps run in the order of these calls.

        Returns:
            A future of one result per rank, or of the `WorkerDiedError` that ended the group.
        """
        future: Future[list[StepResult]] = Future()
        with self._lock:
            assert not self._closed, "execute after shutdown"
            group = self._group
            if group.failure is not None:
                future.set_exception(group.failure)
                return future
            calls = group.send(pickle.dumps(plan, protocol=5))
            self._steps.put((group, calls, future))
        return future

    def compile_grammar(self, grammar: Grammar) -> "Future[None]":
        """Have a grammar ready on the rank that samples, beside the steps.

        The future ends with a `ValueError` where it cannot be compiled, with a `WorkerDiedError`
        where the ranks are lost.
        """
        group = self._group
        return self._compiling.submit(group.compile_grammar, grammar, _COMPILE_SECONDS)

    def give_up(self, seconds: float) -> WorkerDiedError:
        """End the ranks, whose oldest step has taken so long; says who was late."""
        return self._group.give_up(self._oldest_calls, seconds)

    def recover(self) -> "Future[None]":
        """Make sure that the lost ranks are gone, then start others in the same layout.

        They come up on whatever nodes have room: in a placement of our own, reserved anew, or in
        the caller's, whose lost bundles Ray has moved. Waiting and starting is done in a thread.
        """
        future: Future[None] = Future()
        threading.Thread(
            target=settle, args=(future, self._start_again), name="recover", daemon=True
        ).start()
        return future

    def check_integrity(self) -> None:
        """Prove page ownership on every rank.

        Raises:
            AssertionError: what does not match, and where.
            WorkerDiedError: a rank is gone.
        """
        self._group.check_integrity()

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
        if self._group.failure is None and not self._gatherer.is_alive():
            self._group.close()
        self._group.end()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._release()
        # Killing makes the calls of a step that did not end fail, which ends its future.
        self._gatherer.join(_DRAIN_SECONDS)

    def _new_group(self) -> RankGroup:
        return RankGroup(
            self._config, self._placement, self.log_dir, self._make_worker, self._on_progress
        )

    def _start_again(self) -> None:
        self._group.end()
        self._group.wait_gone(_GONE_SECONDS)
        if self._owns_placement:
            self._placement.release()
            placement = reserve(self._config)
        else:
            placement = self._placement
            placement.wait_until_whole(DEFAULT_TIMEOUT_SECONDS)
        with self._lock:
            self._placement = placement
            if self._closed:
                self._release()
                raise NotRecoverableError("the engine was shut down")
            self._group = self._new_group()
        self._group.start(self._start_timeout_seconds)

    def _release(self) -> None:
        if self._owns_placement:
            self._placement.release()

    def _gather(self) -> None:
        """Thread: turns the results of each step into its future, in order."""
        while (step := self._steps.get()) is not None:
            group, calls, future = step
            self._oldest_calls = calls
            settle(future, partial(group.results, calls, self._step_timeout_seconds))
