"""Where plans are carried out: what an engine asks of its executor, and the one in this process."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo

T = TypeVar("T")


class Executor(Protocol):
    """Where plans are carried out. Plans run in the order they were given."""

    @property
    def workers(self) -> list[WorkerInfo]:
        """What each worker is, by rank."""
        ...

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Start a step; the future has one result per worker, or the exception that ended it."""
        ...

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a worker's pages have not exactly one owner each."""
        ...

    def shutdown(self) -> None:
        """Release the workers; calling it again does nothing."""
        ...


class LocalExecutor:
    """One worker in this process, without Ray; a step runs inside `execute`.

    Attributes:
        worker: the worker.
    """

    def __init__(self, config: EngineConfig) -> None:
        from saqqara.workers.worker import Worker

        self.worker = Worker.local(config.for_worker())

    @property
    def workers(self) -> list[WorkerInfo]:
        """The worker."""
        return [self.worker.info]

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Run a step; the future is done."""
        future: Future[list[StepResult]] = Future()
        settle(future, lambda: [self.worker.execute(plan)])
        return future

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a page has not exactly the owners it should have."""
        self.worker.check_integrity()

    def shutdown(self) -> None:
        """Release what the worker holds outside its memory."""
        self.worker.close()


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
