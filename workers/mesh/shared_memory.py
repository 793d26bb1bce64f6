"""How ranks of one host come to share memory: one offers it, all agree or none uses it.

Tensor rank 0 makes memory that is in no folder, under a random name, and tells the name and its own
descriptor through the rendezvous store. The others open that descriptor: only on the same host does
it have this name. Whenever ranks die, the system frees the memory with the last one that has it.
"""

import json
import mmap
import os
import secrets
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__

if TYPE_CHECKING:
    from saqqara.workers.native.exchange import Exchange

# Some 450 tokens of a hidden size of 576 in bf16; a quarter or the double is as fast.
_SLOT_BYTES_PER_THREAD = 512 * 1024
_MAX_BYTES = 16 * 1024 * 1024
_NAME_BYTES = 16
_PAGE_BYTES = 4096
NOT_HERE = "not on the host of tensor rank 0"


@dataclass(frozen=True, slots=True)
class _Offer:
    """What rank 0 tells: where the memory is, or a reason why there is none."""

    reason: str | None
    name: str = ""
    process_id: int = 0
    descriptor: int = -1
    num_bytes: int = 0
    slot_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What rank 0 makes of all answers: who takes part, or a reason why nobody does."""

    reason: str | None
    process_ids: tuple[int, ...]


def join(
    store: Store, rank: int, num_ranks: int, timeout_seconds: float
) -> "tuple[Exchange | None, str]":
    """Share memory with the other ranks of a tensor group; all call it and come to the same end.

    Args:
        store: the rendezvous store, or the part of it that belongs to this group.
        rank: tensor rank.
        num_ranks: size of the group.
        timeout_seconds: how long operations may wait for a rank.

    Returns:
        The exchange, or None where one of the ranks cannot take part; and why.
    """
    from saqqara.workers.native.build import unavailable_reason

    problem = unavailable_reason()
    problem = problem and f"no native kernels: {problem}"
    lead_or_follow = _lead if rank == 0 else _follow
    offer, memory, verdict = lead_or_follow(store, rank, num_ranks, problem)
    if verdict.reason is not None:
        return None, verdict.reason
    assert memory is not None, "the verdict is that every rank has the memory"
    from saqqara.workers.native.exchange import Exchange

    exchange = Exchange(memory, rank, verdict.process_ids, offer.slot_bytes, timeout_seconds)
    return exchange, f"{num_ranks} ranks on this host share {offer.num_bytes >> 10} KiB"


_Outcome = tuple[_Offer, torch.Tensor | None, _Verdict]


def _lead(store: Store, rank: int, num_ranks: int, problem: str | None) -> _Outcome:
    """Rank 0's part: make the memory, hear the others, tell the verdict."""
    offer, memory = _make(num_ranks, problem)
    try:
        store.set("offer", json.dumps(asdict(offer)))
        answers = [_answer(offer.reason)]
        answers += [json.loads(store.get(f"answer{other}")) for other in range(1, num_ranks)]
    finally:
        if memory is not None:
            os.close(offer.descriptor)  # what is mapped stays
    reasons = [
        f"tensor rank {rank}: {reason}"
        for rank, answer in enumerate(answers)
        if (reason := answer["reason"]) is not None
    ]
    pids = tuple(answer["process_id"] for answer in answers)
    verdict = _Verdict(reasons[0] if reasons else None, pids)
    store.set("verdict", json.dumps(asdict(verdict)))
    return offer, memory, verdict


def _follow(store: Store, rank: int, num_ranks: int, problem: str | None) -> _Outcome:
    """The others' part: open the memory, say whether that worked, hear the verdict."""
    offer = _Offer(**json.loads(store.get("offer")))
    memory = None
    if offer.reason is None and problem is None:
        memory, problem = _open(offer)
    store.set(f"answer{rank}", json.dumps(_answer(problem)))
    verdict = json.loads(store.get("verdict"))
    return offer, memory, _Verdict(verdict["reason"], tuple(verdict["process_ids"]))


def _answer(reason: str | None) -> dict[str, Any]:
    return {"reason": reason, "process_id": os.getpid()}


def _make(num_ranks: int, problem: str | None) -> tuple[_Offer, torch.Tensor | None]:
    """New shared memory of zeros, or the reason why there is none."""
    if problem is not None:
        return _Offer(problem), None
    from saqqara.workers.native.exchange import memory_bytes

    slot_bytes = _SLOT_BYTES_PER_THREAD * torch.get_num_threads()
    slot_bytes = min(slot_bytes, _MAX_BYTES // (2 * num_ranks)) // _PAGE_BYTES * _PAGE_BYTES
    num_bytes = memory_bytes(num_ranks, slot_bytes)
    name = f"saqqara-{secrets.token_hex(_NAME_BYTES)}"
    try:
        descriptor = os.memfd_create(name)
    except OSError as error:
        return _Offer(f"shared memory: {error}"), None
    try:
        # Taken now: where memory is short, writing later would end the process.
        os.posix_fallocate(descriptor, 0, num_bytes)
        memory = _map(descriptor, num_bytes)
    except OSError as error:
        os.close(descriptor)
        return _Offer(f"{num_bytes} bytes of shared memory: {error}"), None
    return _Offer(None, name, os.getpid(), descriptor, num_bytes, slot_bytes), memory


def _open(offer: _Offer) -> tuple[torch.Tensor | None, str | None]:
    """The memory of an offer, or the reason why this rank does not have it."""
    path = f"/proc/{offer.process_id}/fd/{offer.descriptor}"
    try:
        if os.readlink(path) != f"/memfd:{offer.name} (deleted)":
            return None, NOT_HERE
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None, NOT_HERE
    except OSError as error:
        return None, str(error)
    try:
        return _map(descriptor, offer.num_bytes), None
    except (OSError, ValueError) as error:
        return None, str(error)
    finally:
        os.close(descriptor)


def _map(descriptor: int, num_bytes: int) -> torch.Tensor:
    """A file as uint8 [num_bytes]; it stays mapped as long as the tensor lives."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
