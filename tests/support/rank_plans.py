"""Plans on several ranks, one real process each."""

import multiprocessing as mp
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh import MeshLayout, start_store
from saqqara.workers.plan import SampledToken, StepPlan, StepResult
from saqqara.workers.worker import Worker


@dataclass(frozen=True)
class Job:
    """Plans to carry out on every rank of a replica of this layout."""

    config: EngineConfig
    layout: MeshLayout
    plans: Sequence[StepPlan]


@dataclass(frozen=True)
class RankRun:
    """What one rank did: the result of each plan, and free pages of all at the end."""

    results: list[StepResult]
    num_pages: int


def _run_rank(
    jobs: Sequence[Job], ports: Sequence[int], rank: int, answers: "mp.Queue[tuple[int, Any]]"
) -> None:
    torch.set_num_threads(1)
    answer: Any
    try:
        answer = [
            _run_job(job, port, rank) if rank < job.layout.world_size else None
            for job, port in zip(jobs, ports, strict=True)
        ]
    except BaseException:
        answer = RuntimeError(f"rank {rank}:\n{traceback.format_exc()}")
    answers.put((rank, answer))


def _run_job(job: Job, port: int, rank: int) -> RankRun:
    worker = Worker(job.config, job.layout, rank, ("127.0.0.1", port))
    results = []
    for plan in job.plans:
        results.append(worker.execute(plan))
        worker.check_integrity()
    run = RankRun(results, worker.info.num_pages)
    worker._shard.mesh.barrier()  # who leaves first drops what the next stage has not received
    worker.close()
    return run


def run_on_ranks(jobs: Sequence[Job]) -> list[list[RankRun]]:
    """Carry out one job after the other, in the same processes; what each of its ranks did.

    Integrity is checked after each plan.
    """
    stores = [start_store() for _ in jobs]
    ports = [store.port for store in stores]
    context = mp.get_context("spawn")
    answers: mp.Queue[tuple[int, Any]] = context.Queue()
    num_ranks = max(job.layout.world_size for job in jobs)
    processes = [
        context.Process(target=_run_rank, args=(jobs, ports, rank, answers))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        by_rank: dict[int, Any] = {}
        while len(by_rank) < num_ranks:
            rank, answer = answers.get(timeout=300)
            if isinstance(answer, RuntimeError):
                raise answer
            by_rank[rank] = answer
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return [
        [by_rank[rank][number] for rank in range(job.layout.world_size)]
        for number, job in enumerate(jobs)
    ]


def sampled_tokens(runs: Sequence[RankRun]) -> dict[int, list[SampledToken]]:
    """Sampled tokens by slot, in order."""
    by_slot: dict[int, list[SampledToken]] = {}
    for run in runs:
        for result in run.results:
            for token in result.sampled:
                by_slot.setdefault(token.slot, []).append(token)
    return by_slot
