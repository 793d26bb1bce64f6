"""What a worker needs of its whole process, which only who owns the process may change."""

import ctypes
import os

import torch

from saqqara.configs.worker_settings import WorkerSettings

from .part import choose_device

THREADS_PER_CORE = 4

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP_BYTES = 1 << 30


def prepare_process(config: WorkerSettings, rank: int = 0) -> None:
    """Set the threads, the current GPU and the allocator of a process that will run a worker.

    A worker sets none of these: they belong to everything else in its process, too.

    Raises:
        ValueError: more threads than this machine can have, or a GPU that it has not.
    """
    if config.num_threads is not None:
        check_threads(config.num_threads)
        torch.set_num_threads(config.num_threads)
    device = choose_device(config, rank)
    if device.type == "cpu":
        _reuse_freed_memory()
    else:
        torch.cuda.set_device(device)


def check_threads(num_threads: int) -> None:
    """Raise a ValueError if that many are no small multiple of the host's cores."""
    cores = os.cpu_count() or 1
    if num_threads > THREADS_PER_CORE * cores:
        raise ValueError(
            f"num_threads={num_threads} is too many for this machine's {cores} cores; it can be 1 "
            f"to {THREADS_PER_CORE * cores}"
        )


def _reuse_freed_memory() -> None:
    """Let glibc keep what large temporaries free, instead of unmapping it.

    By default each activation tensor of a prefill is mapped afresh and every page of it faults in
    anew, which costs several times the arithmetic of a norm. Does nothing under another libc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
