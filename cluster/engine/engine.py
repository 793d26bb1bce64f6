"""The engine: requests in, outputs out, one step at a time."""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import Future
from typing import Any, Protocol

from saqqara.cluster.chat import ChatOptions
from saqqara.cluster.request import (
    RequestOutput,
    SamplingParams,
    ScoreOutput,
    derived_seed,
    scoring_params,
)
from saqqara.cluster.scheduling.events import (
    Event,
    Finished,
    NewScores,
    NewToken,
    Preempted,
    Prefilled,
)
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Request, check_room
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import ModelSpec
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo

from .metrics import PrometheusSink, Sink
from .model_fit import check_fits
from .output import Choice, RequestState
from .report import BatchRows, EngineReport
from .request_checks import RetentionLimits, check_priority, check_token_ids
from .stats import EngineStats
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

__all__ = ["Engine", "EngineReport", "Executor", "LocalExecutor"]

logger = logging.getLogger(__name__)

Prompt = str | Many[int]
ChatMessages = Many[Mapping[str, Any]]
RetentionSpec = str | Mapping[str, Any] | Retention


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
        try:
            future.set_result([self.worker.execute(plan)])
        except Exception as error:
            future.set_exception(error)
        return future

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a page has not exactly the owners it should have."""
        self.worker.check_integrity()

    def shutdown(self) -> None:
        """Release what the worker holds outside its memory."""
        self.worker.close()


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
        self._limits = RetentionLimits.of(
            spec, executor.workers, config.max_num_seqs, self.retention
        )
        self._limits.check(self.retention)
        self._eos_token_ids = known_eos(spec, tokenizer)
        self._stats = EngineStats(
            config.model, self.retention.label, executor.workers, [self.metrics, *sinks]
        )
        self._states: dict[str, RequestState] = {}
        self._choices: dict[int, tuple[RequestState, Choice]] = {}  # by the sequence's arrival
        self._flights: deque[tuple[StepPlan, Future[list[StepResult]]]] = deque()
        self._is_broken = False
        self._epoch = time.time() - time.perf_counter()
        self._stats.publish(0, 0, self._now(), is_idle=True)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        messages: ChatMessages | None = None,
        retention: RetentionSpec | None = None,
        budget: int | str | None = None,
        priority: int = 0,
        stream: bool = True,
        must_fit: bool = False,
        chat_options: ChatOptions | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: any name that no unfinished request has.
            prompt: text or token ids; exactly one of `prompt` and `messages`.
            sampling_params: default: `SamplingParams()`.
            messages: a conversation, for the model's chat template.
            retention: overrides the engine's for this request.
            budget: overrides the retention's.
            priority: a lower one goes first.
            stream: let `step` also return the request's unfinished outputs.
            must_fit: refuse a `max_tokens` that the context has no room for, rather than end there.
            chat_options: how `messages` are written.

        Raises:
            ValueError: the request cannot be served; nothing else has changed.
        """
        sampling = sampling_params or SamplingParams()
        sampling.check_vocabulary(self.vocab_size)
        token_ids = self._tokenize("prompt", prompt, messages, chat_options)
        request = Request(
            request_id=request_id,
            prompt_token_ids=self._truncate(token_ids, sampling),
            limits=sampling,
            retention=self._retention(retention, budget),
            priority=priority,
            arrival_time=self._now(),
            prompt=prompt if isinstance(prompt, str) else None,
        )
        if must_fit:
            num_tokens = len(request.prompt_token_ids)
            check_room(num_tokens, sampling.max_tokens, self.scheduler.max_model_len)
        self._add(request, sampling, stream)

    def add_score_request(
        self,
        request_id: str,
        prompt: Prompt | None,
        continuation: Prompt,
        *,
        messages: ChatMessages | None = None,
        retention: RetentionSpec | None = None,
        budget: int | str | None = None,
        priority: int = 0,
        top_logprobs: int | None = None,
        token_by_token: bool = False,
    ) -> None:
        """Queue the scoring of `continuation` (text without special tokens, or ids) after a prompt.

        The prompt's keys and values are retained first, so quality under retention is measured.
        With `top_logprobs` the output also has that many of the most likely tokens in each place.
        With `token_by_token` the continuation is fed in the decode steps that generating it would
        take, not in pieces.

        Raises:
            ValueError: the request cannot be served; nothing else has changed.
        """
        if isinstance(continuation, str):
            continuation = self._tokenizer.check_fit(
                "score_continuation",
                self._tokenizer.encode(continuation, add_special_tokens=False),
                self.vocab_size,
            )
        check_token_ids("score_continuation", continuation, self.vocab_size)
        sampling = scoring_params(top_logprobs)
        request = Request(
            request_id=request_id,
            prompt_token_ids=self._tokenize("prompt", prompt, messages),
            limits=sampling,
            retention=self._retention(retention, budget),
            priority=priority,
            score_continuation=tuple(continuation),
            token_by_token=token_by_token,
            arrival_time=self._now(),
            prompt=prompt if isinstance(prompt, str) else None,
        )
        self._add(request, sampling, stream=False)

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
        return self._report(events)

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
        """Go on with new workers after a failed step: what ran is resumed with its tokens."""
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

    # Requests -------------------------------------------------------------------------------------

    def _add(self, request: Request, sampling: SamplingParams, stream: bool) -> None:
        check_priority(request.priority)
        if request.request_id in self._states:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        self.scheduler.check(request)
        state = RequestState(request, stream)
        seed = self._seed(request.request_id, sampling)
        bad_words = self._tokenizer.spellings(sampling.bad_words)
        specs = [
            sampling.spec(derived_seed(seed, choice=index), self._eos_token_ids, bad_words)
            for index in range(sampling.n)
        ]
        for index, spec in enumerate(specs):
            sequence = self.scheduler.add(
                request, spec, index=index, eos_token_ids=self._eos_token_ids
            )
            choice = Choice(sequence, sampling, self._tokenizer)
            state.choices.append(choice)
            self._choices[sequence.arrival] = (state, choice)
        self._states[request.request_id] = state
        self._stats.added(request.arrival_time)

    def _seed(self, request_id: str, sampling: SamplingParams) -> int:
        """The request's own seed, or one that the engine's seed and the request's id determine."""
        if sampling.seed is not None:
            return sampling.seed
        name = f"{self.config.seed}/{request_id}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())

    def _retention(self, spec: RetentionSpec | None, budget: int | str | None) -> Retention:
        if spec is None and budget is None:
            return self.retention
        retention = Retention.parse(self.retention if spec is None else spec, budget)
        self._limits.check(retention)
        return retention

    def _tokenize(
        self,
        field: str,
        prompt: Prompt | None,
        messages: ChatMessages | None,
        chat_options: ChatOptions | None = None,
    ) -> tuple[int, ...]:
        if (prompt is None) == (messages is None):
            raise ValueError("give either prompt or messages")
        if messages is not None:
            token_ids = self._tokenizer.apply_chat(messages, chat_options)
            return tuple(self._tokenizer.check_fit("messages", token_ids, self.vocab_size))
        assert prompt is not None
        if isinstance(prompt, str):
            token_ids = self._tokenizer.encode(prompt)
            return tuple(self._tokenizer.check_fit(field, token_ids, self.vocab_size))
        check_token_ids(field, prompt, self.vocab_size)
        return tuple(prompt)

    def _truncate(self, token_ids: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
        keep = sampling.truncate_prompt_tokens
        if keep is None:
            return token_ids
        if keep == -1:
            max_tokens = sampling.max_tokens or 1
            keep = self.scheduler.max_model_len - max_tokens
            if keep < 1:
                raise ValueError(
                    f"truncate_prompt_tokens=-1 leaves nothing of the prompt: max_tokens="
                    f"{max_tokens} fills max_model_len={self.scheduler.max_model_len}"
                )
        return token_ids[-keep:]

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

    def _report(self, events: list[Event]) -> list[RequestOutput | ScoreOutput]:
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
