"""The engine: requests in, outputs out, one step at a time."""

import logging
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import replace

from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.cluster.scheduling.events import (
    Event,
    Finished,
    NewScores,
    NewToken,
    Preempted,
    Prefilled,
)
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import ModelSpec
from saqqara.workers.plan import StepPlan, StepResult

from .executor import Executor
from .intake import Intake, RetentionLimits
from .metrics import PrometheusSink, Sink
from .model_fit import check_fits
from .output import Choice, RequestState
from .report import BatchRows, EngineReport
from .stats import EngineStats
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests on one replica of the model. Not thread-safe: one thread drives it.

    Args:
        config: the engine's settings.
        executor: where plans are carried out; the engine's from now on.
        tokenizer: the model's.
        spec: the model's sizes.
        lookahead: steps of one sequence that may be in flight; see `Scheduler`.
        sinks: where metrics go besides Prometheus.
        model_name: the metrics' label of that name; default: `config.model`.

    Attributes:
        metrics: the Prometheus side of the engine's metrics, which can serve them over HTTP.
        vocab_size: the model's tokens are below it.

    Raises:
        ValueError: `retention`, `budget` or `max_model_len` does not fit the model.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        *,
        lookahead: int = 1,
        sinks: Many[Sink] = (),
        model_name: str | None = None,
    ) -> None:
        check_fits(config, spec)
        self.config = config
        self.retention = Retention.parse(config.retention, config.budget)
        self.metrics = PrometheusSink(model_name or config.model)
        self.scheduler = Scheduler(
            executor.workers,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len or spec.max_position,
            max_prefill_tokens=config.max_prefill_tokens,
            prefill_quantum=config.prefill_quantum,
            max_extend_tokens=config.max_extend_tokens,
            lookahead=lookahead,
        )
        self._executor = executor
        self._tokenizer = tokenizer
        self.vocab_size = spec.vocab_size
        limits = RetentionLimits.of(spec, executor.workers, config.max_num_seqs, self.retention)
        limits.check(self.retention)
        self._eos_token_ids = known_eos(spec, tokenizer)
        self._intake = Intake(
            tokenizer,
            vocab_size=spec.vocab_size,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self.scheduler.max_model_len,
            retention=self.retention,
            limits=limits,
            seed=config.seed,
        )
        self._stats = EngineStats(
            config.model, self.retention.label, executor.workers, [self.metrics, *sinks]
        )
        self._states: dict[str, RequestState] = {}
        self._choices: dict[int, tuple[RequestState, Choice]] = {}  # by the sequence's arrival
        self._flights: deque[tuple[StepPlan, Future[list[StepResult]]]] = deque()
        self._is_broken = False
        self._epoch = time.time() - time.perf_counter()
        self._stats.publish(0, 0, self._now(), is_idle=True)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: the request cannot be served; nothing else has changed.
        """
        tokens = replace(self._intake.read(request), arrival_time=self._now())
        if tokens.request_id in self._states:
            raise ValueError(f"request_id {tokens.request_id!r} is in use")
        self.scheduler.check(tokens)
        specs = self._intake.specs(tokens)
        state = RequestState(tokens, stream=request.stream and not tokens.is_score)
        for index, spec in enumerate(specs):
            sequence = self.scheduler.add(
                tokens, spec, index=index, eos_token_ids=self._eos_token_ids
            )
            choice = Choice(sequence, self._tokenizer)
            state.choices.append(choice)
            self._choices[sequence.arrival] = (state, choice)
        self._states[tokens.request_id] = state
        self._stats.added(tokens.arrival_time)

    def step(self) -> list[RequestOutput | ScoreOutput]:
        """Schedule, execute, absorb; returns what the requests have to show for it.

        Keeps as many plans in flight as the scheduler allows and waits for the oldest only.

        Raises:
            Exception: whatever ended the executor, with a note of the requests that were in the
                step; `restart` goes on with another one.
        """
        if self._is_broken:
            raise RuntimeError("the engine's last step failed; it needs a restart")
        try:
            while (plan := self.scheduler.schedule()) is not None:
                self._flights.append((plan, self._executor.execute(plan)))
            events = self._absorb_oldest()
        except Exception as error:
            names = ", ".join(self.scheduler.requests_in_flight()) or "none"
            error.add_note(f"requests in the step: {names}")
            logger.error("the engine's step failed; requests in it: %s", names)
            raise
        return self._outputs(events)

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """Stop requests; unknown or finished ids are ignored.

        What they hold is freed by the next step, which returns their last output (`abort`).
        """
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            if (state := self._states.get(request_id)) is not None:
                for choice in state.choices:
                    self.scheduler.finish(choice.sequence, "abort")

    def has_unfinished(self) -> bool:
        """Whether another step has something to do."""
        return bool(self._states) or not self.scheduler.is_idle

    def note_rows(self, rows: BatchRows) -> None:
        """Show in the metrics how far the batch job is that runs on this engine."""
        self._stats.batch(rows)

    def restart(self, executor: Executor) -> None:
        """Go on with new workers after a failed step: what ran is resumed with its tokens.

        Recovery from a lost rank rests on it: a token that was sent never changes.
        """
        self._flights.clear()
        self._is_broken = False
        self._executor = executor
        self.scheduler.restart(executor.workers)
        self._stats.set_workers(executor.workers)

    def report(self) -> EngineReport:
        """Measurements since the start or the last `reset_stats`."""
        return self._stats.report(is_idle=self.scheduler.is_idle)

    def reset_stats(self) -> None:
        """Start the measurements anew (the counters of the metrics go on)."""
        self._stats.reset()

    def shutdown(self) -> None:
        """Release the workers and stop serving metrics; calling it again does nothing."""
        self._executor.shutdown()
        self.metrics.close()

    # Results --------------------------------------------------------------------------------------

    def _absorb_oldest(self) -> list[Event]:
        if not self._flights:
            return self.scheduler.take_events()
        plan, future = self._flights.popleft()
        self._is_broken = True  # until the step is absorbed
        results = future.result()
        events = self.scheduler.absorb(plan, results)
        self._is_broken = False
        self._stats.step(results, self.scheduler.ledger.usage(), self._now())
        if self.config.check_integrity and not self._flights:
            self._executor.check_integrity()
        return events

    def _outputs(self, events: list[Event]) -> list[RequestOutput | ScoreOutput]:
        """Tell requests, statistics and the caller what happened."""
        now = self._now()
        changed: dict[str, RequestState] = {}
        while events:
            for event in events:
                state, choice = self._choices[event.sequence.arrival]
                self._note(event, state, choice, now)
                if isinstance(event, NewToken | Finished):
                    changed[state.request.request_id] = state
            events = self.scheduler.take_events()  # a stop string may have ended a sequence
        outputs: list[RequestOutput | ScoreOutput] = []
        for state in changed.values():
            if state.is_finished:
                self._close(state, now)
            if state.is_finished or state.stream:
                outputs.append(state.output())
        self._stats.publish(
            self.scheduler.num_running,
            self.scheduler.num_waiting,
            now,
            is_idle=self.scheduler.is_idle,
        )
        return outputs

    def _note(self, event: Event, state: RequestState, choice: Choice, now: float) -> None:
        match event:
            case NewToken():
                try:
                    choice.append(event)
                except Exception as error:
                    message = f"token {event.token_id} cannot be told as text: {error}"
                    logger.exception("%s", message)
                    self.scheduler.finish(event.sequence, "error", error=message)
                self._note_token(state, choice, now)
                if choice.matched is not None:
                    self.scheduler.finish(event.sequence, "stop", choice.matched)
            case NewScores():
                self._stats.scored(event.num_tokens)
                state.first_token_time = state.first_token_time or now
            case Prefilled():
                request = state.request
                num_tokens = len(request.prompt_token_ids)
                self._stats.prefilled(request.retention.method, event.kept, num_tokens)
                if not state.is_prefilled:
                    state.is_prefilled = True
                    self._stats.prompt(num_tokens)
            case Preempted():
                self._stats.preempted()
            case Finished():
                try:
                    choice.end()
                except Exception as error:
                    event.sequence.finish_reason = "error"
                    event.sequence.error = event.sequence.error or f"the text's end: {error}"

    def _note_token(self, state: RequestState, choice: Choice, now: float) -> None:
        if state.first_token_time is None:
            state.first_token_time = now
            self._stats.first_token(now - state.request.arrival_time)
        last = choice.last_token_time
        self._stats.token(None if last is None else now - last)
        choice.last_token_time = now

    def _close(self, state: RequestState, now: float) -> None:
        state.finished_time = now
        del self._states[state.request.request_id]
        for choice in state.choices:
            del self._choices[choice.sequence.arrival]
        self._stats.finished(state.finish_reason, now - state.request.arrival_time)

    def _now(self) -> float:
        """Unix time in seconds, but never running backwards."""
        return self._epoch + time.perf_counter()


def known_eos(spec: ModelSpec, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text, of the model's configs and the tokenizer, ascending.

    Those that the model cannot write are left out with a warning.
    """
    given = {*spec.eos_token_ids, *tokenizer.eos_token_ids}
    known = tuple(sorted(token for token in given if 0 <= token < spec.vocab_size))
    if unknown := sorted(given.difference(known)):
        logger.warning(
            "end tokens %s are ignored: the model's tokens are 0 to %d",
            ", ".join(map(str, unknown)),
            spec.vocab_size - 1,
        )
    return known
