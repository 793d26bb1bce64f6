"""Where plans are carried out: what an engine asks of its executor, and the one in this process."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from saqqara.cluster.errors import NotRecoverableError, WorkerDiedError
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import Grammar, StepPlan, StepResult, WorkerInfo

T = TypeVar("T")

_LOOK_SECONDS = 0.0002  # between two looks whether the device is done, while no plan comes
_JOIN_SECONDS = 60.0


class Executor(Protocol):
    """Where plans are carried out. Plans run in the order they were given."""

    @property
    def workers(self) -> list[WorkerInfo]:
        """What each worker is, by rank."""
        ...

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Start a step; the future has one result per worker, or the exception that ended it.

        Where the workers are lost and can be started again, that is a `WorkerDiedError`.
        """
        ...

    @property
    def failure(self) -> WorkerDiedError | None:
        """How the workers were lost, if they are; known although no step may be under way."""
        ...

    def give_up(self, seconds: float) -> WorkerDiedError:
        """End the workers: the oldest step has taken so long.

        Returns:
            The error that says who was late; all steps that were started end with it.
        """
        ...

    def compile_grammar(self, grammar: Grammar) -> "Future[None]":
        """Have a grammar ready where answers are sampled, without a step's waiting for it.

        The future ends with a `ValueError` where the grammar cannot be compiled, with a
        `WorkerDiedError` where the workers are lost.
        """
        ...

    def recover(self) -> "Future[None]":
        """End what is left of lost workers and start others, in the same layout, without state.

        Once the future is done, `workers` are the new ones. It ends with the error that kept them
        from starting, upon which this may be called again, or with a `NotRecoverableError`.
        """
        ...

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a worker's pages have not exactly one owner each."""
        ...

    def shutdown(self) -> None:
        """Release the workers; calling it again does nothing."""
        ...


class LocalExecutor:
    """One worker in this process, without Ray.

    On a CPU a step runs inside `execute`. On a GPU steps run in a thread, so that the device has
    the next one before the results of the last are taken in.

    Args:
        config: the engine's settings.
        in_thread: whether steps run in a thread; default: where there is a GPU.

    Attributes:
        worker: the worker.
    """

    def __init__(self, config: EngineConfig, *, in_thread: bool | None = None) -> None:
        from saqqara.workers.worker import Worker

        self.worker = Worker.local(config.for_worker())
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="compile-grammar")
        if in_thread is None:
            in_thread = self.worker.info.device != "cpu"
        self._steps = StepThread(self.worker) if in_thread else None

    @property
    def workers(self) -> list[WorkerInfo]:
        """The worker."""
        return [self.worker.info]

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Start a step; without a thread the future is done."""
        if self._steps is not None:
            return self._steps.execute(plan)
        future: Future[list[StepResult]] = Future()
        settle(future, lambda: [self.worker.execute(plan)])
        return future

    def compile_grammar(self, grammar: Grammar) -> "Future[None]":
        """Compile a grammar in another thread."""
        return self._compiling.submit(self.worker.compile_grammar, grammar)

    @property
    def failure(self) -> WorkerDiedError | None:
        """None: where the worker is lost, so is this process."""
        return None

    def give_up(self, seconds: float) -> WorkerDiedError:
        """Say that the device does not answer; the thread that waits for it is left alone."""
        return WorkerDiedError(f"a step has taken more than {seconds:.0f} s", rank=0, cause="hung")

    def recover(self) -> "Future[None]":
        """A future that says that this cannot be done."""
        future: Future[None] = Future()
        future.set_exception(
            NotRecoverableError("the worker is part of this process and cannot be started anew")
        )
        return future

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a page has not exactly the owners it should have."""
        self.worker.check_integrity()

    def shutdown(self) -> None:
        """Release what the worker holds outside its memory."""
        if self._steps is not None:
            self._steps.end()
        self._compiling.shutdown(wait=True, cancel_futures=True)
        self.worker.close()


class Begun(Protocol):
    """A step that the device may still be at."""

    @property
    def is_ready(self) -> bool:
        """Whether its result can be had without waiting."""
        ...

    def result(self) -> StepResult:
        """What was done."""
        ...


class Beginner(Protocol):
    """What starts steps: a worker."""

    def begin(self, plan: StepPlan) -> Begun:
        """Start a step."""
        ...


_Results = Future[list[StepResult]]


class StepThread:
    """Begins plans in order, and reads each result when it is there, in the same thread.

    A plan that comes while the device is at the one before is begun at once: the device never waits
    for the host to take something in.

    Args:
        worker: used by this thread alone from now on, but for what it allows others.
    """

    def __init__(self, worker: Beginner) -> None:
        self._worker = worker
        self._plans: SimpleQueue[tuple[StepPlan, _Results] | None] = SimpleQueue()
        self._begun: deque[tuple[Begun, _Results]] = deque()
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def execute(self, plan: StepPlan) -> _Results:
        """Leave a plan for the thread."""
        future: _Results = Future()
        self._plans.put((plan, future))
        return future

    def end(self) -> None:
        """Finish what was started; calling it again does nothing."""
        self._plans.put(None)
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while True:
            try:
                plan = self._next_plan()
            except Empty:
                self._finish_oldest()
                continue
            if plan is None:
                while self._begun:
                    self._finish_oldest()
                return
            self._begin(*plan)

    def _next_plan(self) -> tuple[StepPlan, _Results] | None:
        """The next plan; raises `Empty` once the oldest step is done and none has come."""
        while self._begun:
            try:
                return self._plans.get_nowait()
            except Empty:
                if self._begun[0][0].is_ready:
                    raise
            try:
                return self._plans.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
        return self._plans.get()

    def _begin(self, plan: StepPlan, future: _Results) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._begun.append((self._worker.begin(plan), future))
        except Exception as error:
            future.set_exception(error)

    def _finish_oldest(self) -> None:
        step, future = self._begun.popleft()
        try:
            result = step.result()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result([result])


def settle(future: Future[T], function: Callable[[], T]) -> None:
    """Give a future what a function returns or raises; do not call it if nobody waits any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
