"""The engine: requests in, outputs out, one step at a time."""

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import replace

from saqqara.cluster.errors import WorkerDiedError
from saqqara.cluster.live.board import Board
from saqqara.cluster.live.snapshot import LiveStats
from saqqara.cluster.outcome import ErrorCode
from saqqara.cluster.presets import ModelPresets, with_profile
from saqqara.cluster.recovery.attempts import Attempts, RecoveryLimits
from saqqara.cluster.recovery.clock import Clock
from saqqara.cluster.recovery.expiry import Expiry
from saqqara.cluster.recovery.flights import Flights
from saqqara.cluster.recovery.outage import Outage
from saqqara.cluster.recovery.suspects import Suspects, verdict_on
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.cluster.scheduling.events import (
    Event,
    Finished,
    NewScores,
    NewToken,
    Preempted,
    Prefilled,
)
from saqqara.cluster.structured.preparation import Preparation
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import ModelSpec

from .executor import Executor
from .intake import Intake, RetentionLimits
from .metrics import PrometheusSink, Sink
from .model_fit import check_fits, known_eos, scheduler_of
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
        lookahead: steps of one sequence that may be in flight (see `Scheduler`); default: 2 where
            there are GPUs, which should have the next step before the last is taken in.
        sinks: where metrics go besides Prometheus.
        model_name: the metrics' label of that name; default: `config.model`.
        replica_id: what it is called among several; default: its host and process.
        limits: how often lost workers are started again.
        clock: default: the machine's.

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
        lookahead: int | None = None,
        sinks: Many[Sink] = (),
        model_name: str | None = None,
        replica_id: str | None = None,
        limits: RecoveryLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_fits(config, spec)
        self.config = config = with_profile(config.settled(executor.workers))
        self.retention = Retention.parse(config.retention, config.budget)
        self.metrics = PrometheusSink(model_name or config.model)
        self.scheduler = scheduler_of(config, spec, executor.workers, lookahead)
        self._executor = executor
        self._tokenizer = tokenizer
        self.vocab_size = spec.vocab_size
        self._eos_token_ids = known_eos(spec, tokenizer)
        self._intake = Intake(
            tokenizer,
            vocab_size=spec.vocab_size,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self.scheduler.max_model_len,
            retention=self.retention,
            limits=RetentionLimits.of(spec, executor.workers, config.max_num_seqs, self.retention),
            presets=ModelPresets.of(config),
            seed=config.seed,
        )
        self._states: dict[str, RequestState] = {}
        self._choices: dict[int, tuple[RequestState, Choice]] = {}  # by the sequence's arrival
        self._clock = clock or Clock()
        self._epoch = time.time() - self._clock.now()
        self._preparation = Preparation(self._clock, WorkerDiedError)
        label = self.retention.label
        self._board = Board(model_name or config.model, label, self._now(), replica_id)
        self._stats = EngineStats(
            config, label, executor.workers, [self.metrics, *sinks], self._board
        )
        self._flights = Flights(executor.workers, self._clock)
        self._attempts = Attempts(limits or RecoveryLimits(), self._clock)
        self._suspects = Suspects()
        self._expiry = Expiry()
        self._outage: Outage | None = None
        self._lost_at: float | None = None  # until there is a new token
        self._is_broken = False
        self._stats.publish(self.scheduler, self._now())

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
        ready = self._preparation.begin(tokens.request_id, specs[0].grammar)
        state = RequestState(tokens, stream=request.stream and not tokens.is_score)
        for index, spec in enumerate(specs):
            sequence = self.scheduler.add(
                tokens, spec, index=index, eos_token_ids=self._eos_token_ids, is_ready=ready
            )
            choice = Choice(sequence, self._tokenizer)
            state.choices.append(choice)
            self._choices[sequence.arrival] = (state, choice)
        self._states[tokens.request_id] = state
        if request.timeout_seconds is not None:
            self._expiry.add(tokens.request_id, tokens.arrival_time + request.timeout_seconds)
        self._stats.added(tokens.arrival_time)

    def step(self) -> list[RequestOutput | ScoreOutput]:
        """Schedule, execute, absorb; returns what the requests have to show for it.

        Keeps as many plans in flight as the scheduler allows and waits for the oldest only. While
        lost workers are started again, a step waits for them a moment. Requests whose time is over
        end first.

        Raises:
            EngineDeadError: the workers are lost for good.
            Exception: whatever ended the executor, with a note of the requests that were in the
                step; `restart` goes on with another one.
        """
        if self._is_broken:
            raise RuntimeError("the engine's last step failed; it needs a restart")
        self._is_broken = True  # until the step has gone well
        for request_id in self._expiry.pop_expired(self._now()):
            self._end_with_error(request_id, "its timeout_seconds are over", "deadline_exceeded")
        self.scheduler.expire(self._now())
        try:
            events = self._run_step() if self._outage is None else self._await_workers(self._outage)
        except Exception as error:
            names = ", ".join(self.scheduler.requests_in_flight()) or "none"
            error.add_note(f"requests in the step: {names}")
            logger.error("the engine's step failed; requests in it: %s", names)
            raise
        self._is_broken = False
        return self._outputs(events)

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """Stop requests; unknown or finished ids are ignored.

        What they hold is freed by the next step, which returns their last output (`abort`).
        """
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            if (state := self._states.get(request_id)) is not None:
                for choice in state.choices:
                    self.scheduler.finish(choice.sequence, "abort")

    def _end_with_error(self, request_id: str, message: str, code: ErrorCode) -> None:
        for choice in self._states[request_id].choices:
            self.scheduler.finish(choice.sequence, "error", error=message, error_code=code)

    def end_conversation(self, conversation_id: str, owner: str = "") -> bool:
        """Give up what is kept of an owner's conversation; whether there was anything.

        Raises:
            ConversationBusyError: a turn of it has not ended.
        """
        return self.scheduler.end_conversation(owner, conversation_id)

    def reset_prefix_cache(self) -> bool:
        """Give up the cached prefixes that nobody uses; whether none is left."""
        return self.scheduler.reset_prefix_cache()

    def has_unfinished(self) -> bool:
        """Whether another step has something to do."""
        is_busy = bool(self._states) or not self.scheduler.is_idle
        return is_busy or not self.is_ready or self.scheduler.has_expired(self._now())

    @property
    def is_ready(self) -> bool:
        """Whether there are workers, as far as is known; else the next steps see to it."""
        return self._outage is None and self._executor.failure is None

    def note_rows(self, rows: BatchRows) -> None:
        """Show in the metrics how far the batch job is that runs on this engine."""
        self._stats.batch(rows)

    def restart(self, executor: Executor) -> None:
        """Go on elsewhere after a failed step: what ran is resumed with its tokens."""
        self._is_broken = False
        self._outage = None
        self._executor = executor
        self._start_over()

    def report(self) -> EngineReport:
        """Measurements since the start or the last `reset_stats`."""
        return self._stats.report(self.scheduler)

    def live_stats(self) -> LiveStats:
        """What it does now; any thread may ask, whatever the engine is at."""
        return self._board.read(self._now())

    def reset_stats(self) -> None:
        """Start the measurements anew (the counters of the metrics go on)."""
        self._stats.reset()

    def shutdown(self) -> None:
        """Release the workers and stop serving metrics; calling it again does nothing."""
        self._executor.shutdown()
        self.metrics.close()

    # Steps ----------------------------------------------------------------------------------------

    def _run_step(self) -> list[Event]:
        try:
            if not self._flights and (failure := self._executor.failure) is not None:
                raise failure
            self._admit_prepared()
            while (plan := self.scheduler.schedule()) is not None:
                self._stats.started(self.scheduler.started(), self._choices, self._now())
                self._flights.send(plan, self._executor)
            return self._absorb_oldest()
        except WorkerDiedError as error:
            return self._lose_workers(error)

    def _absorb_oldest(self) -> list[Event]:
        if not self._flights:
            self._preparation.wait()
            return self.scheduler.take_events()
        plan, results = self._flights.land(self._executor)
        events = self.scheduler.absorb(plan, results)
        self._stats.step(results, self.scheduler.ledger.usage(), self._now())
        if self.config.check_integrity and not self._flights:
            with suppress(WorkerDiedError):  # the next step hears of it; these events are good
                self._executor.check_integrity()
        return events

    def _admit_prepared(self) -> None:
        """Queue the requests whose grammar the workers have; end those who cannot have theirs."""
        for request_id, error in self._preparation.settled(self._executor):
            if (state := self._states.get(request_id)) is not None:
                for choice in state.choices:
                    self.scheduler.enqueue(choice.sequence, error)

    # Lost workers ---------------------------------------------------------------------------------

    def _lose_workers(self, failure: WorkerDiedError) -> list[Event]:
        """Queue everybody again, tokens and all, and see to it that there will be workers."""
        in_flight = self.scheduler.all_in_flight()
        names = ", ".join(in_flight) or "none"
        logger.error(
            "workers are lost (%s): %s; requests in flight: %s", failure.cause, failure, names
        )
        guilty = self._suspects.lost(in_flight, failure.cause)
        self._start_over()
        if guilty is not None:
            self._end_guilty(guilty, failure)
        self._run_next_alone()
        self._stats.lost(failure)
        self._lost_at = self._lost_at or self._clock.now()
        self._outage = Outage(failure, self._executor, self._attempts, self._clock)
        return self.scheduler.take_events()

    def _await_workers(self, outage: Outage) -> list[Event]:
        """Go on if there are workers again; else requests can be added and aborted meanwhile."""
        if outage.is_over():
            self._outage = None
            self._start_over()
            self._stats.recovered(outage.cause, outage.seconds)
            logger.warning("workers are back after %.1f s (%s)", outage.seconds, outage.cause)
        return self.scheduler.take_events()

    def _start_over(self) -> None:
        """Nothing is in flight and no worker holds anything: a token that was sent stays."""
        self._flights.drop()
        self._preparation.restart()
        self.scheduler.restart(self._executor.workers)
        self._stats.set_workers(self._executor.workers)

    def _end_guilty(self, request_id: str, failure: WorkerDiedError) -> None:
        message = f"{verdict_on(request_id)}: {failure}"
        logger.error("%s", message)
        self._end_with_error(request_id, message, "computation_failed")

    def _run_next_alone(self) -> None:
        """Suspects run one after the other, then all together."""
        self.scheduler.run_alone(self._suspects.turn(self._states))

    def _note_progress(self, request_id: str) -> None:
        """A request has something new: the workers work, and it is no suspect any more."""
        self._attempts.forget()
        if self._lost_at is not None:
            seconds = self._clock.now() - self._lost_at
            logger.warning("the first new token comes %.1f s after workers were lost", seconds)
            self._lost_at = None
        if self._suspects.progress(request_id):
            self._run_next_alone()

    # Outputs --------------------------------------------------------------------------------------

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
        self._stats.publish(self.scheduler, now)
        return outputs

    def _note(self, event: Event, state: RequestState, choice: Choice, now: float) -> None:
        match event:
            case NewToken():
                if (message := choice.try_append(event)) is not None:
                    self.scheduler.finish(event.sequence, "error", error=message)
                self._note_token(state, choice, now)
                self._note_progress(state.request.request_id)
                if choice.matched is not None:
                    self.scheduler.finish(event.sequence, "stop", choice.matched)
            case NewScores():
                self._stats.scored(event.num_tokens)
                if event.num_tokens:
                    self._note_progress(state.request.request_id)
                state.first_token_time = state.first_token_time or now
                state.last_token_time = now
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
                choice.end()

    def _note_token(self, state: RequestState, choice: Choice, now: float) -> None:
        if state.first_token_time is None:
            state.first_token_time = now
            self._stats.first_token(now - state.request.arrival_time)
        last = choice.last_token_time
        self._stats.token(None if last is None else now - last)
        choice.last_token_time = state.last_token_time = now

    def _close(self, state: RequestState, now: float) -> None:
        state.finished_time = now
        del self._states[state.request.request_id]
        self._expiry.forget(state.request.request_id)
        if self._suspects.forget(state.request.request_id) or self._suspects.order:
            self._run_next_alone()
        for choice in state.choices:
            del self._choices[choice.sequence.arrival]
        self._stats.finished(state.measures(now))

    def _now(self) -> float:
        """Unix time in seconds, but never running backwards."""
        return self._epoch + self._clock.now()
