"""A limit on a process's memory that the kernel keeps: a control group. It takes root."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A control group; what enters it may hold so much, what it reads of files included.

    The kernel drops pages of files to keep the limit, and kills who needs more than that.

    Attributes:
        enter: puts the calling process into it; for `subprocess.Popen(preexec_fn=...)`.
        num_kills: how many processes the kernel has killed to keep the limit.
    """

    enter: Callable[[], None]
    num_kills: Callable[[], int]


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[MemoryLimit | None]:
    """A limit while the context lasts; None where this process may not set one.

    All processes that entered must have ended before.
    """
    is_v2 = (ROOT / "cgroup.controllers").exists()
    folder = (ROOT if is_v2 else ROOT / "memory") / f"limit-{os.getpid()}"
    limit = folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            limit.write_text(str(num_bytes))
        except OSError:
            yield None
            return
        events = folder / ("memory.events" if is_v2 else "memory.oom_control")

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

        def num_kills() -> int:
            counts = dict(line.split() for line in events.read_text().splitlines())
            return int(counts["oom_kill"])

        yield MemoryLimit(enter, num_kills)
    finally:
        folder.rmdir()
