"""A request as it travels from a front end to its engine, and what comes back."""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saqqara.compression.retention import Retention
from saqqara.configs.shown import shown

from .chat import ChatOptions
from .outcome import ErrorCode, FinishReason, KVUsage
from .sampling import SamplingParams

Prompt = str | Sequence[int]
RetentionSpec = str | Mapping[str, Any] | Retention
MAX_SALT_CHARS = 256
CONVERSATION_ID = r"^[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,127}$"  # clients resolve "..", as a path


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
        cache_salt: text of at most `MAX_SALT_CHARS`; cached prefixes are shared only among requests
            of one owner with one salt.
        conversation_id: the conversation whose next turn it is, its owner's own: what earlier turns
            kept is used again as far as the prompt begins with them, and what this one keeps stays
            for the next. One turn of a conversation runs at a time, with one prompt and one choice.
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
    cache_salt: str = ""
    conversation_id: str | None = None
    timeout_seconds: float | None = None
    score_continuation: Prompt | None = None
    token_by_token: bool = False
    stream: bool = False
    add_special_tokens: bool = True
    prompt_text: str | None = None
    echo: bool = False
    must_fit: bool = False
    visible_tokens: Sequence[str] = ()


def check_reuse(request: Request) -> None:
    """Raise a ValueError, naming the field, where a request cannot use memory as it says."""
    check_cache_salt(request.cache_salt)
    conversation_id = request.conversation_id
    if conversation_id is None:
        return
    check_conversation_id(conversation_id)
    sampling = request.sampling_params
    if request.score_continuation is not None:
        raise ValueError("conversation_id: a continuation is scored without a conversation")
    if sampling.n > 1:
        raise ValueError(
            f"conversation_id: a turn has one choice, not n={sampling.n}: the next turn goes on "
            "from it"
        )
    if sampling.prompt_logprobs is not None:
        raise ValueError(
            "conversation_id: a turn has no prompt_logprobs: what earlier turns have computed is "
            "not computed again"
        )


def check_cache_salt(salt: object) -> None:
    """Raise a ValueError unless it is a text of at most `MAX_SALT_CHARS`, none included."""
    if not isinstance(salt, str) or len(salt) > MAX_SALT_CHARS or not _is_text(salt):
        raise ValueError(
            f"cache_salt: must be a text of at most {MAX_SALT_CHARS} characters, not {shown(salt)}"
        )


def check_conversation_id(conversation_id: object) -> None:
    """Raise a ValueError unless it may be the id of a conversation."""
    given = conversation_id if isinstance(conversation_id, str) else ""
    if re.fullmatch(CONVERSATION_ID[1:-1], given) is None:
        raise ValueError(
            "conversation_id: must be 1 to 128 letters, digits, '_', '.', ':' or '-' (no '.' "
            f"first), not {shown(conversation_id)}"
        )


def _is_text(given: str) -> bool:
    """Whether it can be written: half of a surrogate pair cannot."""
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    completions together, when the request has finished. `num_cached_tokens` of the prompt's were
    not computed for it: an earlier request, or another one of its conversation, has left them.
    `num_stored_tokens` of it are left for later ones.
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
    num_cached_tokens: int = 0
    num_stored_tokens: int = 0


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
