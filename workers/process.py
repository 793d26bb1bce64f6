"""What a worker needs of its whole process, which only who owns the process may change."""

import ctypes
import logging
import os

import torch

from saqqara.configs.worker_settings import WorkerSettings

from .cgroups import usable_cores
from .part import choose_device

logger = logging.getLogger(__name__)

THREADS_PER_CORE = 4

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP_BYTES = 1 << 30


def prepare_process(config: WorkerSettings, rank: int = 0) -> None:
    """Set the threads, the current GPU and the allocator of a process that will run a worker.

    A worker sets none of these: they belong to everything else in its process, too. Without
    `num_threads` they are PyTorch's, or as many as there are cores to use, where these are fewer
    and the environment does not say how many.

    Raises:
        ValueError: more threads than this machine can have, or a GPU that it has not.
    """
    if config.num_threads is not None:
        check_threads(config.num_threads)
        torch.set_num_threads(config.num_threads)
    elif not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        _spare_quota(usable_cores())
    device = choose_device(config, rank)
    if device.type == "cpu":
        _reuse_freed_memory()
    else:
        torch.cuda.set_device(device)


def _spare_quota(cores: int) -> None:
    """Lower PyTorch's threads to the cores: it knows of affinity, not of a container's quota."""
    if torch.get_num_threads() > cores:
        logger.info(
            "threads: %d instead of PyTorch's %d, as many as the cores that this process may use",
            cores,
            torch.get_num_threads(),
        )
        torch.set_num_threads(cores)


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
