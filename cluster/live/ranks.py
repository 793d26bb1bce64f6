"""What is known of each rank: its pages, its memory, its seconds by phase, and whether it lives."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.workers.plan import StepResult, WorkerInfo, WorkerMemory


@dataclass(frozen=True, slots=True)
class RankSeen:
    """One rank as it was last heard of; `seconds` are by phase, since the engine's start."""

    worker: WorkerInfo
    pages_free: int
    memory: WorkerMemory
    seconds: Mapping[str, float]
    is_alive: bool
    times_lost: int


class Ranks:
    """The ranks of an engine, by rank; those that replace lost ones go on with their numbers."""

    def __init__(self, workers: Sequence[WorkerInfo]) -> None:
        self._seconds = [defaultdict[str, float](float) for _ in workers]
        self._times_lost = Counter[int]()
        self.replace(workers)

    def replace(self, workers: Sequence[WorkerInfo]) -> None:
        """The engine runs on these workers from now on; their pools are empty."""
        self.workers = tuple(workers)
        self.pages_free = [w.num_pages for w in workers]
        self.memory = [w.memory for w in workers]

    def note(self, result: StepResult) -> None:
        """Take in what a rank says of a step."""
        self.pages_free[result.rank] = result.pages_free
        self.memory[result.rank] = result.memory
        seconds = self._seconds[result.rank]
        for phase, spent in result.seconds.items():
            seconds[phase] += spent

    def lose(self, rank: int) -> None:
        """A rank has ended the others' work; -1: nobody knows which."""
        self._times_lost[rank] += 1

    @property
    def pages_in_use(self) -> int:
        """Pages that are not free, of all ranks."""
        return sum(w.num_pages for w in self.workers) - sum(self.pages_free)

    def used_share(self, idle_pages: NDArray[np.int64]) -> float:
        """Share of the pages in use, of the rank with the least free.

        Those that hold what nobody uses now are as good as free: `idle_pages`, by rank.
        """
        num_pages = np.array([worker.num_pages for worker in self.workers])
        # What is idle once the planned steps have run may lie in pages that no rank has told of.
        free = np.minimum(np.array(self.pages_free) + idle_pages, num_pages)
        return float((1 - free / num_pages).max())

    def seconds(self, rank: int) -> Mapping[str, float]:
        """Seconds by phase of a rank since the engine's start."""
        return self._seconds[rank]

    def seen(self, *, are_alive: bool) -> tuple[RankSeen, ...]:
        """All ranks; they live and die together."""
        return tuple(
            RankSeen(
                worker,
                self.pages_free[rank],
                self.memory[rank],
                dict(self._seconds[rank]),
                are_alive,
                self._times_lost[rank],
            )
            for rank, worker in enumerate(self.workers)
        )
