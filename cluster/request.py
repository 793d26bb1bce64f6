"""How a request is sampled, and what comes back."""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from saqqara.workers.plan import SamplingSpec

from .sequence import FinishReason

MAX_CHOICES = 128
MAX_LOGPROBS = 20
_INT64 = 2**63

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class SamplingParams(BaseModel):
    """How one request is sampled; names, defaults and meaning are those of vLLM.

    A bad value is a `ValueError` (pydantic's, one problem per line) that names the field and what
    it may be. `max_tokens=None` means up to the engine's `max_model_len`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Completions per prompt.")
    temperature: float = Field(default=1.0, ge=0, description="0: the most likely token, always.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Sample from this much mass.")
    top_k: int = Field(default=0, ge=-1, description="Sample from the k best tokens; 0 or -1: all.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Least share of the best's.")
    repetition_penalty: float = Field(default=1.0, gt=0, description="Over 1: fewer repetitions.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64, description="None: derived.")
    max_tokens: int | None = Field(default=16, ge=1, description="Tokens to generate at most.")
    min_tokens: int = Field(default=0, ge=0, description="Tokens before a stop is possible.")
    stop: tuple[str, ...] = Field(
        default=(), description="One string or several that end the text."
    )
    stop_token_ids: tuple[TokenId, ...] = ()
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, description="What is added to the logits of these token ids."
    )
    ignore_eos: bool = False
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Best tokens beside the sampled one.",
    )
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        description="Keep the prompt's last k tokens; -1: as many as leave room for max_tokens.",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_token_list(cls, value: Any) -> Any:
        return () if value is None else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop: every string must have at least one character")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, not {self.min_tokens}"
            )
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be at least 1, or -1, not 0")
        return self

    def for_prompt(self, place: int) -> Self:
        """The same for one of several prompts: equal prompts do not get equal answers."""
        if self.seed is None or place == 0:
            return self
        return self.model_copy(update={"seed": derived_seed(self.seed, prompt=place)})

    def spec(self, seed: int, eos_token_ids: tuple[int, ...] = ()) -> SamplingSpec:
        """The part that the workers need; `eos_token_ids` are the model's."""
        stops = () if self.ignore_eos else eos_token_ids
        blocked = dict.fromkeys((*stops, *self.stop_token_ids)) if self.min_tokens > 0 else ()
        return SamplingSpec(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed % _INT64,
            min_tokens=self.min_tokens,
            blocked_token_ids=tuple(blocked),
            logit_bias=tuple((self.logit_bias or {}).items()),
            num_logprobs=self.logprobs,
        )


def derived_seed(seed: int, *, prompt: int = 0, choice: int = 0) -> int:
    """The seed of one choice of one prompt of a request; the first of the first has the request's.

    A hash, as with a sum the second choice of seed s would be the first choice of seed s + 1.
    """
    if prompt == choice == 0:
        return seed
    name = f"{seed}/{prompt}/{choice}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % _INT64


def scoring_params(top_logprobs: int | None) -> SamplingParams:
    """What a request that scores asks for: so many of the most likely tokens in each place.

    Raises:
        ValueError: `top_logprobs` is out of range.
    """
    if top_logprobs is not None and not 0 <= top_logprobs <= MAX_LOGPROBS:
        raise ValueError(f"top_logprobs: must be from 0 to {MAX_LOGPROBS}, not {top_logprobs}")
    return SamplingParams(logprobs=top_logprobs)


def invalid_field(error: ValidationError) -> str:
    """The name of the first field that a pydantic error complains about ('' if none)."""
    location = error.errors()[0]["loc"]
    return str(location[0]) if location else ""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position; rank 1 is the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


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
    """A request's completions so far; `error` says why one finished with the reason `error`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    error: str | None = None


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
