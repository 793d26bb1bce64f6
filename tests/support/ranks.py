"""Ranks as processes of their own, which meet over gloo; and plans that all of them carry out."""

import multiprocessing as mp
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.mesh.mesh import start_store
from saqqara.workers.plan import SampledToken, StepPlan, StepResult
from saqqara.workers.worker import Worker

Store = tuple[str, int]
Task = Callable[[int, Sequence[Store]], Any]
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class _Failure:
    """What a rank's task raised."""

    trace: str


def _serve(connection: Connection) -> None:
    """Carry out one task after the other, until the tests end."""
    torch.set_num_threads(1)
    while True:
        try:
            task, rank, stores = connection.recv()
            answer = task(rank, stores)
        except EOFError:
            return
        except BaseException:
            answer = _Failure(traceback.format_exc())
        connection.send(answer)


class _Pool:
    """Processes that play ranks. They are kept for the next test: starting one takes seconds."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def first(self, num_ranks: int) -> list[Connection]:
        """Connections to so many processes."""
        while len(self._ranks) < num_ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        return [connection for _, connection in self._ranks[:num_ranks]]

    def end(self) -> None:
        """Kill them all; the next test starts others."""
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks.clear()


_POOL = _Pool()


def run_ranks(
    task: Task, num_ranks: int, num_stores: int = 1, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[Any]:
    """What `task(rank, stores)` returns on each rank; each is a process, which other tests use too.

    A store is a host and port to meet at. A process group needs one of its own, so a task that
    makes one mesh after the other asks for as many. The first rank that fails ends them all.
    """
    stores = [start_store() for _ in range(num_stores)]
    places = [("127.0.0.1", store.port) for store in stores]
    connections = _POOL.first(num_ranks)
    try:
        for rank, connection in enumerate(connections):
            connection.send((task, rank, places))
        return _answers(connections, timeout_seconds)
    except BaseException:
        _POOL.end()
        raise


def _answers(connections: list[Connection], timeout_seconds: float) -> list[Any]:
    by_rank: dict[int, Any] = {}
    waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready = wait(list(waiting), timeout=timeout_seconds)
        assert ready, f"ranks {sorted(waiting.values())} did not answer"
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                by_rank[rank] = connections[rank].recv()
            except EOFError:
                raise RuntimeError(f"rank {rank}: its process has ended") from None
            if isinstance(by_rank[rank], _Failure):
                raise RuntimeError(f"rank {rank}:\n{by_rank[rank].trace}")
    return [by_rank[rank] for rank in range(len(connections))]


@dataclass(frozen=True)
class Job:
    """Plans to carry out on every rank of a replica of this layout."""

    config: EngineConfig
    layout: MeshLayout
    plans: Sequence[StepPlan]


@dataclass(frozen=True)
class RankRun:
    """What one rank did: the result of each plan, and the pages of its pool."""

    results: list[StepResult]
    num_pages: int


def run_on_ranks(jobs: Sequence[Job]) -> list[list[RankRun]]:
    """Carry out one job after the other, in the same processes; what each of its ranks did.

    Integrity is checked after each plan.
    """
    num_ranks = max(job.layout.world_size for job in jobs)
    by_rank = run_ranks(partial(_run_jobs, jobs), num_ranks, len(jobs))
    return [
        [by_rank[rank][number] for rank in range(job.layout.world_size)]
        for number, job in enumerate(jobs)
    ]


def _run_jobs(jobs: Sequence[Job], rank: int, stores: Sequence[Store]) -> list[RankRun | None]:
    return [
        _run_job(job, rank, store) if rank < job.layout.world_size else None
        for job, store in zip(jobs, stores, strict=True)
    ]


def _run_job(job: Job, rank: int, store: Store) -> RankRun:
    worker = Worker(job.config.for_worker(), job.layout, rank, store)
    results = []
    for plan in job.plans:
        results.append(worker.execute(plan))
        worker.check_integrity()
    run = RankRun(results, worker.info.num_pages)
    leave_together(worker)
    return run


def leave_together(worker: Worker) -> None:
    """Close this rank's worker once every rank is here.

    Who leaves first drops what the next stage has not received, which then fails or waits.
    """
    worker._shard.part.mesh.barrier()
    worker.close()


def sampled_tokens(runs: Sequence[RankRun]) -> dict[int, list[SampledToken]]:
    """Sampled tokens by slot, in order."""
    by_slot: dict[int, list[SampledToken]] = {}
    for run in runs:
        for result in run.results:
            for token in result.sampled:
                by_slot.setdefault(token.slot, []).append(token)
    return by_slot
