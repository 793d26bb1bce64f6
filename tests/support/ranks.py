"""Ranks as processes of their own, which meet over gloo."""

import multiprocessing as mp
import traceback
from collections.abc import Callable
from typing import Any

import torch

from saqqara.workers.mesh import start_store

Task = Callable[[int, tuple[str, int]], Any]


def _run_rank(
    task: Task, rank: int, store: tuple[str, int], results: "mp.Queue[tuple[int, Any]]"
) -> None:
    torch.set_num_threads(1)
    try:
        result = task(rank, store)
    except BaseException:
        result = RuntimeError(f"rank {rank}:\n{traceback.format_exc()}")
    results.put((rank, result))


def run_ranks(task: Task, num_ranks: int) -> list[Any]:
    """What `task(rank, host and port of the store)` returns on each rank."""
    store = start_store()
    context = mp.get_context("spawn")
    results: mp.Queue[tuple[int, Any]] = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(task, rank, ("127.0.0.1", store.port), results))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        by_rank = dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    for result in by_rank.values():
        if isinstance(result, RuntimeError):
            raise result
    return [by_rank[rank] for rank in range(num_ranks)]
