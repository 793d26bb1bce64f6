"""Memory of the host, and what this process holds; on Linux as the kernel says it."""

import os
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_PROCESS = Path("/proc/self/statm")


def available_bytes() -> int:
    """Bytes that can be taken without swapping."""
    if _MEMORY.exists():
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    import psutil

    return int(psutil.virtual_memory().available)


def total_bytes() -> int:
    """Bytes of memory that the host has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Bytes of this process that are in memory."""
    if _PROCESS.exists():
        pages = _PROCESS.read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)
