"""What the control groups of this process leave it of its machine's memory and processors.

Containers, pods, systemd's slices and Slurm's jobs are control groups, whose limits are seldom
those of the machine. A process is in one group of each hierarchy, and the limits of all groups
above it hold, too, as far as they can be seen from within. Sources: the kernel's `cgroup-v2.rst`,
`cgroup-v1/memory.rst` and `sched-bwc.rst`, and `proc_pid_mountinfo(5)`.

What cannot be read sets no limit: a kernel without control groups, another system than Linux.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A group's limit of memory.

    Attributes:
        limit_bytes: that its processes may take together.
        left_bytes: what they have not taken yet. File pages that nobody used of late count as not
            taken, because the kernel gives them up before it ends a process.
        file: that sets the limit.
    """

    limit_bytes: int
    left_bytes: int
    file: Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy, at least 1.

    As many as its affinity allows, or the quota of its groups, rounded up, where that is less.
    `root` is where `/proc` and `/sys` lie.
    """
    # Other systems than Linux know of no affinity.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quotas = (quota for folder in _folders("cpu", root) for quota in _quotas(folder))
    return max(1, min([cores, *map(math.ceil, quotas)]))


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The memory limits that hold for this process; `root` is where `/proc` and `/sys` lie."""
    return [limit for folder in _folders("memory", root) for limit in _limits(folder)]


def _limits(folder: Path) -> Iterator[MemoryLimit]:
    """The limits of one group, of either version."""
    lines = re.finditer(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    facts = {line[1]: int(line[2]) for line in lines}
    # Version 1 counts the groups below only in totals; the limits of those above may not be seen.
    idle_bytes = facts.get("total_inactive_file", facts.get("inactive_file", 0))
    for name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.high", "memory.current"),  # beyond which processes are slowed down until they give
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = _number(folder / name)
        if limit is None:
            continue
        if name == "memory.limit_in_bytes":
            limit = min(limit, facts.get("hierarchical_memory_limit", limit))
        used = (_number(folder / used_name) or 0) - idle_bytes
        yield MemoryLimit(limit, max(limit - max(used, 0), 0), folder / name)


def _quotas(folder: Path) -> Iterator[float]:
    """Cores that one group may use, of either version."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if period and quota != "max":
        yield int(quota) / int(period)
    quota_us = _number(folder / "cpu.cfs_quota_us")
    period_us = _number(folder / "cpu.cfs_period_us")
    if quota_us is not None and period_us and quota_us > 0:  # -1: no limit
        yield quota_us / period_us


def _folders(controller: str, root: Path) -> list[Path]:
    """The folders of this process's groups that may limit something, from its own upwards."""
    groups = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        here, _, about = line.partition(" - ")
        inner, mount_point = (_unescaped(field) for field in here.split()[3:5])
        kind, _, options = about.split(" ", 2)
        for _, controllers, path in groups:
            of_version_2 = kind == "cgroup2" and not controllers
            of_version_1 = kind == "cgroup" and controller in controllers.split(",")
            if of_version_2 or (of_version_1 and controller in options.split(",")):
                top = root / mount_point.lstrip("/")
                below = _below(path, inner)
                found += [top / each for each in (below, *below.parents)]
    return list(dict.fromkeys(found))


def _below(path: str, inner: str) -> PurePosixPath:
    """Where a group lies below a mount point that shows the hierarchy from `inner` on.

    A path that leads elsewhere is of another namespace: the mount point is what can be seen.
    """
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(inner):
        return PurePosixPath()
    return group.relative_to(inner)


def _unescaped(field: str) -> str:
    """A field of mountinfo, in which blanks are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _number(file: Path) -> int | None:
    """What a file says, or None where there is none, or no limit."""
    text = _read(file)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _read(file: Path) -> str:
    """The text of a file, or nothing where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
