"""An engine in a thread: callers wait for nothing but its step, and hear of its end."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from saqqara.cluster.engine.executor import settle
from saqqara.cluster.engine.loop import EngineLoop, Output
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.request import RequestMetrics, ScoreOutput


class CountingEngine:
    """Gives one output per step for as many steps as it was told to."""

    def __init__(self) -> None:
        self.left = 0
        self.num_steps = 0
        self.threads: set[str] = set()
        self.shutdowns = 0
        self.error: Exception | None = None

    def step(self) -> list[Output]:
        if self.error is not None:
            raise self.error
        self.threads.add(threading.current_thread().name)
        self.left -= 1
        self.num_steps += 1
        return [output(self.num_steps)]

    def has_unfinished(self) -> bool:
        return self.left > 0

    def add(self, steps: int) -> int:
        self.threads.add(threading.current_thread().name)
        self.left += steps
        return self.left

    def shutdown(self) -> None:
        self.shutdowns += 1


def output(number: int) -> ScoreOutput:
    return ScoreOutput(str(number), None, (), (), (), (), RequestMetrics(arrival_time=0.0))


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def loop(engine: CountingEngine) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine)
    yield loop
    loop.stop()


def test_calls_and_steps_share_one_thread_and_outputs_keep_their_order(
    engine: CountingEngine, loop: EngineLoop
) -> None:
    assert loop.take() == [], "nothing yet, and no wait"
    assert loop.call(lambda: engine.add(3)) == 3
    taken: list[str] = []
    while len(taken) < 3:
        taken += [o.request_id for o in loop.take(timeout_seconds=10)]
    assert taken == ["1", "2", "3"]
    assert engine.threads == {"engine"}


def test_an_idle_engine_takes_no_steps_and_take_waits_no_longer_than_told(
    engine: CountingEngine, loop: EngineLoop
) -> None:
    started = time.monotonic()
    assert loop.take(timeout_seconds=0.2) == []
    assert 0.2 <= time.monotonic() - started < 5
    assert engine.num_steps == 0


def test_the_error_of_a_call_is_the_callers_alone(engine: CountingEngine, loop: EngineLoop) -> None:
    def refuse() -> None:
        raise ValueError("max_tokens must be at least 1")

    with pytest.raises(ValueError, match="max_tokens"):
        loop.call(refuse)
    assert loop.call(lambda: engine.add(0)) == 0, "the engine goes on"


def test_a_failed_step_reaches_everybody_who_waits_and_everybody_after(
    engine: CountingEngine, loop: EngineLoop
) -> None:
    caught: list[Exception] = []

    def wait() -> None:
        try:
            loop.take(timeout_seconds=60)
        except EngineDeadError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    engine.error = RuntimeError("rank 1 died")
    engine.error.add_note("requests in the step: a, b")
    loop.call(lambda: engine.add(1))
    waiting.join(10)
    [error] = caught
    assert str(error) == (
        "the engine has failed: RuntimeError: rank 1 died; requests in the step: a, b"
    )
    assert error.__cause__ is engine.error
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="rank 1 died"):
            loop.take(timeout_seconds=60)
        with pytest.raises(EngineDeadError, match="rank 1 died"):
            loop.call(lambda: engine.add(1))


def test_outputs_from_before_the_failure_can_still_be_taken(
    engine: CountingEngine, loop: EngineLoop
) -> None:
    loop.call(lambda: engine.add(1))
    deadline = time.monotonic() + 10
    while engine.num_steps == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.error = RuntimeError("rank 1 died")
    loop.call(lambda: engine.add(1))
    assert [o.request_id for o in loop.take(timeout_seconds=10)] == ["1"]
    with pytest.raises(EngineDeadError):
        loop.take(timeout_seconds=10)


def test_stop_shuts_the_engine_down_once(engine: CountingEngine, loop: EngineLoop) -> None:
    loop.stop()
    loop.stop()
    assert engine.shutdowns == 1
    with pytest.raises(EngineDeadError, match="was shut down"):
        loop.call(lambda: engine.add(1))


def test_a_future_gets_what_came_of_it_and_nothing_is_run_for_nobody() -> None:
    done: Future[int] = Future()
    settle(done, lambda: 7)
    assert done.result() == 7
    failed: Future[int] = Future()
    settle(failed, lambda: 1 // 0)
    assert isinstance(failed.exception(), ZeroDivisionError)
    left: Future[int] = Future()
    left.cancel()
    settle(left, lambda: pytest.fail("nobody waits for it"))
    assert left.cancelled()
