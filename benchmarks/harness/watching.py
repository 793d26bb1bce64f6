"""An executor that watches how many tokens the rows of each sequence keep while they decode."""

from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.compression.growth import cycle_of
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import StepPlan, StepResult

EVERY = 16  # tokens between the points of a plot


@dataclass
class Track:
    """What the rows of one sequence were like; lengths in tokens.

    Attributes:
        limit: slack and one page; None where rows have no targets.
        targets: of each row, [L, H].
        longest: most tokens of any row within a step.
        over_target: most by which any row outgrew its target within a step.
        peak_bytes: of pages, between steps.
        mean_lengths: mean over the rows after every `EVERY`-th fed token.
    """

    limit: int | None
    grace: int
    targets: NDArray[np.int64] | None = None
    num_fed: int = 0
    longest: int = 0
    over_target: int = 0
    peak_bytes: int = 0
    mean_length: float = 0.0
    mean_lengths: list[float] = field(default_factory=list)


class WatchingExecutor(LocalExecutor):
    """A LocalExecutor that reads the length of every row after every step.

    Raises:
        RuntimeError: a row is longer than it may be.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.tracks: dict[str, Track] = {}  # by the retention's label
        self._labels: dict[int, str] = {}  # by slot

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Run a step and look at what it left."""
        for new in plan.new:
            self._labels[new.slot] = new.retention.label
            page_tokens = self.worker.info.page_tokens
            cycle = cycle_of(new.retention, new.prompt_tokens, page_tokens)
            limit = None if cycle is None else cycle.slack + page_tokens
            track = Track(limit, 0 if cycle is None else cycle.grace)
            self.tracks[new.retention.label] = track
        before = {item.slot: self.worker.kv.kept(item.slot) for item in plan.decode}
        future = super().execute(plan)
        [result] = future.result()
        for kept in result.kept:
            track = self.tracks[self._labels[kept.slot]]
            counts = np.frombuffer(kept.counts, dtype=np.int32).astype(np.int64)
            track.targets = counts.reshape(self.worker.kv.kept(kept.slot).shape) + track.grace
        for item in plan.decode:
            self._see(item.slot, before[item.slot] + item.num_tokens, item.num_tokens)
        return future

    def _see(self, slot: int, peak: NDArray[np.int32], num_tokens: int) -> None:
        """Note the rows of a slot: at their peak within the step, and as they are now."""
        track, kept = self.tracks[self._labels[slot]], self.worker.kv.kept(slot)
        assert track.targets is not None, "fed before its prefill ended"
        track.num_fed += num_tokens
        track.longest = max(track.longest, int(peak.max()))
        track.over_target = max(track.over_target, int((peak - track.targets).max()))
        page_bytes = self.worker.kv.page_bytes
        track.peak_bytes = max(track.peak_bytes, self.worker.kv.pages_of(slot) * page_bytes)
        track.mean_length = float(kept.mean())
        if track.num_fed % EVERY == 0:
            track.mean_lengths.append(track.mean_length)
        if track.limit is not None and track.over_target > track.limit:
            raise RuntimeError(
                f"{self._labels[slot]}: a row outgrew its target by {track.over_target} tokens "
                f"after {track.num_fed}; slack and one page are {track.limit}"
            )
