"""Ranks on one host exchange through shared memory: exactly, in step, and leaving nothing behind.

Kernels wait without the GIL, so threads can play ranks where one rank must fail or be late; what
concerns processes runs in processes.
"""

import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # public

from saqqara.workers.mesh import shared_memory
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.native import build
from saqqara.workers.native.exchange import Exchange, memory_bytes

REASON = build.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")

SLOT_BYTES = 256
# Empty, one number, around one piece (64 fp32, 128 bf16) and around several.
SIZES = [0, 1, 17, 63, 64, 65, 127, 128, 129, 200, 1000]
DTYPES = [torch.bfloat16, torch.float32]


def exchanges(num_ranks: int, timeout_seconds: float = 60.0) -> list[Exchange]:
    """The ends of one memory, in this process."""
    memory = torch.zeros(memory_bytes(num_ranks, SLOT_BYTES), dtype=torch.uint8)
    pids = (os.getpid(),) * num_ranks
    return [Exchange(memory, r, pids, SLOT_BYTES, timeout_seconds) for r in range(num_ranks)]


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Run the tasks at the same time; their results or errors."""

    def caught(task: Callable[[], Any]) -> Any:
        try:
            return task()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(caught, tasks))


def random(seed: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of very different sizes, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10 ** torch.randn(size, generator=generator)
    return x.to(dtype)


def sum_in_order(parts: list[torch.Tensor], residual: torch.Tensor | None) -> torch.Tensor:
    """Rank by rank in fp32, then the residual, then one rounding."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    if residual is not None:
        total = total + residual.float()
    return total.to(parts[0].dtype)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ranks_get_the_bits_of_a_sum_in_their_order(num_ranks: int, dtype: torch.dtype) -> None:
    """Every size, with and without a residual, copied or written in place."""
    ends = exchanges(num_ranks)

    def rank(end: Exchange, index: int) -> list[torch.Tensor]:
        found = []
        for size in SIZES:
            x, residual = random(index, size, dtype), random(100, size, dtype)
            found.append(x.clone())
            end.all_reduce(found[-1], None, found[-1])
            partial = end.partial_like(x)
            assert (partial is None) == (x.nbytes > SLOT_BYTES)
            found.append(residual)
            end.all_reduce(x if partial is None else partial.copy_(x), residual, residual)
        return found

    results = together([lambda e=e, i=i: rank(e, i) for i, e in enumerate(ends)])  # type: ignore[misc]
    for found in results:
        assert isinstance(found, list), found
        for index, size in enumerate(SIZES):
            parts = [random(r, size, dtype) for r in range(num_ranks)]
            assert torch.equal(found[2 * index], sum_in_order(parts, None))
            expected = sum_in_order(parts, random(100, size, dtype))
            assert torch.equal(found[2 * index + 1], expected)


def test_threads_of_a_rank_share_a_large_sum() -> None:
    """A slot of 100,000 numbers is cut into blocks for several threads; the bits stay the same."""
    slot_bytes, size = 512 * 1024, 100_003
    memory = torch.zeros(memory_bytes(2, slot_bytes), dtype=torch.uint8)
    ends = [Exchange(memory, r, (os.getpid(),) * 2, slot_bytes, 60.0) for r in range(2)]
    parts = [random(r, size, torch.bfloat16) for r in range(2)]
    copies = [part.clone() for part in parts]
    together([lambda e=e, x=x: e.all_reduce(x, None, x) for e, x in zip(ends, copies, strict=True)])  # type: ignore[misc]
    for copy in copies:
        assert torch.equal(copy, sum_in_order(parts, None))


def _many_operations(mesh: Mesh) -> int:
    """Thousands of operations of changing kinds and sizes; ranks take turns at being late."""
    rank, size = mesh.tensor_rank, mesh.layout.tensor_size
    generator = torch.Generator().manual_seed(7)  # the same choices on every rank
    count = 2000
    for step in range(count):
        kind, rows, columns = (int(torch.randint(n, (), generator=generator)) for n in (4, 9, 70))
        dtype = DTYPES[step % 2]
        x = torch.full((rows, columns + 1), float(step % 64 + rank), dtype=dtype)
        if step % 500 == 100 * rank:
            time.sleep(0.01)
        total = float(size * (step % 64) + sum(range(size)))
        if kind == 0:
            assert mesh.all_reduce(x).eq(total).all(), step
        elif kind == 1:
            partial, residual = mesh.partial_like(x), torch.ones_like(x)
            assert mesh.all_reduce(partial.copy_(x), residual, residual) is residual
            assert residual.eq(total + 1).all(), step
        elif kind == 2:
            shards = mesh.all_gather_last(x).view(rows, size, columns + 1)
            expected = torch.arange(size)[None, :, None] + step % 64
            assert shards.eq(expected).all(), step
        else:
            root = step % size
            assert mesh.broadcast(x, root).eq(step % 64 + root).all(), step
    # Several pieces, and views that are not contiguous.
    large = torch.full((700, 1100), 1.0 + rank)
    assert mesh.all_reduce(large.t()).eq(size * (size + 1) / 2).all()
    joined = mesh.all_gather_last(large.fill_(rank)).view(700, size, 1100)
    assert joined.eq(torch.arange(size)[None, :, None]).all()
    return count


