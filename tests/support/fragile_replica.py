"""A fake replica whose workers are lost when they are told to be, and started again."""

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import MappingProxyType

from saqqara.cluster.errors import Cause, WorkerDiedError
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo

from .fake_blocks import FakeBlocks
from .fake_replica import FakeReplica, FakeWorker

StepFuture = Future[list[StepResult]]


class FragileReplica(FakeReplica):
    """Steps end when time passes: `tick` is what a `FakeClock` calls whenever somebody waits.

    Args:
        workers: from `make_workers`.
        losses: how workers are lost, by the number of the step (from 0 on, over all starts).
        poison: prompts that end the workers whenever they are worked on.
        failing_starts: so many starts fail before one goes well.
        stale: whether the steps that were lost still have their results after the next start.

    Attributes:
        num_starts: starts that went well, after the first.
        runs: ids of the prompts, as tokens, that each step worked on.
        lost_alone: how often workers were lost in a step that worked on one prompt alone.
    """

    def __init__(
        self,
        workers: Sequence[WorkerInfo],
        losses: Mapping[int, Cause] = MappingProxyType({}),
        poison: Collection[tuple[int, ...]] = (),
        failing_starts: int = 0,
        *,
        stale: bool = False,
    ) -> None:
        super().__init__(workers)
        self.losses = dict(losses)
        self.poison = set(poison)
        self.failing_starts = failing_starts
        self.num_starts = 0
        self.num_steps = 0
        self.runs: list[set[tuple[int, ...]]] = []
        self.lost_alone: Counter[tuple[int, ...]] = Counter()
        self._stale = stale
        self._failure: WorkerDiedError | None = None
        self._is_stuck = False
        self._queue: deque[tuple[StepPlan, StepFuture]] = deque()
        self._leftovers: list[tuple[StepPlan, StepFuture]] = []
        self._starting: Future[None] | None = None

    @property
    def failure(self) -> WorkerDiedError | None:
        return self._failure

    def execute(self, plan: StepPlan) -> StepFuture:
        future: StepFuture = Future()
        if self._failure is not None:
            future.set_exception(self._failure)
        else:
            self._queue.append((plan, future))
        return future

    def tick(self) -> None:
        """Run the oldest step, or end a start that is under way."""
        if self._starting is not None:
            starting, self._starting = self._starting, None
            starting.set_result(None)
        if not self._queue or self._is_stuck:
            return
        plan, future = self._queue[0]
        self.runs.append(self._prompts(plan))
        cause = self.losses.get(self.num_steps)
        self.num_steps += 1
        if cause is None and self.runs[-1] & self.poison:
            cause = "died"
        if cause is not None and len(self.runs[-1]) == 1:
            self.lost_alone.update(self.runs[-1])
        if cause == "hung":
            self._is_stuck = True
        elif cause is not None:
            self.lose(cause)
        else:
            self._queue.popleft()
            future.set_result(self.run(plan))

    def lose(self, cause: Cause) -> WorkerDiedError:
        """Lose a worker now, whatever is under way."""
        self._failure = WorkerDiedError(f"rank 1 of 2 was lost: {cause}", 1, cause=cause)
        for index, (plan, future) in enumerate(self._queue):
            if self._stale and index > 0:
                self._leftovers.append((plan, future))
            else:
                future.set_exception(self._failure)
        self._queue.clear()
        return self._failure

    def give_up(self, seconds: float) -> WorkerDiedError:
        assert seconds > 0
        return self.lose("hung")

    def recover(self) -> Future[None]:
        assert self._failure is not None, "there is nothing to recover from"
        assert self._starting is None, "it is under way"
        future: Future[None] = Future()
        if self.failing_starts:
            self.failing_starts -= 1
            future.set_exception(WorkerDiedError("no node has room"))
            return future
        self.num_starts += 1
        more = 8 if self.num_starts % 2 else -8  # other processes find other memory
        self._infos = [replace(i, num_pages=i.num_pages + more) for i in self._infos]
        self.blocks = FakeBlocks(self._infos)
        self.fakes = [FakeWorker(info, blocks=self.blocks) for info in self._infos]
        self.slots = {}
        self._failure, self._is_stuck = None, False
        for plan, stale in self._leftovers:
            stale.set_result([StepResult(plan.step, rank=0)])
        self._leftovers.clear()
        self._starting = future
        return future

    def _prompts(self, plan: StepPlan) -> set[tuple[int, ...]]:
        new = {n.slot: n for n in plan.new} | {
            slot: held.new for slot, held in self.slots.items() if slot not in plan.free
        }
        slots = {slot for group in plan.prefill for slot in group.slots}
        slots |= {item.slot for item in plan.decode}
        return {tuple(new[slot].tokens()[: new[slot].prompt_tokens].tolist()) for slot in slots}
