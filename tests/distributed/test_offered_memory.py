"""Memory that ranks share is found by those of its host, and goes with the last of them.

Needs no kernels: those that would use the memory are left out.
"""

import json
import multiprocessing as mp
import os
import sys
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public

from saqqara.workers.mesh import shared_memory
from saqqara.workers.native import exchange

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory on Linux only")

NUM_BYTES = 1 << 20


def lead(port: int) -> None:
    """Tensor rank 0 of two, in a process of its own; leaves its mark for rank 1."""
    exchange.memory_bytes = lambda *_: NUM_BYTES
    store = TCPStore("127.0.0.1", port, is_master=False)
    _, memory, verdict = shared_memory._lead(store, 0, 2, None)
    assert memory is not None
    assert memory.eq(0).all()
    memory[7] = 42
    store.set("marked", json.dumps(verdict.reason))
    store.get("end")


@pytest.fixture
def store() -> TCPStore:
    """A rendezvous store that outlives the ranks."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def leader(store: TCPStore) -> Iterator[mp.process.BaseProcess]:
    """Rank 0, which has made its offer and waits for an answer."""
    process = mp.get_context("spawn").Process(target=lead, args=(store.port,))
    process.start()
    try:
        store.get("offer")
        yield process
    finally:
        process.kill()
        process.join()


def names() -> set[str]:
    """What lies in the folder that shared memory usually has."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("saqqara")}


def test_the_other_rank_finds_the_memory(store: TCPStore, leader: mp.process.BaseProcess) -> None:
    _, memory, verdict = shared_memory._follow(store, 1, 2, None)
    assert memory is not None
    assert (len(memory), verdict.reason) == (NUM_BYTES, None)
    assert verdict.process_ids == (leader.pid, os.getpid())
    assert json.loads(store.get("marked")) is None
    assert memory[7] == 42
    leader.kill()
    leader.join()
    assert memory[7] == 42, "it lives as long as one of them"


def test_a_rank_that_is_killed_before_the_others_attach_leaves_nothing(
    store: TCPStore, leader: mp.process.BaseProcess
) -> None:
    leader.kill()
    leader.join()
    assert names() == set()
    offer = shared_memory._Offer(**json.loads(store.get("offer")))
    assert shared_memory._open(offer) == (None, shared_memory.NOT_HERE)
