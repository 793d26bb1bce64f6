"""A replica's ranks as Ray actors: they start in two phases, run plans in order, and die together.

Most tests use `FakeWorker`, whose step is one all-reduce over the real mesh: what is tested is how
processes are started, found dead and cleaned up. The last ones run the real worker.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import RayError
from support.fake_worker import CRASH, DIE, RAISE, SLEEP, SLEEP_SECONDS, WRITE, FakeWorker
from support.plans import new_sequence

from saqqara.cluster.errors import NotRecoverableError, WorkerDiedError
from saqqara.cluster.on_ray.executor import RayExecutor
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, Grammar, PrefillGroup, StepPlan, WorkerInfo
from saqqara.workers.worker import Worker

pytestmark = pytest.mark.usefixtures("ray_cluster")

NOTICE_SECONDS = 10.0  # Ray notices a death at once; the group then has 2 s to show who was first


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model="-", executor="ray", device="cpu", tensor_parallel_size=2, log_dir=str(tmp_path)
    )


@pytest.fixture
def executor(config: EngineConfig) -> Iterator[RayExecutor]:
    executor = RayExecutor(config, make_worker=FakeWorker)
    yield executor
    executor.shutdown()
    assert_gone(executor.workers)


def test_ranks_start_run_plans_in_order_and_log_each_to_its_own_file(
    executor: RayExecutor, tmp_path: Path
) -> None:
    workers = executor.workers
    assert [w.rank for w in workers] == [0, 1]
    assert [w.log_file for w in workers] == [str(tmp_path / f"rank-{r}.log") for r in (0, 1)]
    assert len({w.pid for w in workers} | {os.getpid()}) == 3, "a process each"
    cores = len(os.sched_getaffinity(0))
    assert [w.num_pages for w in workers] == [max(1, cores // 2)] * 2, "threads: cores / ranks"
    assert [w.attention_reason for w in workers] == ["lo", "lo"], "gloo's interface within a host"

    futures = [executor.execute(StepPlan(step)) for step in range(20)]  # many in flight
    for step, future in enumerate(futures):
        results = future.result(timeout=30)
        assert [(r.step, r.rank, r.pages_free) for r in results] == [(step, 0, 2), (step, 1, 2)]
    executor.check_integrity()

    executor.execute(StepPlan(99, free=(WRITE,))).result(timeout=30)
    quiet, loud = ((tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1))
    for line in ("from logging", "from C++", "from stderr"):
        assert line in loud
        assert line not in quiet
    with pytest.raises(AssertionError, match="rank 1: page 7 has no owner"):
        executor.check_integrity()
    assert executor.execute(StepPlan(100)).result(timeout=30), "a failed check ends nothing"

    last = executor.execute(StepPlan(101, free=(SLEEP,)))
    executor.shutdown()
    assert last.result(timeout=0)[1].step == 101, "shutdown finishes what was started"


def test_grammars_are_compiled_beside_the_steps(executor: RayExecutor) -> None:
    """What is wrong with one is its own fault; where the ranks are lost, that is said."""
    step = executor.execute(StepPlan(0, free=(SLEEP,)))
    executor.compile_grammar(Grammar("good", ())).result(timeout=30)
    refused = executor.compile_grammar(Grammar("bad", ()))
    with pytest.raises(ValueError, match=r"^bad is no grammar$"):
        refused.result(timeout=30)
    step.result(timeout=30)
    with pytest.raises(WorkerDiedError):
        executor.execute(StepPlan(1, free=(DIE,))).result(timeout=30)
    with pytest.raises(WorkerDiedError):
        executor.compile_grammar(Grammar("good", ())).result(timeout=30)


def test_a_killed_rank_ends_the_group_with_a_clear_error(
    executor: RayExecutor, tmp_path: Path
) -> None:
    victim = executor.workers[1]
    executor.execute(StepPlan(0)).result(timeout=30)
    slow = executor.execute(StepPlan(1, free=(SLEEP,)))
    queued = executor.execute(StepPlan(2))
    time.sleep(SLEEP_SECONDS / 2)  # rank 0 waits in the all-reduce by now
    os.kill(victim.pid, signal.SIGKILL)
    started = time.monotonic()
    for future in (slow, queued, executor.execute(StepPlan(3))):
        with pytest.raises(WorkerDiedError) as error:
            future.result(timeout=NOTICE_SECONDS)
        assert (error.value.rank, error.value.cause) == (1, "died")
        assert error.value.log_file == str(tmp_path / "rank-1.log")
        message = str(error.value)
        for part in ("rank 1 of 2", victim.hostname, f"pid {victim.pid}", "died", "rank-1.log"):
            assert part in message
        assert "\n" not in message
    assert time.monotonic() - started < NOTICE_SECONDS
    with pytest.raises(WorkerDiedError):
        executor.check_integrity()
    assert_processes_gone(executor.workers)


@pytest.mark.parametrize(
    ("order", "what", "logged"),
    [
        (RAISE, "failed: KeyError: 'a bug of the worker'", "Traceback"),
        (CRASH, "died", "Fatal Python error: Segmentation fault"),
        (DIE, "died", "rank 1 has started"),
    ],
)
def test_what_ended_a_rank_is_in_the_error_and_in_its_log(
    executor: RayExecutor, order: int, what: str, logged: str
) -> None:
    with pytest.raises(WorkerDiedError) as error:
        executor.execute(StepPlan(0, free=(order,))).result(timeout=NOTICE_SECONDS)
    assert "rank 1 of 2" in str(error.value), "not rank 0, whose collective failed with it"
    assert what in str(error.value)
    assert error.value.log_file is not None
    assert logged in Path(error.value.log_file).read_text()


def test_a_stopped_rank_is_blamed_for_a_late_step_and_not_who_waits_for_it(
    config: EngineConfig,
) -> None:
    executor = RayExecutor(config, make_worker=FakeWorker, step_timeout_seconds=2.0)
    try:
        executor.execute(StepPlan(0)).result(timeout=30)
        os.kill(executor.workers[1].pid, signal.SIGSTOP)  # lives, and answers nothing
        with pytest.raises(
            WorkerDiedError, match=r"rank 1 of 2 .* fallen silent; its log: "
        ) as error:
            executor.execute(StepPlan(1)).result(timeout=30)
        assert (error.value.cause, error.value.rank) == ("unreachable", 1)
    finally:
        executor.shutdown()
    assert_gone(executor.workers)


def test_a_step_that_takes_too_long_can_be_given_up(executor: RayExecutor) -> None:
    executor.execute(StepPlan(0)).result(timeout=30)
    step = executor.execute(StepPlan(1, free=(SLEEP,)))
    failure = executor.give_up(0.1)
    assert failure.cause == "hung"
    assert "did not end a step within 0.1 s" in str(failure)
    with pytest.raises(WorkerDiedError, match=r"within 0.1 s"):
        step.result(timeout=NOTICE_SECONDS)
    assert_processes_gone(executor.workers)


@pytest.mark.parametrize(
    ("signum", "cause"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "unreachable")]
)
def test_a_rank_that_is_lost_while_idle_is_known_without_a_step(
    executor: RayExecutor, signum: signal.Signals, cause: str
) -> None:
    os.kill(executor.workers[1].pid, signum)
    deadline = time.monotonic() + NOTICE_SECONDS
    while (failure := executor.failure) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (failure.cause, failure.rank) == (cause, 1)
    with pytest.raises(WorkerDiedError, match="rank 1 of 2"):
        executor.execute(StepPlan(0)).result(timeout=NOTICE_SECONDS)
    assert_processes_gone(executor.workers)


def test_lost_ranks_are_replaced_when_they_are_gone(executor: RayExecutor) -> None:
    for step, signum in enumerate((signal.SIGKILL, signal.SIGSTOP)):
        lost = executor.workers
        executor.execute(StepPlan(10 * step)).result(timeout=30)
        os.kill(lost[step].pid, signum)
        with pytest.raises(WorkerDiedError):
            executor.execute(StepPlan(10 * step + 1)).result(timeout=NOTICE_SECONDS)
        executor.recover().result(timeout=120)
        assert not any(psutil.pid_exists(worker.pid) for worker in lost)
        assert executor.failure is None
        assert not {w.pid for w in executor.workers} & {w.pid for w in lost}
        results = executor.execute(StepPlan(10 * step + 2)).result(timeout=30)
        assert [(r.step, r.rank, r.pages_free) for r in results] == [
            (10 * step + 2, rank, 2) for rank in (0, 1)
        ]
        executor.check_integrity()
    states = [group["state"] for group in ray.util.placement_group_table().values()]
    assert states.count("CREATED") == 1


def test_ranks_can_be_lost_again_and_shut_down_while_they_start(executor: RayExecutor) -> None:
    os.kill(executor.workers[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        executor.execute(StepPlan(0)).result(timeout=NOTICE_SECONDS)
    recovery = executor.recover()
    executor.shutdown()
    with pytest.raises((WorkerDiedError, NotRecoverableError, RayError)):  # wherever it was
        recovery.result(timeout=120)


def test_a_setting_that_a_worker_refuses_is_the_users_value_error(config: EngineConfig) -> None:
    before = ray.util.placement_group_table()
    with pytest.raises(ValueError, match="seed must not be 13"):
        RayExecutor(config.model_copy(update={"seed": 13}), make_worker=FakeWorker)
    after = ray.util.placement_group_table()
    new = [group for key, group in after.items() if key not in before]
    assert [group["state"] for group in new] == ["REMOVED"]


@pytest.mark.parametrize(("tensor_size", "pipeline_size"), [(2, 1), (1, 2)])
def test_the_real_worker_samples_over_two_ranks_what_it_samples_alone(
    tiny_config: EngineConfig, tensor_size: int, pipeline_size: int
) -> None:
    plans = greedy_plans(prompt=list(range(20, 60)), num_layers=4, num_tokens=8)
    alone = Worker.local(tiny_config.for_worker())
    expected = [alone.execute(plan).sampled for plan in plans]
    alone.close()
    assert sum(map(len, expected)) == 8

    sizes = {"tensor_parallel_size": tensor_size, "pipeline_parallel_size": pipeline_size}
    executor = RayExecutor(tiny_config.model_copy(update=sizes))
    try:
        futures = [executor.execute(plan) for plan in plans]  # all in flight at once
        steps = [future.result(timeout=60) for future in futures]
        executor.check_integrity()
    finally:
        executor.shutdown()
    assert_gone(executor.workers)
    layers = [(w.start_layer, w.stop_layer) for w in executor.workers]
    heads = [(w.start_head, w.stop_head) for w in executor.workers]
    assert layers == ([(0, 4)] * 2 if pipeline_size == 1 else [(0, 2), (2, 4)])
    assert heads == ([(0, 2)] * 2 if tensor_size == 1 else [(0, 1), (1, 2)])
    speaker = 0 if pipeline_size == 1 else 1  # tensor rank 0 of the last stage
    assert [results[speaker].sampled for results in steps] == expected
    assert all(not results[1 - speaker].sampled for results in steps)


def greedy_plans(prompt: list[int], num_layers: int, num_tokens: int) -> list[StepPlan]:
    """One sequence from its prefill to its end, written by hand."""
    first = StepPlan(
        0, new=(new_sequence(0, prompt),), prefill=(PrefillGroup((0,), 0, num_layers),)
    )
    decode = [
        StepPlan(step, decode=(DecodeItem(0, len(prompt) + step - 1),))
        for step in range(1, num_tokens)
    ]
    return [first, *decode, StepPlan(num_tokens, free=(0,))]


def assert_gone(workers: list[WorkerInfo], seconds: float = 10.0) -> None:
    """No process of these ranks is left, and no placement group of this Ray is held."""
    assert_processes_gone(workers, seconds)
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


def assert_processes_gone(workers: list[WorkerInfo], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(worker.pid) for worker in workers):
        assert time.monotonic() < deadline, "a rank outlives its group"
        time.sleep(0.05)
