"""One replica on a simulated clock: the real scheduler and ledger, steps that take their time."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from saqqara.cluster.planning.cost_model import CostModel
from saqqara.cluster.planning.memory import ReplicaMemory
from saqqara.cluster.scheduling.events import Event, Finished, NewToken, Preempted
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.workers.plan import SamplingSpec, StepPlan, WorkerInfo

from .arrivals import Trace
from .faults import Outage
from .measures import ReplicaRun
from .ranks import Ranks
from .step_time import Pipeline, StepTimes

Progress = Callable[[int], None]
_REPORT_EVERY = 50  # requests
_ZEROS = (0,) * 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """What ends an output: its length alone."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = True


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """A replica; `prefill_quantum` and `max_extend_tokens` as `EngineConfig`'s."""

    memory: ReplicaMemory
    cost: CostModel
    max_num_seqs: int
    prefill_quantum: int | None
    max_extend_tokens: int

    def workers(self) -> list[WorkerInfo]:
        """Its ranks, as the scheduler sees them."""
        return self.memory.worker_infos(self.max_num_seqs)


class Replica:
    """Drives a scheduler as the engine does: plans until there are no more, then the oldest's end.

    Between a stage's parts of two plans the controller takes `Factors.step_seconds`. At an outage
    what is in flight is lost; what ran is queued again with its tokens, and goes on when workers
    are back.

    Args:
        settings: of the replica.
        requests: that are routed to it.
        outages: of it, in order.
        bin_seconds: of the timeline.
        progress: told of finished requests.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        requests: Trace,
        outages: Sequence[Outage],
        bin_seconds: float,
        progress: Progress = lambda _: None,
    ) -> None:
        sizes = settings.memory.sizes
        self._workers = settings.workers()
        self._retention = settings.memory.workload.retention
        self._scheduler = Scheduler(
            self._workers,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=sizes.max_model_len,
            max_prefill_tokens=sizes.max_prefill_tokens,
            prefill_quantum=settings.prefill_quantum,
            max_extend_tokens=settings.max_extend_tokens,
        )
        self._ranks = Ranks(self._workers, settings.max_num_seqs, next_token=lambda _: 0)
        self._times = StepTimes(settings.memory, settings.cost, settings.max_num_seqs)
        self._pipeline = Pipeline(self._times.num_stages, settings.cost.factors.step_seconds)
        self._pages_W = self._scheduler.ledger.num_pages
        self._now = 0.0
        self._flights: deque[tuple[StepPlan, float]] = deque()
        self._requests = requests
        self._arrivals = requests.seconds.tolist()
        self._next = 0
        self._outages = deque(outages)
        self._place: dict[int, int] = {}  # of a sequence's request, by its arrival
        self._progress, self._unreported = progress, 0
        nothing = np.full(len(requests), np.nan)
        self.run = ReplicaRun(
            requests.seconds,
            nothing,
            nothing.copy(),
            np.zeros(len(requests), dtype=np.int64),
            bin_seconds,
        )

    def simulate(self) -> ReplicaRun:
        """Until every request has ended."""
        while self._next < len(self._arrivals) or not self._scheduler.is_idle:
            self._take_arrivals()
            self._send()
            if self._flights:
                self._land()
            elif self._next < len(self._arrivals):
                self._pass_until(max(self._arrivals[self._next], self._now))
        self._progress(self._unreported)
        return self.run

    def _take_arrivals(self) -> None:
        while self._next < len(self._arrivals) and self._arrivals[self._next] <= self._now:
            number, self._next = self._next, self._next + 1
            try:
                sequence = self._scheduler.add(self._request(number), SamplingSpec())
            except ValueError:  # it could never fit
                self.run.refused += 1
                self._ended()
            else:
                self._place[sequence.arrival] = number

    def _request(self, number: int) -> TokenRequest:
        length = int(self._requests.prompt_tokens[number])
        zeros = _ZEROS if length <= len(_ZEROS) else (0,) * length
        # No two prompts are alike, or they would be computed once for both.
        prompt = (number, *zeros[: length - 1])
        answer = Answer(int(self._requests.new_tokens[number]))
        return TokenRequest(str(number), prompt, answer, self._retention)

    def _send(self) -> None:
        while (plan := self._scheduler.schedule()) is not None:
            self.run.steps += 1
            seconds = self._times.seconds(plan)
            self.run.busy_seconds += sum(seconds)
            self._flights.append((plan, self._pipeline.end_of(seconds, self._now)))

    def _land(self) -> None:
        plan, done = self._flights[0]
        if not self._pass_until(max(done, self._now)):
            return  # it was lost
        self._flights.popleft()
        self._note(self._scheduler.absorb(plan, self._ranks.execute(plan)))

    def _pass_until(self, time: float) -> bool:
        """Let time pass; returns whether the workers lived through it."""
        if self._outages and self._outages[0].start <= time:
            self._lose_workers(self._outages.popleft())
            return False
        self._count_time(time)
        self._now = time
        return True

    def _count_time(self, time: float) -> None:
        seconds, ledger = time - self._now, self._scheduler.ledger
        used = float((1 - ledger.free / self._pages_W).max())
        self.run.page_seconds += used * seconds
        self.run.peak_pages = max(self.run.peak_pages, used)
        self.run.running_seconds += self._scheduler.num_running * seconds

    def _lose_workers(self, outage: Outage) -> None:
        start = max(outage.start, self._now)
        self._count_time(start)
        self.run.busy_seconds -= self._pipeline.unfinished(start)
        self.run.down_seconds += outage.back - start
        self.run.recoveries += 1
        self._flights.clear()
        self._times.forget()
        self._ranks.start()
        self._scheduler.restart(self._workers)
        self._now = outage.back
        self._pipeline.start(outage.back)
        self._note(self._scheduler.take_events())

    def _note(self, events: Sequence[Event]) -> None:
        run, now = self.run, self._now
        numbers = [self._place[e.sequence.arrival] for e in events if isinstance(e, NewToken)]
        if numbers:
            places = np.array(numbers)
            before = run.last[places]
            is_first = np.isnan(before)
            run.first[places[is_first]] = now
            run.gaps.add(now - before[~is_first])
            run.last[places] = now
            run.tokens[places] += 1
            run.count_tokens(now, len(numbers))
        for event in events:
            if isinstance(event, Preempted):
                run.preemptions += 1
            elif isinstance(event, Finished):
                place = self._place.pop(event.sequence.arrival)
                if event.sequence.finish_reason == "error":  # alone it is too large
                    run.refused += 1
                    run.last[place] = np.nan
                run.seconds = now
                self._ended()

    def _ended(self) -> None:
        self._unreported += 1
        if self._unreported == _REPORT_EVERY:
            self._progress(self._unreported)
            self._unreported = 0
