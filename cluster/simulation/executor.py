"""An executor on a simulated clock, for the real engine: steps take what a cost model says.

Its ranks can be lost in every way that real ones are, and their results can be late, lost, or come
when nobody waits for them any more.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from saqqara.cluster.errors import Cause, WorkerDiedError
from saqqara.workers.plan import Grammar, StepPlan, StepResult, WorkerInfo

from .clock import SimulatedClock
from .step_time import Pipeline

StepFuture = Future[list[StepResult]]
MISHAPS: dict[str, Cause] = {"died": "died", "failed": "failed", "unreachable": "unreachable"}
"""Those that end the ranks at once, and how they are told."""


@dataclass(frozen=True, slots=True)
class Mishap:
    """What befalls a step.

    Attributes:
        kind: `died`, `failed` or `unreachable`: a rank is lost before the step ends. `hung`: it
            never ends, nor does any after it. `lost`: it is carried out, but nobody is told.
            `late`: its results come `seconds` after its end.
        seconds: see `late`.
    """

    kind: Literal["died", "failed", "unreachable", "hung", "lost", "late"]
    seconds: float = 0.0


class CarriesOut(Protocol):
    """What ranks do of plans, that come in order, and report."""

    def execute(self, plan: StepPlan) -> list[StepResult]:
        """Carry out a plan."""
        ...


class SimulatedExecutor:
    """An `Executor` on a simulated clock.

    A loss ends all steps that were started. With `stale_results` only the oldest is told of it: the
    results of the others come after the next start, when nobody should listen.

    Args:
        workers: every rank, by rank.
        carry_out: makes what carries out plans, at the beginning and at each new start.
        step_seconds: of each pipeline stage for a plan; plans come in order.
        clock: the engine's as well.
        controller_seconds: that a stage waits between two plans.
        restart_seconds: until lost ranks have started again.
        mishaps: by the number of the step, from 0 on, over all starts.
        failing_starts: numbers of the starts, from 0 on, that fail.
        stale_results: see above.
        restarted: ranks as they are after a start; default: as before.

    Attributes:
        num_steps: started, over all starts.
        num_starts: that went well, after the first.
        carried_out: what carries out plans now.
    """

    def __init__(
        self,
        workers: Sequence[WorkerInfo],
        carry_out: Callable[[Sequence[WorkerInfo]], CarriesOut],
        step_seconds: Callable[[StepPlan], Sequence[float]],
        clock: SimulatedClock,
        *,
        controller_seconds: float = 0.0,
        restart_seconds: float = 60.0,
        mishaps: Callable[[int], Mishap | None] = lambda _: None,
        failing_starts: Sequence[int] = (),
        stale_results: bool = False,
        restarted: Callable[[Sequence[WorkerInfo]], Sequence[WorkerInfo]] = lambda workers: workers,
    ) -> None:
        self._workers = list(workers)
        self._carry_out = carry_out
        self._step_seconds = step_seconds
        self._clock = clock
        self._pipeline = Pipeline(len({w.pipeline_rank for w in workers}), controller_seconds)
        self._restart_seconds = restart_seconds
        self._mishaps = mishaps
        self._failing_starts = frozenset(failing_starts)
        self._stale_results = stale_results
        self._restarted = restarted
        self.carried_out = carry_out(workers)
        self.num_steps = 0
        self.num_starts = 0
        self._num_tries = 0
        self._life = 0  # what was due in an earlier one is void
        self._failure: WorkerDiedError | None = None
        self._is_stuck = False
        self._starting: Future[None] | None = None
        self._started: list[tuple[StepFuture, list[StepResult]]] = []
        self._leftovers: list[tuple[StepFuture, list[StepResult]]] = []

    @property
    def workers(self) -> list[WorkerInfo]:
        """Every rank, by rank."""
        return self._workers

    @property
    def failure(self) -> WorkerDiedError | None:
        """How the ranks were lost, if they are."""
        return self._failure

    def execute(self, plan: StepPlan) -> StepFuture:
        """Start a step; its future is done when it is so late."""
        future: StepFuture = Future()
        if self._failure is not None:
            future.set_exception(self._failure)
            return future
        mishap, self.num_steps = self._mishaps(self.num_steps), self.num_steps + 1
        start = self._clock.now()
        end = self._pipeline.end_of(self._step_seconds(plan), start)
        results = self.carried_out.execute(plan)
        self._started.append((future, results))
        kind = None if mishap is None else mishap.kind
        if kind in MISHAPS:
            self._due((start + end) / 2, lambda: self.lose(MISHAPS[kind]))
        self._is_stuck |= kind == "hung"
        if not self._is_stuck and kind != "lost":
            late = 0.0 if mishap is None else mishap.seconds
            self._due(end + late, lambda: self._report(future, results))
        return future

    def lose(self, cause: Cause) -> WorkerDiedError:
        """Lose a rank now, whatever is under way."""
        if self._failure is not None and self._starting is None:
            return self._failure
        self._life += 1
        self._failure = WorkerDiedError(f"rank 0 was lost: {cause}", 0, cause=cause)
        if self._starting is not None:
            starting, self._starting = self._starting, None
            starting.set_exception(self._failure)
        for place, (future, results) in enumerate(self._started):
            if self._stale_results and place > 0:
                self._leftovers.append((future, results))
            else:
                future.set_exception(self._failure)
        self._started.clear()
        return self._failure

    def give_up(self, seconds: float) -> WorkerDiedError:
        """End the ranks: the oldest step has taken so long."""
        assert seconds > 0
        return self.lose("hung")

    def compile_grammar(self, grammar: Grammar) -> "Future[None]":
        """Nothing: no answer is really sampled."""
        future: Future[None] = Future()
        if self._failure is not None:
            future.set_exception(self._failure)
        else:
            future.set_result(None)
        return future

    def recover(self) -> "Future[None]":
        """Start other ranks; done when they have started."""
        assert self._failure is not None, "there is nothing to recover from"
        assert self._starting is None, "a start is under way"
        future: Future[None] = Future()
        is_failing, self._num_tries = self._num_tries in self._failing_starts, self._num_tries + 1
        if is_failing:
            future.set_exception(WorkerDiedError("no node has room"))
            return future
        self._starting = future
        self._due(self._clock.now() + self._restart_seconds, self._start)
        return future

    def check_integrity(self) -> None:
        """Nothing: the ranks have no pages to be wrong about."""

    def shutdown(self) -> None:
        """Nothing is held."""

    def _start(self) -> None:
        assert self._starting is not None
        starting, self._starting = self._starting, None
        self._life += 1
        self.num_starts += 1
        self._workers = list(self._restarted(self._workers))
        self.carried_out = self._carry_out(self._workers)
        self._pipeline.start(self._clock.now())
        self._failure, self._is_stuck = None, False
        leftovers, self._leftovers = self._leftovers, []
        for future, results in leftovers:
            future.set_result(results)
        starting.set_result(None)

    def _report(self, future: StepFuture, results: list[StepResult]) -> None:
        self._started.remove((future, results))
        future.set_result(results)

    def _due(self, time: float, call: Callable[[], object]) -> None:
        """Do something when it is so late, unless ranks were lost or started until then."""
        life = self._life

        def do() -> None:
            if life == self._life:
                call()

        self._clock.at(time, do)
