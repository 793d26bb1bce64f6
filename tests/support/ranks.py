"""Ranks as processes of their own, which meet over gloo; and plans that all of them carry out."""

import multiprocessing as mp
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from saqqara.configs.schema import EngineConfig
from saqqara.workers.layout import MeshLayout
from saqqara.workers.mesh import start_store
from saqqara.workers.plan import SampledToken, StepPlan, StepResult
from saqqara.workers.worker import Worker

Store = tuple[str, int]
Task = Callable[[int, Sequence[Store]], Any]


def _run_rank(
    task: Task, rank: int, stores: Sequence[Store], answers: "mp.Queue[tuple[int, Any]]"
) -> None:
    torch.set_num_threads(1)
    try:
        answer = task(rank, stores)
    except BaseException:
        answer = RuntimeError(f"rank {rank}:\n{traceback.format_exc()}")
    answers.put((rank, answer))


def run_ranks(task: Task, num_ranks: int, num_stores: int = 1) -> list[Any]:
    """What `task(rank, stores)` returns on each rank; it runs in a spawned process of its own.

    A store is a host and port to meet at. A process group needs one of its own, so a task that
    makes one mesh after the other asks for as many. The first rank that fails ends them all.
    """
    stores = [start_store() for _ in range(num_stores)]
    places = [("127.0.0.1", store.port) for store in stores]
    context = mp.get_context("spawn")
    answers: mp.Queue[tuple[int, Any]] = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(task, rank, places, answers))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    failed = True
    try:
        by_rank: dict[int, Any] = {}
        while len(by_rank) < num_ranks:
            rank, answer = answers.get(timeout=240)
            if isinstance(answer, RuntimeError):
                raise answer
            by_rank[rank] = answer
        failed = False
    finally:
        for process in processes:
            process.join(timeout=1 if failed else 20)
            if process.is_alive():
                process.kill()
    return [by_rank[rank] for rank in range(num_ranks)]


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
    worker._shard.mesh.barrier()  # who leaves first drops what the next stage has not received
    worker.close()
    return run


def sampled_tokens(runs: Sequence[RankRun]) -> dict[int, list[SampledToken]]:
    """Sampled tokens by slot, in order."""
    by_slot: dict[int, list[SampledToken]] = {}
    for run in runs:
        for result in run.results:
            for token in result.sampled:
                by_slot.setdefault(token.slot, []).append(token)
    return by_slot
