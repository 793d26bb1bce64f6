"""A request as it travels from a front end to its engine, and what comes back."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saqqara.compression.retention import Retention

from .chat import ChatOptions
from .outcome import ErrorCode, FinishReason, KVUsage
from .sampling import SamplingParams

Prompt = str | Sequence[int]
RetentionSpec = str | Mapping[str, Any] | Retention


@dataclass(frozen=True, slots=True)
class Request:
    """One request, from whoever makes it to `Engine.add`.

    Attributes:
        request_id: any name that no unfinished request of the engine has.
        prompt: text or token ids; exactly one of `prompt` and `messages` is set.
        sampling_params: how it is sampled. Of one that scores, only `logprobs` counts: so many of
            the most likely tokens are reported in each place.
        messages: a conversation, to which the model's chat template is applied.
        chat_options: how `messages` are written.
        retention: overrides the engine's for this request.
        budget: overrides the retention's.
        priority: a lower one goes first.
        owner: whose it is; owners share the queue fairly where they wait with one priority.
        timeout_seconds: from when the engine takes it, after which it ends with the error code
            `deadline_exceeded` and what it has; None: never.
        score_continuation: text (without special tokens) or token ids. With it nothing is
            generated: its tokens are scored after the prompt, whose keys and values are retained
            first, and the result is a `ScoreOutput`.
        token_by_token: feed the continuation in the decode steps that generating it would take, not
            in pieces.
        stream: its unfinished outputs are wanted, too.
        add_special_tokens: put the tokenizer's special tokens around a prompt that is a text.
        prompt_text: what the token ids in `prompt` were made of, for the output.
        echo: the output's `prompt` is wanted: it is decoded where there is no text.
        must_fit: refuse a `max_tokens` that the context has no room for, rather than end there.
        visible_tokens: special tokens, by their names, that stay in the text although
            `skip_special_tokens` takes the others out; names that are none do not count.
    """

    request_id: str
    prompt: Prompt | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    messages: Sequence[Mapping[str, Any]] | None = None
    chat_options: ChatOptions | None = None
    retention: RetentionSpec | None = None
    budget: int | str | None = None
    priority: int = 0
    owner: str = ""
    timeout_seconds: float | None = None
    score_continuation: Prompt | None = None
    token_by_token: bool = False
    stream: bool = False
    add_special_tokens: bool = True
    prompt_text: str | None = None
    echo: bool = False
    must_fit: bool = False
    visible_tokens: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position; rank 1 is the most likely.

    `decoded_token` is the token's text: its name where it is special, and `bytes:\\xe6\\x97` where
    it is a part of a character. No two tokens at one position have the same: the sampled one and
    the likelier keep theirs, others that would have it, too, are `token_id:123`. `token_bytes` are
    what the token adds to the answer's text (nothing where it is left out of it, as the token that
    ends an answer is): joined over the sampled tokens they are the text's UTF-8, but for what a
    stop string cuts off.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    token_bytes: bytes = b""


class PromptLogprobs(Sequence[dict[int, Logprob] | None]):
    """Log-probabilities of a prompt's tokens, each given those before it, before retention.

    None for the first, which has none before it; for the others as in `CompletionOutput.logprobs`:
    the prompt's own token first, then the best. Entries are made when they are read, so that a long
    prompt's cost nothing to whoever passes them on.
    """

    @property
    @abstractmethod
    def first(self) -> Logprob:
        """How the first token is spelled; its `logprob` is NaN."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion so far: all of its text and tokens, not only what is new.

    `logprobs[i]` maps token ids to their log-probability at the i-th token: the sampled one first,
    then the best. `stop_reason` is the stop string or stop token id that ended it (None for EOS).
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times (Unix, in seconds) and events of one request."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's completions so far.

    `error` says why one finished with the reason `error`; `error_code` is a name for its kind.
    `prompt_logprobs` come, where they were asked for, with the first token; `kv_cache`, of all
    completions together, when the request has finished.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    error: str | None = None
    error_code: ErrorCode | None = None
    prompt_logprobs: PromptLogprobs | None = None
    kv_cache: KVUsage | None = None


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Log-probabilities of a continuation's tokens after a prompt whose KV was retained.

    `ranks[i]` is 1 where greedy decoding would have chosen the token. Where they were asked for,
    `top_logprobs[i]` maps the ids of the most likely tokens in its place to their log-probability,
    the best first; else it is empty. A request that was aborted or failed has `finish_reason`
    `abort` or `error` and the scores it had until then.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    metrics: RequestMetrics
    finish_reason: FinishReason = "stop"
    error: str | None = None
    finished: bool = True
    top_logprobs: tuple[dict[int, float], ...] = ()

    @property
    def sum(self) -> float:
        """Log-probability of the continuation as a whole."""
        return float(sum(self.logprobs))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written exactly this continuation."""
        return len(self.ranks) == len(self.token_ids) and all(rank == 1 for rank in self.ranks)
