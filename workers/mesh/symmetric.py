"""Sums over the GPUs of one host through memory that each of them maps of all others.

torch calls it symmetric memory. A decode step sums a few hundred KiB at a time, for which NCCL's
latency counts; here one kernel reads the parts of all ranks (one shot), or sums a share of its own
and reads the others' (two shots). All ranks come to the same end: every one of them takes part, or
none does, and why is told.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__

UNMASKED = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1"
_MAX_BYTES = 8 * 1024 * 1024  # 512 rows of 8,192 bf16 numbers; longer sums are NCCL's
_ONE_SHOT_BYTES = {2: _MAX_BYTES, 3: 512 * 1024, 4: 512 * 1024}
_ONE_SHOT_OF_MANY = 256 * 1024  # each rank reads all others: with more of them, up to fewer bytes
_DTYPES = (torch.bfloat16, torch.float32)
_ALIGNED_BYTES = 16


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a rank tells of its GPU.

    Attributes:
        host: tells hosts apart.
        index: of the device, as torch counts in the rank's process.
        problem: why the rank cannot take part, or None.
    """

    host: str
    index: int
    problem: str | None = None


class SymmetricSum:
    """Sums of small tensors over the ranks of a group.

    Args:
        buffer: uint8 [_MAX_BYTES] on this rank's GPU, mapped by all ranks.
        group: name of their process group.
        num_ranks: how many they are.
        ops: where torch has its operators.
    """

    def __init__(
        self, buffer: torch.Tensor, group: str, num_ranks: int, ops: Any = torch.ops.symm_mem
    ) -> None:
        self._buffer = buffer
        self._group = group
        self._ops = ops
        self._one_shot_bytes = _ONE_SHOT_BYTES.get(num_ranks, _ONE_SHOT_OF_MANY)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x can be summed here: the same answer on all ranks for the same shapes."""
        num_bytes = x.numel() * x.itemsize
        fits = 0 < num_bytes <= len(self._buffer) and num_bytes % _ALIGNED_BYTES == 0
        return fits and x.dtype in _DTYPES and x.is_contiguous()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor, the sum of all ranks' x; it is enqueued, like any kernel."""
        num_bytes = x.numel() * x.itemsize
        shared = self._buffer[:num_bytes].view(x.dtype).view(x.shape)
        if num_bytes <= self._one_shot_bytes:
            total: torch.Tensor = self._ops.one_shot_all_reduce_copy(shared, x, "sum", self._group)
            return total
        shared.copy_(x)
        total = torch.empty_like(x)
        self._ops.two_shot_all_reduce_out(shared, "sum", self._group, total)
        return total


def join(
    store: Store,
    rank: int,
    num_ranks: int,
    gpu: Gpu,
    map_memory: Callable[[], torch.Tensor],
    group: str,
) -> tuple[SymmetricSum | None, str]:
    """Map the memory of the other ranks of a tensor group; all call it and come to the same end.

    Args:
        store: the rendezvous store, or the part of it that belongs to this group.
        rank: tensor rank.
        num_ranks: size of the group.
        gpu: this rank's.
        map_memory: makes this rank's buffer and maps the others' (`map_buffers`); a `RuntimeError`
            says why it cannot be.
        group: name of the process group.

    Returns:
        The sums, or None where one of the ranks cannot take part; and why.
    """
    gpus = [Gpu(**told) for told in _tell(store, "gpu", rank, num_ranks, asdict(gpu))]
    if (reason := why_not(gpus)) is not None:
        return None, reason
    buffer, problem = None, None
    try:
        buffer = map_memory()
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
    problems: list[str | None] = _tell(store, "mapped", rank, num_ranks, problem)
    for other, reason in enumerate(problems):
        if reason is not None:
            return None, f"tensor rank {other}: {reason}"
    assert buffer is not None, "no rank has a problem"
    return SymmetricSum(buffer, group, num_ranks), f"{num_ranks} GPUs of one host map each other"


def why_not(gpus: Sequence[Gpu]) -> str | None:
    """Why ranks with these GPUs, by rank, cannot map each other's memory, or None."""
    for rank, gpu in enumerate(gpus):
        if gpu.problem is not None:
            return f"tensor rank {rank}: {gpu.problem}"
        if gpu.host != gpus[0].host:
            return f"tensor rank {rank} is on another host than tensor rank 0"
    indices = [gpu.index for gpu in gpus]
    for rank, index in enumerate(indices):
        if (first := indices.index(index)) != rank:
            return (
                f"tensor ranks {first} and {rank} both call their GPU cuda:{index}, by which torch "
                f"tells GPUs apart: ranks must see all GPUs of the host, which Ray lets them do on "
                f"nodes that were started with {UNMASKED}"
            )
    return None


def gpu_of(device: torch.device) -> Gpu:
    """What this process has to tell of its GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    problem = None
    if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy"):
        problem = f"torch {torch.__version__} has no symmetric memory"
    return Gpu(_host_id(), index, problem)


def map_buffers(device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's buffer, uint8 [8 MiB], mapped by all ranks of the group, as theirs are here.

    Raises:
        RuntimeError: the driver does not map memory of one of the GPUs.
    """
    from torch.distributed import _symmetric_memory  # an alpha API: imported where it is used

    buffer = _symmetric_memory.empty(_MAX_BYTES, dtype=torch.uint8, device=device)
    _symmetric_memory.rendezvous(buffer, group)
    return buffer


def _tell(store: Store, what: str, rank: int, num_ranks: int, own: Any) -> list[Any]:
    """What every rank has to say, by rank."""
    store.set(f"{what}{rank}", json.dumps(own, allow_nan=False))
    return [json.loads(store.get(f"{what}{other}")) for other in range(num_ranks)]


def _host_id() -> str:
    """The same in all processes of one boot of one machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{os.uname().nodename} {file.read().strip()}"
