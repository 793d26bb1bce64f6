"""Collectives of ranks that share memory: sums, joined shards, broadcasts.

A sum reads every rank's part in the order of ranks, in fp32, and is rounded once, so that all ranks
get the same bits. What is larger than a slot of the memory goes through it piece by piece; every
piece costs one meeting of the ranks. The kernels are in `exchange.cpp`.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from ctypes import POINTER, c_int64, c_void_p
from typing import Any

import psutil
import torch
from torch import Tensor

from .build import function, pointer

_MET, _LATE, _MISMATCH = range(3)
# How long a kernel waits before Python looks at signals, at the clock and after the late rank.
_PATIENCE_NANOSECONDS = 500_000_000
# What an operation does; with the bytes of its piece the number that ranks compare.
_SUM, _JOIN, _BROADCAST = range(3)
_KINDS = 4
_ADDED = (torch.bfloat16, torch.float32)


class _Exchange(ctypes.Structure):
    _fields_ = (
        ("memory", c_void_p),
        ("ranks", c_int64),
        ("rank", c_int64),
        ("slot_bytes", c_int64),
    )


_EXCHANGE = c_void_p
_TENSOR = c_void_p
_COUNT = c_int64

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "header_bytes": (_COUNT,),
    "meet": (_EXCHANGE, _COUNT, _COUNT, _COUNT, POINTER(c_int64)),
    "sum": (_EXCHANGE, _COUNT, _COUNT, _COUNT, _TENSOR, _TENSOR, _COUNT),
    "join": (_EXCHANGE, _COUNT, _COUNT, _COUNT, _COUNT, _TENSOR),
}
_RESULTS = {"header_bytes": c_int64, "meet": c_int64}


@functools.cache
def _kernel(name: str) -> Callable[..., Any]:
    return function(f"saqqara_exchange_{name}", _SIGNATURES[name], _RESULTS.get(name))


def memory_bytes(num_ranks: int, slot_bytes: int) -> int:
    """Bytes that an exchange needs.

    Raises:
        NativeUnavailableError: this machine cannot run the kernels; with the reason.
    """
    header: int = _kernel("header_bytes")(num_ranks)
    return header + 2 * num_ranks * slot_bytes


class Exchange:
    """One rank's end of the shared memory.

    All ranks call the same operations with the same shapes and dtypes, in the same order.

    Args:
        memory: uint8, zeros at first, `memory_bytes` long; the same memory on every rank.
        rank: this rank.
        process_ids: of every rank; their number is the number of ranks.
        slot_bytes: the largest piece; a multiple of 64.
        timeout_seconds: how long an operation may wait for a rank.
    """

    def __init__(
        self,
        memory: Tensor,
        rank: int,
        process_ids: tuple[int, ...],
        slot_bytes: int,
        timeout_seconds: float,
    ) -> None:
        num_ranks = len(process_ids)
        assert memory.numel() == memory_bytes(num_ranks, slot_bytes), memory.shape
        assert slot_bytes % 64 == 0, f"slots of {slot_bytes} bytes are not aligned"
        self.num_ranks = num_ranks
        self.slot_bytes = slot_bytes
        self._rank = rank
        self._memory = memory  # keeps what the addresses point to
        # Only those that can be seen from here; a container may hide the others.
        self._process_ids = {r: p for r, p in enumerate(process_ids) if _is_running(p)}
        self._timeout_seconds = timeout_seconds
        self._number = 0  # of the operation that comes next
        slots = memory[-2 * num_ranks * slot_bytes :].view(2, num_ranks, slot_bytes)
        self._addresses = [[slot.data_ptr() for slot in buffer] for buffer in slots]
        self._own = {dtype: slots[:, rank].view(dtype).unbind() for dtype in _ADDED}
        self._exchange = _Exchange(pointer(memory, torch.uint8), num_ranks, rank, slot_bytes)
        self._address = ctypes.addressof(self._exchange)
        self._who = c_int64()
        self._meet_kernel = _kernel("meet")
        self._sum_kernel = _kernel("sum")
        self._join_kernel = _kernel("join")

    @staticmethod
    def adds(dtype: torch.dtype) -> bool:
        """Whether `all_reduce` takes this dtype."""
        return dtype in _ADDED

    def partial_like(self, x: Tensor) -> Tensor | None:
        """A place like x, bf16 or fp32, in the shared memory; None if a slot is too small for it.

        What is written there is this rank's part of a sum if `all_reduce` of it is the next
        operation; until then it is this rank's own.
        """
        if x.nbytes > self.slot_bytes:
            return None
        return self._own[x.dtype][self._number % 2][: x.numel()].view(x.shape)

    def all_reduce(self, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """Write the sum of all ranks' x, plus `residual`, to `out`; bf16 or fp32, contiguous.

        Args:
            x: this rank's part; from `partial_like` it is not copied.
            residual: the same on all ranks, or None.
            out: may be x, unless that is from `partial_like`, or `residual`.
        """
        assert out.shape == x.shape, (out.shape, x.shape)
        assert residual is None or residual.shape == x.shape, (residual.shape, x.shape)
        size = x.itemsize
        source, target = pointer(x, x.dtype), pointer(out, x.dtype)
        added = None if residual is None else pointer(residual, x.dtype)
        for first in range(0, x.nbytes, self.slot_bytes):
            count = min(self.slot_bytes, x.nbytes - first)
            self._fill(source + first, count)
            self._meet(_SUM, count)
            self._sum_kernel(
                self._address,
                self._number,
                count // size,
                x.dtype == torch.float32,
                None if added is None else added + first,
                target + first,
                torch.get_num_threads(),
            )
            self._number += 1

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Join the equal shards [..., V/t] of all ranks to [..., V]; any dtype."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], x.shape[-1] * self.num_ranks)
        row_bytes = x.shape[-1] * x.itemsize
        for first in range(0, x.nbytes, self.slot_bytes):
            count = min(self.slot_bytes, x.nbytes - first)
            self._fill(x.data_ptr() + first, count)
            self._meet(_JOIN, count)
            self._join_kernel(self._address, self._number, first, count, row_bytes, out.data_ptr())
            self._number += 1
        return out

    def broadcast(self, x: Tensor, root: int) -> None:
        """Overwrite x, contiguous, of any dtype, with that of rank `root`."""
        address = pointer(x, x.dtype)
        for first in range(0, x.nbytes, self.slot_bytes):
            count = min(self.slot_bytes, x.nbytes - first)
            if self._rank == root:
                self._fill(address + first, count)
            self._meet(_BROADCAST, count)
            if self._rank != root:
                source = self._addresses[self._number % 2][root]
                ctypes.memmove(address + first, source, count)
            self._number += 1

    def _fill(self, source: int, count: int) -> None:
        slot = self._addresses[self._number % 2][self._rank]
        if source != slot:
            ctypes.memmove(slot, source, count)

    def _meet(self, kind: int, count: int) -> None:
        """Wait until all ranks have filled their slots.

        Raises:
            TimeoutError: a rank did not come in time.
            ConnectionError: its process has ended.
            RuntimeError: a rank came with another operation.
        """
        started = None
        while True:
            outcome = self._meet_kernel(
                self._address,
                self._number,
                count * _KINDS + kind,
                _PATIENCE_NANOSECONDS,
                ctypes.byref(self._who),
            )
            if outcome == _MET:
                return
            if outcome == _MISMATCH:
                raise RuntimeError(
                    f"tensor ranks {self._rank} and {self._who.value} are out of step: they do not "
                    f"do the same in operation {self._number}"
                )
            started = started or time.monotonic() - _PATIENCE_NANOSECONDS / 1e9
            self._check_late(self._who.value, time.monotonic() - started)

    def _check_late(self, rank: int, seconds: float) -> None:
        process_id = self._process_ids.get(rank)
        if process_id is not None and not _is_running(process_id):
            raise ConnectionError(f"tensor rank {rank} has ended (process {process_id})")
        if seconds > self._timeout_seconds:
            raise TimeoutError(
                f"tensor rank {rank} did not come to operation {self._number} of its group "
                f"within {self._timeout_seconds:g} seconds"
            )


def _is_running(process_id: int) -> bool:
    try:
        status = psutil.Process(process_id).status()
    except psutil.NoSuchProcess:
        return False
    return status != psutil.STATUS_ZOMBIE
