"""The plans in flight, and how long is waited for the oldest of them."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from saqqara.cluster.errors import WorkerDiedError
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo, layers_of

from .clock import Clock
from .deadline import Features, StepDeadline, Workload, together

_SLICE_SECONDS = 0.25


class Runner(Protocol):
    """Where plans are carried out, in order."""

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Start a step."""
        ...

    def give_up(self, seconds: float) -> WorkerDiedError:
        """End the workers, since the oldest step has taken so long; returns what is to be said."""
        ...


@dataclass(slots=True, eq=False)
class Flight:
    """A plan that was sent; `work` is its own and that of the plans before it."""

    plan: StepPlan
    future: "Future[list[StepResult]]"
    own_work: Features
    work: Features
    sent_at: float
    ended_at: float | None = None


class Flights:
    """Sends plans and waits for their results, as long as the steps before them tell it to.

    Args:
        workers: every rank's shard.
        clock: of the engine.
    """

    def __init__(self, workers: Sequence[WorkerInfo], clock: Clock) -> None:
        self._clock = clock
        self._layers = layers_of(workers)
        self._deadline = StepDeadline(compiles=any(worker.device != "cpu" for worker in workers))
        self._flights: deque[Flight] = deque()
        self._workload = Workload(self._layers)

    def __len__(self) -> int:
        return len(self._flights)

    def send(self, plan: StepPlan, runner: Runner) -> None:
        """Start a step."""
        own_work = self._workload.features(plan)
        work = together([*(flight.own_work for flight in self._flights), own_work])
        sent_at = self._clock.now()
        flight = Flight(plan, runner.execute(plan), own_work, work, sent_at)

        def note_end(_: object) -> None:
            flight.ended_at = self._clock.now()

        flight.future.add_done_callback(note_end)
        self._flights.append(flight)

    def land(self, runner: Runner) -> tuple[StepPlan, list[StepResult]]:
        """The oldest plan and its results.

        Raises:
            WorkerDiedError: a worker was lost, or the plan has taken too long.
            Exception: what ended the step.
        """
        flight = self._flights.popleft()
        self._await(flight, runner)
        results = flight.future.result()
        ended_at = self._clock.now() if flight.ended_at is None else flight.ended_at
        self._deadline.note(flight.work, ended_at - flight.sent_at)
        return flight.plan, results

    def drop(self) -> None:
        """Forget all plans: whatever still comes of them is stale. The workers start anew."""
        self._flights.clear()
        self._workload = Workload(self._layers)
        self._deadline.restart()

    def _await(self, flight: Flight, runner: Runner) -> None:
        # Time counts while it is waited for, a slice at a time: had this process itself stood
        # still for a minute, the workers would not be to blame for it.
        waited = 0.0
        allowed: float | None = None
        while not flight.future.done():
            before = self._clock.now()
            self._clock.wait(flight.future, _SLICE_SECONDS)
            if flight.future.done():
                return
            waited += min(self._clock.now() - before, 2 * _SLICE_SECONDS)
            if allowed is None:  # not asked of short steps
                allowed = self._deadline.seconds(flight.work)
            if waited >= allowed:
                self._deadline.passed()
                raise runner.give_up(allowed)
