"""From tokens to what the caller sees: text, stop strings, log-probabilities, times."""

import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from math import nan
from typing import Any, overload

import numpy as np

from saqqara.cluster.live.finished import FinishedRequest
from saqqara.cluster.outcome import FinishReason, KVUsage
from saqqara.cluster.request import (
    CompletionOutput,
    Logprob,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
)
from saqqara.cluster.scheduling.events import NewToken
from saqqara.cluster.scheduling.sequence import Sequence, TokenRequest
from saqqara.workers.plan import PromptScores, TokenLogprobs

from .intake import sampling_of
from .tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer

logger = logging.getLogger(__name__)

# A request with several choices counts once, under the first of these that one of them has.
_REASONS: tuple[FinishReason, ...] = ("error", "abort", "length", "stop")


class Choice:
    """One completion in the making.

    Attributes:
        sequence: the scheduler's side of it.
        tokenizer: the model's.
        last_token_time: when its latest token came, None before the first.
        has_started: whether it ever had a slot.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        sampling = sampling_of(sequence.request)
        self.sequence = sequence
        self.tokenizer = tokenizer
        self.last_token_time: float | None = None
        self.has_started = False
        self._sampling = sampling
        skipped = tokenizer.special_token_ids - sequence.request.visible_token_ids
        skipped = skipped if sampling.skip_special_tokens else frozenset()
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, sampling.skip_special_tokens, sequence.request.visible_token_ids
        )
        self._stop = StopChecker(sampling.stop, sampling.include_stop_str_in_output)
        self._text = ""
        self._logprobs: list[dict[int, Logprob]] | None = None if sampling.logprobs is None else []
        self._spelling = _Spelling(tokenizer, skipped)
        self._cumulative_logprob = 0.0

    @property
    def matched(self) -> str | None:
        """The stop string that the text has run into."""
        return self._stop.matched

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended: a stop string counts before the token that completed it."""
        return "stop" if self.matched is not None else self.sequence.finish_reason

    def try_append(self, event: NewToken) -> str | None:
        """Take in the sequence's next token; returns why it cannot be told, if so."""
        try:
            self.append(event)
        except Exception as error:
            message = f"token {event.token_id} cannot be told as text: {error}"
            logger.exception("%s", message)
            return message
        return None

    def end(self) -> None:
        """Let out the text that was held back; no more tokens will come."""
        if self.matched is not None:
            return
        try:
            self._text += self._stop.append(self._detokenizer.flush())
            self._text += self._stop.flush()
        except Exception as error:
            self.sequence.finish_reason = "error"
            self.sequence.error = self.sequence.error or f"the text's end: {error}"

    def append(self, event: NewToken) -> None:
        """Take in the sequence's next token."""
        sampling = self._sampling
        is_stop_token = self.sequence.is_ended_by(event.token_id)
        is_shown = not is_stop_token or sampling.include_stop_str_in_output
        if is_shown and sampling.detokenize:
            may_stop = len(self.sequence.output_token_ids) > sampling.min_tokens
            piece = self._detokenizer.append(event.token_id)
            self._text += self._stop.append(piece, may_stop)
        if self._logprobs is not None:
            self._append_logprobs(self._logprobs, event, is_shown=is_shown)

    def output(self) -> CompletionOutput:
        """The completion so far."""
        has_logprobs = self._logprobs is not None
        return CompletionOutput(
            index=self.sequence.index,
            text=self._text,
            token_ids=tuple(self.sequence.output_token_ids),
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.sequence.stop_reason if self.matched is None else self.matched,
        )

    def _append_logprobs(
        self, logprobs: list[dict[int, Logprob]], event: NewToken, *, is_shown: bool
    ) -> None:
        assert event.logprobs is not None, f"no log-probability came with {event.token_id}"
        logprobs.append(self._spelling.entry(event.token_id, event.logprobs, is_shown=is_shown))
        self._spelling.pass_by(event.token_id)
        self._cumulative_logprob += event.logprobs.logprob


