"""Whether to start lost workers again, and when. Time comes from outside."""

from collections import deque
from dataclasses import dataclass

from .clock import Clock


@dataclass(frozen=True, slots=True)
class RecoveryLimits:
    """How long starting again is tried.

    Attributes:
        max_attempts: starts within the window and since the last new token, of any request.
        window_seconds: starts longer ago than this do not count.
        first_wait_seconds: before the second start in a row (the first comes at once); then twice
            as long before each.
        max_wait_seconds: most of these waits.
    """

    max_attempts: int = 8
    window_seconds: float = 1800.0
    first_wait_seconds: float = 1.0
    max_wait_seconds: float = 30.0


class Attempts:
    """Counts starts of workers, says how long to wait for the next, and when it is hopeless.

    Args:
        limits: of the attempts.
        clock: of the engine.
    """

    def __init__(self, limits: RecoveryLimits, clock: Clock) -> None:
        self.limits = limits
        self._clock = clock
        self._times: deque[float] = deque()

    @property
    def num_recent(self) -> int:
        """Starts that count: in the window and since the last new token."""
        oldest = self._clock.now() - self.limits.window_seconds
        while self._times and self._times[0] < oldest:
            self._times.popleft()
        return len(self._times)

    @property
    def is_hopeless(self) -> bool:
        """Whether another start would be one too many."""
        return self.num_recent >= self.limits.max_attempts

    @property
    def wait_seconds(self) -> float:
        """How long to wait before the next start."""
        if self.num_recent == 0:
            return 0.0
        doubled: float = self.limits.first_wait_seconds * 2.0 ** (self.num_recent - 1)
        return min(doubled, self.limits.max_wait_seconds)

    def begin(self) -> None:
        """Workers are being started now."""
        self._times.append(self._clock.now())

    def forget(self) -> None:
        """It was worth it: there is a new token."""
        self._times.clear()
