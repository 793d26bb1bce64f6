"""An outage ends with new workers, or with an error that says why there will be none."""

from collections import deque
from concurrent.futures import Future

import pytest
from support.fake_clock import FakeClock

from saqqara.cluster.errors import EngineDeadError, NotRecoverableError, WorkerDiedError
from saqqara.cluster.recovery.attempts import Attempts, RecoveryLimits
from saqqara.cluster.recovery.outage import Outage


class Ranks:
    """Starts that go as they are told to, one after the other; then all are good."""

    def __init__(self, clock: FakeClock, errors: list[Exception] | None = None) -> None:
        self._clock = clock
        self._errors = deque(errors or [])
        self.started_at: list[float] = []

    def recover(self) -> Future[None]:
        self.started_at.append(self._clock.now())
        future: Future[None] = Future()
        if self._errors:
            future.set_exception(self._errors.popleft())
        else:
            future.set_result(None)
        return future


def wait_for(outage: Outage) -> None:
    while not outage.is_over():
        pass


def test_workers_are_back_at_once_if_they_start() -> None:
    clock = FakeClock()
    ranks, attempts = Ranks(clock), Attempts(RecoveryLimits(), clock)
    failure = WorkerDiedError("rank 1 hangs", 1, cause="hung")
    outage = Outage(failure, ranks, attempts, clock)
    assert outage.cause == "hung"
    assert outage.is_over()
    assert ranks.started_at == [clock.time]
    assert attempts.num_recent == 1


def test_a_start_that_fails_is_tried_again_and_later_each_time() -> None:
    clock = FakeClock()
    ranks = Ranks(clock, [ValueError("no room")] * 3)
    attempts = Attempts(RecoveryLimits(), clock)
    start = clock.time
    outage = Outage(WorkerDiedError("rank 1 died"), ranks, attempts, clock)
    while not outage.is_over():
        assert clock.time < start + 100
    assert ranks.started_at == pytest.approx([start + wait for wait in (0, 1, 3, 7)])
    assert outage.seconds == pytest.approx(7)


def test_it_is_over_only_when_the_start_has_ended() -> None:
    clock = FakeClock()
    future: Future[None] = Future()

    class Slow:
        def recover(self) -> Future[None]:
            return future

    attempts = Attempts(RecoveryLimits(), clock)
    outage = Outage(WorkerDiedError("rank 1 died"), Slow(), attempts, clock)
    assert not outage.is_over()
    assert not outage.is_over()
    assert attempts.num_recent == 1
    future.set_result(None)
    assert outage.is_over()


def test_hopeless_is_an_error_that_names_the_last_reason() -> None:
    clock = FakeClock()
    ranks = Ranks(clock, [WorkerDiedError(f"no room {i}") for i in range(9)])
    attempts = Attempts(RecoveryLimits(max_attempts=3), clock)
    outage = Outage(WorkerDiedError("rank 1 died"), ranks, attempts, clock)
    end = clock.time + 100
    with pytest.raises(EngineDeadError, match=r"given up after 3 starts.*no room 2"):
        wait_for(outage)
    assert clock.time < end
    with pytest.raises(EngineDeadError, match=r"given up after 3 starts.*rank 0 died"):
        Outage(WorkerDiedError("rank 0 died"), ranks, attempts, clock)


def test_what_cannot_be_started_again_is_not_tried_twice() -> None:
    clock = FakeClock()
    ranks = Ranks(clock, [NotRecoverableError("the worker is in this process")])
    attempts = Attempts(RecoveryLimits(), clock)
    outage = Outage(WorkerDiedError("rank 0 died"), ranks, attempts, clock)
    with pytest.raises(EngineDeadError, match="lost for good: the worker is in this process"):
        outage.is_over()
    assert len(ranks.started_at) == 1
