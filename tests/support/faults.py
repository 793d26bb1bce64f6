"""Faults of a job on Ray, when each came, and when the logs say that it was noticed and over."""

import os
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from .chaos_job import sleep_file

KINDS = {  # how many of twenty-four
    "kill rank": 8,
    "stop rank": 4,
    "rank asleep in a layer": 4,
    "kill controller": 2,
    "stop controller": 2,
    "kill driver": 2,
    "stop driver": 2,
}
NUM_RANKS = 4
STOPPED_SECONDS = 8.0  # of the driver, until it goes on
_TIME = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ", re.M)
_LOST = re.compile(r"workers are lost|the controller has (died|fallen silent)")
_AGAIN = re.compile(r"the first new token comes|the first answer comes")


@dataclass(frozen=True)
class Fault:
    """A fault and the moment it came, Unix time; `is_early` if the last one was not over."""

    kind: str
    at: float
    is_early: bool


@dataclass(frozen=True)
class Outcome:
    """What the logs say of a fault, in seconds after it."""

    kind: str
    detected: float
    back: float


def schedule(num_faults: int, chance: random.Random) -> list[str]:
    """Kinds of faults in random order, in the proportions of `KINDS`."""
    of_each = [kind for kind, count in KINDS.items() for _ in range(count)]
    kinds = [of_each[i * len(of_each) // num_faults] for i in range(num_faults)]
    chance.shuffle(kinds)
    return kinds


def actors(name: str) -> list[psutil.Process]:
    """Processes of actors of this class, on the Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = "".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith(f"ray::{name}"):
            found.append(process)
    return found


def inflict(
    kind: str, driver: psutil.Process, log_dir: Path, chance: random.Random
) -> float | None:
    """Do it; the moment it was done, or None where nobody was there to suffer it."""
    if kind == "rank asleep in a layer":
        return _send_to_sleep(log_dir, chance)
    victims = {"rank": "RankProcess", "controller": "Controller"}
    how, _, who = kind.partition(" ")
    candidates = [driver] if who == "driver" else actors(victims[who])
    if not candidates:
        return None
    victim = chance.choice(candidates)
    at = time.time()
    try:
        victim.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    except psutil.NoSuchProcess:
        return None
    if who == "driver" and how == "stop":
        time.sleep(STOPPED_SECONDS)
        victim.send_signal(signal.SIGCONT)
    return at


def _send_to_sleep(log_dir: Path, chance: random.Random) -> float | None:
    """Have one of the ranks sleep in its next step; None if there is no step for long."""
    file = sleep_file(log_dir, chance.randrange(NUM_RANKS))
    file.touch()
    deadline = time.monotonic() + 60
    while file.exists():
        if time.monotonic() > deadline:
            file.unlink(missing_ok=True)
            return None
        time.sleep(0.01)
    return time.time()


def outcomes(faults: Sequence[Fault], logs: Sequence[Path]) -> Iterator[Outcome]:
    """When each fault was noticed and over, of those that had the stage to themselves.

    A driver's end is not noticed by anybody but who starts it again, and a stopped one goes on.
    """
    lost = sorted(_moments(logs, _LOST))
    again = sorted(_moments(logs, _AGAIN))
    for fault, following in zip(faults, [*faults[1:], None], strict=True):
        is_crowded = fault.is_early or (following is not None and following.is_early)
        if is_crowded or fault.kind.endswith("driver"):
            continue
        noticed = next((at for at in lost if at >= fault.at), None)
        over = next((at for at in again if at >= fault.at), None)
        assert noticed is not None, f"nobody noticed: {fault}"
        assert over is not None, f"never over: {fault}"
        yield Outcome(fault.kind, noticed - fault.at, over - fault.at)


def num_losses(logs: Sequence[Path]) -> int:
    """How often somebody was taken for lost."""
    return len(list(_moments(logs, _LOST)))


def first_loss(log: Path, since: float) -> float | None:
    """When somebody was first taken for lost after this moment, Unix time; None: nobody yet."""
    return next((at for at in sorted(_moments([log], _LOST)) if at >= since), None)


def _moments(logs: Sequence[Path], pattern: re.Pattern[str]) -> Iterator[float]:
    for log in logs:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            stamp = _TIME.match(line)
            if stamp is not None and pattern.search(line):
                yield datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def listening(processes: Sequence[psutil.Process]) -> list[str]:
    """Addresses that these processes listen at."""
    ids = {process.pid for process in processes}
    return [
        str(connection.laddr)
        for connection in psutil.net_connections("tcp")
        if connection.pid in ids and connection.status == psutil.CONN_LISTEN
    ]


def shared_memory() -> set[str]:
    """Names of shared memory on this machine, but for that of Ray itself."""
    return {
        name for name in os.listdir("/dev/shm") if not name.startswith(("plasma", "ray", "sem."))
    }
