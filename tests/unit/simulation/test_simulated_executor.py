"""The simulated executor: its clock, what steps take, and how its ranks are lost and come back."""

from concurrent.futures import Future
from typing import Any

import pytest
from support.fake_replica import FakeReplica, make_workers
from support.planned import question

from saqqara.cluster.engine.executor import Executor
from saqqara.cluster.errors import WorkerDiedError
from saqqara.cluster.simulation.clock import SimulatedClock
from saqqara.cluster.simulation.deployment import Deployment
from saqqara.cluster.simulation.executor import Mishap, SimulatedExecutor
from saqqara.cluster.simulation.ranks import Ranks
from saqqara.cluster.simulation.step_time import Pipeline, StepTimes
from saqqara.compression.retention import Retention
from saqqara.workers.plan import NewSequence, PrefillGroup, SamplingSpec, StepPlan, StepResult


class Books:
    """Ranks without a model."""

    def __init__(self, workers: Any) -> None:
        self.run = FakeReplica(workers).run

    def execute(self, plan: StepPlan) -> list[StepResult]:
        return self.run(plan)


def made(mishaps: dict[int, Mishap] | None = None, **settings: Any) -> Any:
    clock = SimulatedClock()
    executor = SimulatedExecutor(
        make_workers(100),
        Books,
        lambda plan: [2.0],
        clock,
        controller_seconds=0.5,
        restart_seconds=10.0,
        mishaps=(mishaps or {}).get,
        **settings,
    )
    return executor, clock


def empty(step: int) -> StepPlan:
    return StepPlan(step)


def passed(clock: SimulatedClock, future: "Future[Any]", seconds: float = 100.0) -> float:
    """When a future is done, if it is within so many seconds."""
    clock.wait(future, seconds)
    return clock.now()


def test_a_clock_does_what_is_due_in_order_and_stops_where_it_should() -> None:
    clock, seen = SimulatedClock(), []
    future: Future[None] = Future()
    clock.at(3.0, lambda: future.set_result(None))
    clock.at(2.0, lambda: seen.append(clock.now()))
    clock.at(9.0, lambda: seen.append(clock.now()))
    clock.wait(future, 1.0)
    assert (clock.now(), seen) == (1.0, [])
    clock.wait(future, 100.0)
    assert (clock.now(), seen) == (3.0, [2.0])
    clock.wait(future, 100.0)
    assert clock.now() == 3.0
    clock.sleep(10.0)
    assert (clock.now(), seen) == (13.0, [2.0, 9.0])


def test_stages_work_on_one_plan_each_at_a_time() -> None:
    pipeline = Pipeline(2, controller_seconds=0.5)
    assert pipeline.end_of([2.0, 1.0], now=0.0) == 3.5
    assert pipeline.end_of([2.0, 1.0], now=0.0) == 6.0  # stage 0 from 2.5 to 4.5, then stage 1
    assert pipeline.unfinished(now=4.0) == 0.5 + 1.5
    pipeline.start(100.0)
    assert pipeline.end_of([2.0, 1.0], now=50.0) == 103.5


def test_steps_end_one_after_the_other() -> None:
    executor: Executor
    executor, clock = made()
    first, second = executor.execute(empty(0)), executor.execute(empty(1))
    assert passed(clock, first) == 2.5
    assert passed(clock, second) == 5.0
    assert [r.step for r in second.result()] == [1]


@pytest.mark.parametrize("kind", ["died", "failed", "unreachable"])
def test_a_loss_ends_all_steps_and_a_start_brings_ranks_that_hold_nothing(kind: Any) -> None:
    executor, clock = made({1: Mishap(kind)})
    futures = [executor.execute(empty(n)) for n in range(3)]
    assert passed(clock, futures[1]) == 2.5  # half-way between its sending and its end
    assert futures[0].result()
    for lost in futures[1:]:
        with pytest.raises(WorkerDiedError):
            lost.result(timeout=0)
    assert executor.failure.cause == kind
    with pytest.raises(WorkerDiedError):
        executor.execute(empty(3)).result(timeout=0)
    assert passed(clock, executor.recover()) == 12.5
    assert (executor.failure, executor.num_starts) == (None, 1)
    assert passed(clock, executor.execute(empty(4))) == 15.0


def test_a_hung_step_and_those_after_it_end_when_they_are_given_up() -> None:
    executor, clock = made({0: Mishap("hung")})
    futures = [executor.execute(empty(n)) for n in range(2)]
    clock.sleep(1000.0)
    assert not any(future.done() for future in futures)
    assert executor.failure is None
    assert executor.give_up(1000.0).cause == "hung"
    assert all(future.exception() is executor.failure for future in futures)


def test_a_lost_result_is_of_one_step_and_a_late_one_comes() -> None:
    executor, clock = made({0: Mishap("lost"), 1: Mishap("late", 30.0)})
    lost, late, other = [executor.execute(empty(n)) for n in range(3)]
    assert passed(clock, other) == 7.5
    assert passed(clock, late) == 35.0
    clock.sleep(1000.0)
    assert not lost.done()


def test_stale_results_come_after_the_next_start() -> None:
    executor, clock = made({0: Mishap("died")}, stale_results=True)
    told, stale = [executor.execute(empty(n)) for n in range(2)]
    clock.sleep(50.0)
    assert isinstance(told.exception(), WorkerDiedError)
    assert not stale.done()
    passed(clock, executor.recover())
    assert [r.step for r in stale.result(timeout=0)] == [1]


def test_starts_can_fail_and_ranks_can_die_while_they_start() -> None:
    executor, clock = made(failing_starts=[0])
    executor.lose("died")
    assert "no node has room" in str(executor.recover().exception())
    starting = executor.recover()
    clock.sleep(5.0)
    executor.lose("died")
    assert isinstance(starting.exception(), WorkerDiedError)
    clock.sleep(100.0)
    assert executor.num_starts == 0
    assert executor.failure is not None
    again = executor.recover()
    clock.sleep(11.0)
    assert again.done()
    assert (executor.num_starts, executor.failure) == (1, None)


def test_behind_a_cost_model_a_prefill_takes_what_is_planned() -> None:
    asked = question("llama-3-8b", gpus=1)
    settings = Deployment.best(asked, None, 1024).settings()
    workers, clock = settings.workers(), SimulatedClock()
    times = StepTimes(settings.memory, settings.cost, settings.max_num_seqs)
    ranks = lambda infos: Ranks(infos, settings.max_num_seqs, next_token=lambda slot: 7)  # noqa: E731
    executor = SimulatedExecutor(workers, ranks, times.seconds, clock)
    tokens = b"\0" * 4 * 4096
    new = NewSequence(0, tokens, 4096, SamplingSpec(), Retention.parse(None))
    layers = settings.memory.model.spec.num_layers
    future = executor.execute(StepPlan(0, new=(new,), prefill=(PrefillGroup((0,), 0, layers),)))
    entering = asked.workload.entering_tokens(asked.model.spec)
    [rank] = settings.memory.ranks
    assert passed(clock, future) == settings.cost.group_seconds(rank, [entering])
    [result] = future.result()
    assert (result.sampled[0].position, result.sampled[0].token_id) == (4096, 7)
    assert workers[0].num_pages - result.pages_free == 256 * rank.num_rows