class _Spelling:
    """Names and bytes of the tokens that may stand next in one text."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped  # tokens that are left out of the text
        self._at_start = True

    def entry(
        self, token_id: int, chosen: TokenLogprobs, *, is_shown: bool = True
    ) -> dict[int, Logprob]:
        """The log-probabilities in the next place: of the token that stands there, and the best."""
        name = self.name(token_id)
        data = self.data(token_id) if is_shown else b""
        entry = {token_id: Logprob(chosen.logprob, chosen.rank, name, data)}
        names = {name}
        best = zip(chosen.top_ids, chosen.top_logprobs, strict=True)
        for rank, (other, logprob) in enumerate(best, start=1):
            if other in entry:
                continue
            name = self.name(other)
            name = f"token_id:{other}" if name in names else name
            names.add(name)
            entry[other] = Logprob(logprob, rank, name, self.data(other))
        return entry

    def data(self, token_id: int) -> bytes:
        """What a token adds to the text."""
        if token_id in self._skipped:
            return b""
        return self._tokenizer.token_bytes(token_id, at_start=self._at_start)

    def name(self, token_id: int) -> str:
        """A token as text; a part of a character as its bytes."""
        if token_id in self._tokenizer.special_token_ids:
            return self._tokenizer.token_text(token_id)
        data = self._tokenizer.token_bytes(token_id, at_start=self._at_start)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def pass_by(self, token_id: int) -> None:
        """This token stands next, so that others follow it."""
        self._at_start = self._at_start and token_id in self._skipped


class SpelledPrompt(PromptLogprobs):
    """The log-probabilities of a prompt as a worker wrote them, spelled entry by entry.

    Args:
        token_ids: the prompt's.
        text: the prompt's, if there is one: special tokens are in it only if it has their names.
        scores: of all tokens but the first.
        tokenizer: the model's.
        skip_special_tokens: where there is no text, it is without special tokens.
    """

    def __init__(
        self,
        token_ids: tuple[int, ...],
        text: str | None,
        scores: PromptScores,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
    ) -> None:
        num_scored = len(token_ids) - 1
        self._token_ids = token_ids
        self._logprobs = np.frombuffer(scores.logprobs, dtype=np.float32)
        self._ranks = np.frombuffer(scores.ranks, dtype=np.int32)
        num_top = len(scores.top_ids) // (4 * num_scored) if num_scored else 0
        shape = (num_scored, num_top)
        self._top_ids = np.frombuffer(scores.top_ids, dtype=np.int32).reshape(shape)
        self._top_logprobs = np.frombuffer(scores.top_logprobs, dtype=np.float32).reshape(shape)
        skipped = tokenizer.special_token_ids
        if text is not None:
            skipped -= {t for t in skipped & {*token_ids} if tokenizer.token_text(t) in text}
        elif not skip_special_tokens:
            skipped = frozenset()
        self._spellings = [_Spelling(tokenizer, skipped), _Spelling(tokenizer, skipped)]
        start = next((i for i, t in enumerate(token_ids) if t not in skipped), len(token_ids))
        self._text_start = start  # up to here tokens stand at the start of the text
        self._spellings[1].pass_by(-1)

    def __len__(self) -> int:
        return len(self._token_ids)

    @overload
    def __getitem__(self, place: int) -> dict[int, Logprob] | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[int, Logprob] | None]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place == 0:
            return None
        row = place - 1
        chosen = TokenLogprobs(
            float(self._logprobs[row]),
            int(self._ranks[row]),
            tuple(self._top_ids[row].tolist()),
            tuple(self._top_logprobs[row].tolist()),
        )
        return self._at(place).entry(self._token_ids[place], chosen)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Many) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    @property
    def first(self) -> Logprob:
        """See `PromptLogprobs`."""
        spelling, token_id = self._at(0), self._token_ids[0]
        return Logprob(nan, None, spelling.name(token_id), spelling.data(token_id))

    def _at(self, place: int) -> "_Spelling":
        return self._spellings[place > self._text_start]


@dataclass(slots=True, eq=False)
class RequestState:
    """A request that is being served. With `stream`, unfinished outputs are wanted, too."""

    request: TokenRequest
    stream: bool
    choices: list[Choice] = field(default_factory=list)
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    is_prefilled: bool = False
    _spelled: PromptLogprobs | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all of its choices have ended."""
        return all(choice.sequence.is_finished for choice in self.choices)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the request as a whole ended."""
        reasons = {choice.finish_reason for choice in self.choices}
        return next(reason for reason in _REASONS if reason in reasons)

    def measures(self, finished: float) -> FinishedRequest:
        """What its engine measures of it; all of its choices have ended."""
        request = self.request
        sequences = [choice.sequence for choice in self.choices]
        asked = None if request.is_score else request.sampling.max_tokens
        if asked is None and not request.is_score:
            asked = sequences[0].max_output_tokens
        return FinishedRequest(
            reason=self.finish_reason,
            prompt_tokens=len(request.prompt_token_ids),
            generation_tokens=tuple(len(s.output_token_ids) for s in sequences),
            max_tokens=asked,
            arrival=request.arrival_time,
            scheduled=self.scheduled_time,
            first_token=self.first_token_time,
            last_token=self.last_token_time,
            finished=finished,
        )

    def output(self) -> RequestOutput | ScoreOutput:
        """What there is of it."""
        request = self.request
        sequences = [choice.sequence for choice in self.choices]
        failed = next((s for s in sequences if s.error is not None), None)
        error = None if failed is None else failed.error
        metrics = RequestMetrics(
            arrival_time=request.arrival_time,
            first_token_time=self.first_token_time,
            finished_time=self.finished_time,
            num_preemptions=sum(s.num_preemptions for s in sequences),
        )
        if request.score_continuation is not None:
            return ScoreOutput(
                request_id=request.request_id,
                prompt=request.prompt,
                prompt_token_ids=request.prompt_token_ids,
                token_ids=request.score_continuation,
                logprobs=tuple(sequences[0].scored_logprobs),
                ranks=tuple(sequences[0].scored_ranks),
                top_logprobs=tuple(sequences[0].scored_top),
                metrics=metrics,
                finish_reason=self.finish_reason,
                error=error,
            )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=tuple(choice.output() for choice in self.choices),
            finished=self.is_finished,
            metrics=metrics,
            error=error,
            error_code=None if failed is None else failed.error_code,
            prompt_logprobs=self._prompt_logprobs(),
            kv_cache=self._kv_cache() if self.is_finished else None,
            num_cached_tokens=max(s.num_cached_tokens for s in sequences),
            num_stored_tokens=max(s.num_stored_tokens for s in sequences),
        )

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        if self._spelled is None and (scores := self.choices[0].sequence.prompt_scores) is not None:
            request, sampling = self.request, sampling_of(self.request)
            self._spelled = SpelledPrompt(
                request.prompt_token_ids,
                request.prompt,
                scores,
                self.choices[0].tokenizer,
                sampling.skip_special_tokens,
            )
        return self._spelled

    def _kv_cache(self) -> KVUsage:
        known = (choice.sequence.kv_cache for choice in self.choices)
        return sum((kv for kv in known if kv is not None), KVUsage())
