"""Memory that this process may use, and what it holds; on Linux as the kernel says it."""

import os
from pathlib import Path

from .cgroups import memory_limits

_MEMORY = Path("/proc/meminfo")
_PROCESS = Path("/proc/self/statm")
_MACHINE = "the machine"


def available_bytes() -> int:
    """Bytes that can be taken without swapping, and without leaving a control group's limit."""
    return min([_machine_available_bytes(), *(limit.left_bytes for limit in memory_limits())])


def total_bytes() -> int:
    """Bytes of memory that the machine has, or that a control group may take of it, if fewer."""
    return min([_machine_bytes(), *(limit.limit_bytes for limit in memory_limits())])


def total_owner() -> str:
    """Whose memory `total_bytes` are: the machine's, or those of the file with a lower limit."""
    limits = [(limit.limit_bytes, str(limit.file)) for limit in memory_limits()]
    return min([(_machine_bytes(), _MACHINE), *limits])[1]


def available_owner() -> str:
    """What leaves no more than `available_bytes`: the machine, or the file of a limit."""
    limits = [(limit.left_bytes, str(limit.file)) for limit in memory_limits()]
    return min([(_machine_available_bytes(), _MACHINE), *limits])[1]


def resident_bytes() -> int:
    """Bytes of this process that are in memory."""
    if _PROCESS.exists():
        pages = _PROCESS.read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _machine_available_bytes() -> int:
    if _MEMORY.exists():
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    import psutil

    return int(psutil.virtual_memory().available)
