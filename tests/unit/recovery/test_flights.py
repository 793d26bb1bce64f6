"""Plans in flight: waited for as long as is right, whatever else the process has to do."""

from concurrent.futures import Future

import pytest
from support.fake_clock import FakeClock
from support.fake_replica import make_workers

from saqqara.cluster.errors import WorkerDiedError
from saqqara.cluster.recovery.clock import Clock
from saqqara.cluster.recovery.deadline import FLOOR_SECONDS
from saqqara.cluster.recovery.flights import Flights
from saqqara.workers.plan import DecodeItem, StepPlan, StepResult


class Runner:
    """Steps that end when they are told to."""

    def __init__(self) -> None:
        self.futures: list[Future[list[StepResult]]] = []
        self.gave_up_after: float | None = None

    def execute(self, plan: StepPlan) -> Future[list[StepResult]]:
        self.futures.append(Future())
        return self.futures[-1]

    def give_up(self, seconds: float) -> WorkerDiedError:
        self.gave_up_after = seconds
        return WorkerDiedError("too long", cause="hung")


def decode(step: int) -> StepPlan:
    return StepPlan(step, decode=(DecodeItem(0, 10 + step),))


def measured(clock: Clock, runner: Runner) -> Flights:
    """Flights that know what a step takes."""
    flights = Flights(make_workers(10), clock)
    flights.send(decode(0), runner)
    runner.futures[-1].set_result([])
    assert flights.land(runner) == (decode(0), [])
    return flights


def test_the_oldest_lands_first() -> None:
    clock, runner = FakeClock(), Runner()
    flights = measured(clock, runner)
    for step in (1, 2):
        flights.send(decode(step), runner)
    assert len(flights) == 2
    for future in reversed(runner.futures[1:]):
        future.set_result([])
    assert [flights.land(runner)[0].step for _ in range(2)] == [1, 2]
    assert len(flights) == 0


def test_a_step_that_does_not_end_is_given_up() -> None:
    clock, runner = FakeClock(), Runner()
    flights = measured(clock, runner)
    flights.send(decode(1), runner)
    before = clock.time
    with pytest.raises(WorkerDiedError, match="too long"):
        flights.land(runner)
    assert runner.gave_up_after == FLOOR_SECONDS
    assert FLOOR_SECONDS <= clock.time - before <= FLOOR_SECONDS + 1


def test_the_workers_are_not_blamed_where_this_process_stood_still() -> None:
    clock, runner = FakeClock(), Runner()
    flights = measured(clock, runner)
    flights.send(decode(1), runner)
    waits = 0

    def stand_still() -> None:
        nonlocal waits
        waits += 1
        clock.time += 3600.0
        if waits == 5:
            runner.futures[-1].set_result([])

    clock.on_wait = stand_still
    assert flights.land(runner)[0].step == 1
    assert runner.gave_up_after is None


def test_what_was_dropped_does_not_come_back() -> None:
    clock, runner = FakeClock(), Runner()
    flights = measured(clock, runner)
    flights.send(decode(1), runner)
    flights.drop()
    runner.futures[-1].set_result([])
    assert len(flights) == 0
    flights.send(decode(2), runner)
    runner.futures[-1].set_result([])
    assert flights.land(runner)[0].step == 2