def _run_mesh(size: int, rank: int, stores: Sequence[tuple[str, int]]) -> int:
    mesh = Mesh(MeshLayout(size), rank, store=stores[0], timeout_seconds=60.0)
    assert mesh.shares_memory
    count = _many_operations(mesh)
    mesh.barrier()
    mesh.close()
    return count


@pytest.mark.parametrize("size", [2, 3])
def test_thousands_of_operations_do_not_mix_up(size: int) -> None:
    assert run_ranks(partial(_run_mesh, size), size) == [2000] * size


def test_a_rank_that_does_not_come_is_named() -> None:
    ends = exchanges(3, timeout_seconds=0.2)
    x = torch.ones(4)
    first, second = together([lambda e=e: e.all_reduce(x.clone(), None, x) for e in ends[:2]])  # type: ignore[misc]
    for error in (first, second):
        assert isinstance(error, TimeoutError)
        assert "tensor rank 2 did not come" in str(error)
        assert "within 0.2 seconds" in str(error)


def test_a_rank_whose_process_has_ended_is_named_at_once() -> None:
    process = mp.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    assert process.pid is not None
    memory = torch.zeros(memory_bytes(2, SLOT_BYTES), dtype=torch.uint8)
    end = Exchange(memory, 0, (os.getpid(), process.pid), SLOT_BYTES, timeout_seconds=60.0)
    process.kill()
    with pytest.raises(ConnectionError, match=rf"tensor rank 1 has ended \(process {process.pid}"):
        end.broadcast(torch.ones(1), root=0)
    process.join()


@pytest.mark.parametrize("sizes", [(4, 5), (4, 4)])
def test_ranks_that_do_different_things_find_out(sizes: tuple[int, int]) -> None:
    """Another size, or another operation of the same size."""
    first, second = exchanges(2)
    x, y = (torch.ones(size) for size in sizes)
    tasks = [lambda: first.all_reduce(x, None, x), lambda: second.broadcast(y, root=0)]
    if sizes[0] != sizes[1]:
        tasks[1] = lambda: second.all_reduce(y, None, y)
    for error in together(tasks):
        assert isinstance(error, RuntimeError)
        assert "out of step" in str(error)


def join_all(
    num_ranks: int, change: Callable[[Store, int], None] = lambda store, rank: None
) -> list[tuple[Exchange | None, str]]:
    """What `join` gives each rank, if `change(store, rank)` comes before rank's own part."""
    store = HashStore()

    def rank(index: int) -> tuple[Exchange | None, str]:
        change(store, index)
        return shared_memory.join(store, index, num_ranks, 60.0)

    outcomes = together([lambda i=i: rank(i) for i in range(num_ranks)])  # type: ignore[misc]
    for outcome in outcomes:
        assert isinstance(outcome, tuple), outcome
    return outcomes


def test_ranks_of_one_host_share() -> None:
    outcomes = join_all(3)
    assert {why for _, why in outcomes} == {outcomes[0][1]}
    assert "3 ranks on this host share" in outcomes[0][1]
    ends = [end for end, _ in outcomes if end is not None]
    xs = [torch.full((3,), float(r)) for r in range(3)]
    together([lambda e=e, x=x: e.all_reduce(x, None, x) for e, x in zip(ends, xs, strict=True)])  # type: ignore[misc]
    assert all(x.tolist() == [3.0, 3.0, 3.0] for x in xs)


def test_one_rank_that_cannot_attach_sends_all_to_gloo() -> None:
    """Another host has no such process, or another file under the same numbers."""
    for elsewhere in ({"process_id": 2**22 + 1}, {"name": "saqqara-another"}):

        def change(store: Store, rank: int, elsewhere: dict[str, Any] = elsewhere) -> None:
            if rank == 2:
                store.get("answer1")  # rank 1 has the memory
                offer = json.loads(store.get("offer"))
                store.set("offer", json.dumps(offer | elsewhere))

        outcomes = join_all(3, change)
        assert [end for end, _ in outcomes] == [None] * 3
        assert {why for _, why in outcomes} == {outcomes[0][1]}
        assert outcomes[0][1].startswith("tensor rank 2: not on the host of tensor rank 0")


def test_no_room_or_no_kernels_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        outcomes = join_all(2)
        assert [end for end, _ in outcomes] == [None, None]
        assert "No space left" in outcomes[1][1]
    monkeypatch.setattr(build, "unavailable_reason", lambda: "no compiler")
    assert join_all(2) == [(None, "tensor rank 0: no native kernels: no compiler")] * 2
