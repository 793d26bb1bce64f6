"""Sums over ranks: NCCL recorded in a CUDA graph, and symmetric memory between two GPUs."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from gpu_report import Bench, Row, failure

from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.mesh.mesh import Mesh, start_store

HIDDEN = 8192  # Llama-3-70B's
ROWS = (1, 16, 64, 256)  # of decode batches
_ALONE, _TOGETHER = "NCCL in a graph, group of one", "sums over two GPUs"
_SECONDS = 60.0


def check_sums(bench: Bench, num_devices: int) -> Iterator[Row]:
    """What a rank of several does in every layer; of two GPUs only where there are two."""
    try:
        yield _record(bench)
    except Exception as error:  # the row of one check: the other follows
        yield failure(_ALONE, error)
    if num_devices < 2:
        yield Row(_TOGETHER, f"{num_devices} device, and it takes two", state="skipped")
        return
    yield from _together(bench)


def _record(bench: Bench) -> Row:
    """Replay a graph of two sums of a group of one, which leave what went in."""
    is_gpu = bench.device.type == "cuda"
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, not in __all__
    dist.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=0, world_size=1)
    x = torch.zeros(64, HIDDEN, dtype=bench.dtype, device=bench.device)
    total = torch.empty_like(x)

    def twice() -> None:
        total.copy_(x)
        dist.all_reduce(total)
        total.add_(1)
        dist.all_reduce(total)

    try:
        twice()  # makes the communicator, which no graph may
        if not is_gpu:
            return Row(_ALONE, "nothing is recorded on a CPU", state="skipped")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            twice()
        x.fill_(2)
        graph.replay()
        torch.cuda.synchronize()
        is_right = bool((total == 3).all())
        seconds = bench.seconds_of(graph.replay)
    finally:
        dist.destroy_process_group()
    text = f"{'as without' if is_right else 'other numbers than without'}; {seconds * 1e6:.0f} us"
    return Row(_ALONE, text, {"replay_us": seconds * 1e6}, "ok" if is_right else "wrong")


def _together(bench: Bench) -> Iterator[Row]:
    """Sums of two ranks against the exact ones, and their time beside the group's own."""
    context = multiprocessing.get_context("spawn")
    store = start_store()
    ends = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(
            target=_rank, args=(rank, ("127.0.0.1", store.port), bench, end[1]), daemon=True
        )
        for rank, end in enumerate(ends)
    ]
    for rank in ranks:
        rank.start()
    for _, theirs in ends:
        theirs.close()
    found: list[Any] = [ours.recv() for ours, _ in ends]
    for rank in ranks:
        rank.join()
    yield from found[0]


def _rank(rank: int, store: tuple[str, int], bench: Bench, connection: Connection) -> None:
    is_gpu = bench.device.type == "cuda"
    device = torch.device("cuda", rank) if is_gpu else bench.device
    mesh = Mesh(MeshLayout(2, 1), rank, device=device, store=store, timeout_seconds=_SECONDS)
    way = "symmetric memory" if mesh.maps_memory else "the group alone"
    rows = []
    for num_rows in ROWS:
        generator = torch.Generator().manual_seed(num_rows)
        parts = torch.randn(2, num_rows, HIDDEN, generator=generator).to(bench.dtype)
        exact = parts.float().sum(dim=0).to(bench.dtype)  # two parts: one rounding
        total = mesh.all_reduce(parts[rank].to(device, copy=True))
        is_right = torch.equal(total.cpu(), exact)
        x = parts[rank].to(device)
        ours = bench.seconds_of(lambda x=x: mesh.all_reduce(x.clone()))  # type: ignore[misc]
        group = bench.seconds_of(lambda x=x: dist.all_reduce(x.clone()))  # type: ignore[misc]
        text = f"{way}: {ours * 1e6:.0f} us; the group's own {group * 1e6:.0f} us"
        numbers = {"sum_us": ours * 1e6, "group_us": group * 1e6}
        what = f"{_TOGETHER}, {num_rows} rows"
        rows.append(Row(what, text, numbers, "ok" if is_right else "wrong"))
    mesh.barrier()
    mesh.close()
    connection.send(rows)
