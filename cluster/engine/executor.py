"""Where plans are carried out: what an engine asks of its executor, and the one in this process."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from saqqara.cluster.errors import NotRecoverableError, WorkerDiedError
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import Grammar, StepPlan, StepResult, WorkerInfo

T = TypeVar("T")


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
    """One worker in this process, without Ray; a step runs inside `execute`.

    Attributes:
        worker: the worker.
    """

    def __init__(self, config: EngineConfig) -> None:
        from saqqara.workers.worker import Worker

        self.worker = Worker.local(config.for_worker())
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="compile-grammar")

    @property
    def workers(self) -> list[WorkerInfo]:
        """The worker."""
        return [self.worker.info]

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Run a step; the future is done."""
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
        """Not called: no step is under way once `execute` has returned."""
        raise AssertionError("a step in this process cannot be given up")

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
        self._compiling.shutdown(wait=True, cancel_futures=True)
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
