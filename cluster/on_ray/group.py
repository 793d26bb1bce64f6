"""One start of a replica's ranks as Ray actors: from placing them to being sure that they are gone.

A group ends as a whole and is not used again; `executor.RayExecutor` then starts another. A rank
that dies, raises, hangs or falls silent takes its group with it: the others may be blocked in a
collective with it and would wait for ever.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from saqqara.cluster.errors import WorkerDiedError
from saqqara.cluster.recovery.pulse import PulseMonitor
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import Grammar, StepResult, WorkerInfo

from .exits import cause_of, end_on_nodes, exit_reason, one_line
from .placement import LOOPBACK, Placement, RankPlace, given_gpu, pulse_host
from .rank_process import ProcessInfo, RankProcess, WorkerFactory

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 3.0  # between words about how far the start is
_SETTLE_SECONDS = 2.0  # peers of a dead rank fail too; this long to find out who was first
_CLOSE_SECONDS = 5.0
_STACKS_SECONDS = 0.2  # for a rank that hangs to write its stacks to its log
_STOPPED_SECONDS = 2.5  # without a beat, of a rank whose step is late
_COMPILING = (
    "compiling"  # a concurrency group of its own: steps do not wait for it, nor it for them
)
_PROCESS_SECONDS = 300.0  # for Ray to start the processes, before anything is loaded


class RankGroup:
    """The ranks of one replica, from one start to one end.

    Args:
        config: the engine's settings, with the device that the placement has.
        placement: room for the ranks.
        log_dir: folder of the per-rank logs.
        make_worker: makes a rank's worker; default: `saqqara.workers.worker.Worker`.
        on_progress: told every few seconds how far the start is, in words.

    Attributes:
        workers: what each worker is, by rank; empty until `start` has returned.
        failure: how the group was lost, if it is.
    """

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        log_dir: Path,
        make_worker: WorkerFactory | None,
        on_progress: Callable[[str], None] | None,
    ) -> None:
        self.layout = MeshLayout(config.tensor_parallel_size, config.pipeline_parallel_size)
        self.log_dir = log_dir
        self.workers: list[WorkerInfo] = []
        self.failure: WorkerDiedError | None = None
        self._config = config
        self._placement = placement
        self._make_worker = make_worker
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._actors: list[Any] = []
        self._places: list[RankPlace] = []
        self._processes: list[ProcessInfo] = []
        self._monitor: PulseMonitor | None = None

    def start(self, timeout_seconds: float) -> None:
        """Start the processes, let them find each other and load their parts of the model.

        Raises:
            ValueError: a setting that the model or a machine cannot meet, as the worker says.
            WorkerDiedError: a rank did not start.
        """
        try:
            self.workers = self._start(timeout_seconds)
        except BaseException:
            self.end()
            raise
        logger.info("%d ranks have started, logs in %s", len(self.workers), self.log_dir)

    def send(self, payload: bytes) -> list[Any]:
        """Start a step on every rank, from a pickled plan; returns the calls, by rank."""
        return [actor.execute.remote(payload) for actor in self._actors]

    def results(self, calls: Sequence[Any], timeout_seconds: float) -> list[StepResult]:
        """The results of a step, by rank.

        Raises:
            WorkerDiedError: what ended the group, now or before.
        """
        if self.failure is not None:
            raise self.failure
        try:
            # Raises as soon as one of the calls has failed, whatever the others do.
            results: list[StepResult] = ray.get(list(calls), timeout=timeout_seconds)
        except Exception as error:
            failure = self._fail(calls, error, timeout_seconds)
        else:
            return results
        raise failure

    def compile_grammar(self, grammar: Grammar, timeout_seconds: float) -> None:
        """Have a grammar ready on the rank that samples.

        Raises:
            ValueError: it cannot be compiled.
            WorkerDiedError: the rank is gone, or does not answer.
        """
        if self.failure is not None:
            raise self.failure
        rank = (self.layout.pipeline_size - 1) * self.layout.tensor_size
        compiling = self._actors[rank].compile_grammar.options(concurrency_group=_COMPILING)
        call = compiling.remote(grammar)
        try:
            ray.get(call, timeout=timeout_seconds)
        except RayTaskError as error:
            is_ours = isinstance(error.cause, ValueError)
            raise ValueError(str(error.cause) if is_ours else one_line(error.cause)) from error
        except RayError as error:
            if isinstance(error, GetTimeoutError):
                raise ValueError(f"it is not compiled after {timeout_seconds:g} s") from error
            message, log_file = self._describe(rank, error), str(self._log_file(rank))
            raise self._lose(lambda: WorkerDiedError(message, rank, log_file)) from error

    def check_integrity(self) -> None:
        """Prove page ownership on every rank.

        Raises:
            AssertionError: what does not match, and where.
            WorkerDiedError: a rank is gone.
        """
        if self.failure is not None:
            raise self.failure
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

    def give_up(self, calls: Sequence[Any], seconds: float) -> WorkerDiedError:
        """End the group, whose oldest step, these calls, has taken so long; says who was late."""

        def diagnose() -> WorkerDiedError:
            _, late = (
                ray.wait(list(calls), num_returns=len(calls), timeout=0) if calls else ([], [])
            )
            self._ask_for_stacks()
            return self._hung([calls.index(call) for call in late], seconds)

        return self._lose(diagnose)

    def close(self) -> None:
        """Let the ranks leave their process groups, for an end without errors in their logs."""
        if closing := [actor.close.remote() for actor in self._actors]:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)

    def end(self) -> None:
        """Kill the ranks; calling it again does nothing."""
        self._ended.set()
        if self._monitor is not None:
            self._monitor.close()
        for actor in self._actors:
            ray.kill(actor, no_restart=True)

    @property
    def processes(self) -> list[tuple[str, ProcessInfo]]:
        """Those of the ranks that have come up, each with the id of its node."""
        return [
            (place.node_id, process)
            for place, process in zip(self._places, self._processes, strict=False)
        ]

    def wait_gone(self, timeout_seconds: float) -> None:
        """Make sure that the processes of the ranks, which were killed, have left their nodes.

        Raises:
            WorkerDiedError: a process is still there.
        """
        if left := end_on_nodes(self.processes, timeout_seconds):
            raise WorkerDiedError(f"killed ranks are still there: processes {left}")

    def _start(self, timeout_seconds: float) -> list[WorkerInfo]:
        self._places = self._placement.places()
        self._monitor = PulseMonitor(pulse_host(self._places), self._note_loss)
        addresses = [place.address for place in self._places]
        actor_class = ray.remote(concurrency_groups={_COMPILING: 1})(RankProcess)
        for rank, address in enumerate(addresses):
            options = self._placement.rank_options(rank)
            self._actors.append(
                actor_class.options(max_restarts=0, max_task_retries=0, **options).remote(
                    rank,
                    str(self._log_file(rank)),
                    addresses.count(address),
                    self._config.num_threads,
                )
            )
        self._processes = self._collect(
            [actor.prepare.remote(self._monitor.address) for actor in self._actors],
            min(timeout_seconds, _PROCESS_SECONDS),
            "rank processes are up",
        )
        if self._ended.is_set():
            raise WorkerDiedError("the ranks were ended while they started")
        given = [given_gpu(actor) for actor in self._actors]
        gpus = self._collect(given, timeout_seconds, "GPUs are given")
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
                self._config,
                self.layout,
                store,
                LOOPBACK if one_host else address,
                self._make_worker,
                gpu,
            )
            for actor, address, gpu in zip(self._actors, addresses, gpus, strict=True)
        ]
        workers: list[WorkerInfo] = self._collect(
            calls, timeout_seconds, "ranks have loaded their part of the model"
        )
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

    def _note_loss(self, rank: int, is_closed: bool) -> None:
        """A rank is dead or silent, says the thread of the monitor, maybe while nothing runs."""

        def diagnose() -> WorkerDiedError:
            if not is_closed:
                return self._silent(rank)
            log_file = str(self._log_file(rank))
            try:
                ray.get(self._actors[rank].ping.remote(), timeout=_SETTLE_SECONDS)
            except RayActorError as error:
                return WorkerDiedError(self._describe(rank, error), rank, log_file)
            except RayError:
                logger.debug("rank %d: how it ended is not known yet", rank)
            return WorkerDiedError(
                f"{self._name(rank)} died: it closed its connection; its log: {log_file}",
                rank,
                log_file,
            )

        if not self._ended.is_set():
            self._lose(diagnose)

    def _fail(
        self, calls: Sequence[Any], first_error: Exception, step_seconds: float = 0.0
    ) -> WorkerDiedError:
        """Tear the group down after an error of one of `calls` (one per rank); say whose it was."""

        def diagnose() -> WorkerDiedError:
            failure = self._diagnose(calls, first_error, step_seconds)
            failure.__cause__ = first_error
            return failure

        return self._lose(diagnose)

    def _lose(self, diagnose: Callable[[], WorkerDiedError]) -> WorkerDiedError:
        """The failure of this group: the one that is known, or what `diagnose` finds."""
        with self._lock:
            if self.failure is None:
                self.failure = diagnose()
                logger.error("%s", self.failure)
                self.end()
            return self.failure

    def _diagnose(
        self, calls: Sequence[Any], first_error: Exception, step_seconds: float
    ) -> WorkerDiedError:
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
            late = [rank for rank, call in enumerate(calls) if call not in done]
            return self._hung(late, step_seconds)
        if not errors:
            return WorkerDiedError(
                f"the ranks cannot be reached: {first_error}", cause="unreachable"
            )
        rank = min(errors, key=lambda r: (not isinstance(errors[r], RayActorError), r))
        message = self._describe(rank, errors[rank])
        others = [r for r in errors if r != rank]
        if others:
            message += f" (ranks {others} failed with it)"
        return WorkerDiedError(
            message, rank, str(self._log_file(rank)), cause=cause_of(errors[rank])
        )

    def _ask_for_stacks(self) -> None:
        """Have the ranks of this node write to their logs what they are doing."""
        here = ray.get_runtime_context().get_node_id()
        for place, process in zip(self._places, self._processes, strict=True):
            if place.node_id == here and process.is_there():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(_STACKS_SECONDS)

    def _stopped_rank(self) -> int | None:
        """The rank that does not beat: the others, which wait for it, are not the cause."""
        rank, seconds = self._monitor.quietest() if self._monitor is not None else (None, 0.0)
        return rank if seconds > _STOPPED_SECONDS else None

    def _silent(self, rank: int) -> WorkerDiedError:
        log_file = str(self._log_file(rank))
        message = f"{self._name(rank)} has fallen silent; its log: {log_file}"
        return WorkerDiedError(message, rank, log_file, cause="unreachable")

    def _hung(self, ranks: Sequence[int], seconds: float) -> WorkerDiedError:
        if (stopped := self._stopped_rank()) is not None:
            return self._silent(stopped)
        if not ranks:  # they answered just after the time was over
            ranks = range(len(self._actors))
        who = ", ".join(self._name(rank) for rank in ranks)
        message = f"{who} did not end a step within {seconds:g} s"
        log_file = str(self._log_file(ranks[0]))
        return WorkerDiedError(f"{message}; its log: {log_file}", ranks[0], log_file, cause="hung")

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
