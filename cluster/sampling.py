"""How a request is sampled."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from saqqara.configs.shown import shown
from saqqara.workers.plan import Grammar, SamplingSpec

from .structured.outputs import StructuredOutputs

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 1e6  # from here on every token is as likely as any other
PENALTY_RANGE = 0.01, 100.0  # far from where fp32 logits overflow or vanish
MAX_TOKEN_IDS = 1024  # stops and biases of a request, which each of its steps looks at
MAX_STRINGS = 256
MAX_STRING_CHARS = 1024
_INT64 = 2**63
_INT32 = 2**31

T = TypeVar("T")
# A list whose errors end with the first: a body of some MB can have a million, of 1 kB each.
FailFastList = Annotated[list[T], Field(fail_fast=True)]


def _check_size(bias: Any) -> Any:
    if isinstance(bias, Mapping) and len(bias) > MAX_TOKEN_IDS:
        raise ValueError(f"should have at most {MAX_TOKEN_IDS} items, not {len(bias)}")
    return bias


FEW_ENTRIES = BeforeValidator(_check_size)  # before there is an error for each of them
TokenId = Annotated[int, Field(ge=0, lt=_INT32)]
Word = Annotated[str, Field(max_length=MAX_STRING_CHARS)]


class SamplingParams(BaseModel):
    """How one request is sampled; names, defaults and meaning are those of vLLM.

    A bad value is a `ValueError` (pydantic's, one problem per line) that names the field and what
    it may be. `max_tokens=None` means up to the engine's `max_model_len`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Completions per prompt.")
    temperature: float = Field(
        default=1.0, ge=0, le=MAX_TEMPERATURE, description="0: the most likely token, always."
    )
    top_p: float = Field(
        default=1.0, ge=0, le=1, description="Sample from this much mass; 0: the best token."
    )
    top_k: int = Field(
        default=0, ge=-1, lt=_INT32, description="Sample from the k best tokens; 0 or -1: all."
    )
    min_p: float = Field(default=0.0, ge=0, le=1, description="Least share of the best's.")
    repetition_penalty: float = Field(
        default=1.0,
        ge=PENALTY_RANGE[0],
        le=PENALTY_RANGE[1],
        description="Over 1: fewer repetitions; 0.01 to 100.",
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64, description="None: derived.")
    max_tokens: int | None = Field(
        default=16, ge=1, lt=_INT32, description="Tokens to generate at most."
    )
    min_tokens: int = Field(
        default=0, ge=0, lt=_INT32, description="Tokens before a stop is possible."
    )
    stop: Annotated[tuple[Word, ...], Field(fail_fast=True)] = Field(
        default=(),
        max_length=MAX_STRINGS,
        description="One string or several that end the text.",
    )
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True)] = Field(
        default=(), max_length=MAX_TOKEN_IDS
    )
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None, FEW_ENTRIES
    ] = Field(
        default=None,
        description="What is added to the logits of these token ids.",
    )
    allowed_token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, description="The only tokens that may be sampled."
    )
    bad_words: Annotated[tuple[Word, ...], Field(fail_fast=True)] = Field(
        default=(),
        max_length=MAX_STRINGS,
        description="Words that are not written: the last token of each is never sampled where "
        "the answer ends with the tokens before it.",
    )
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="What the answer must look like: JSON, a regex, a choice, ..."
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Best tokens beside the sampled one.",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Best tokens beside each of the prompt's own, as prefill sees them: before "
        "retention.",
    )
    detokenize: bool = Field(default=True, description="Without it the answer has no text.")
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        lt=_INT32,
        description="Keep k tokens of the prompt; -1: as many as leave room for max_tokens.",
    )

    truncation_side: Literal["left", "right"] = Field(
        default="left", description="Where truncate_prompt_tokens cuts: left keeps the last tokens."
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else value

    @field_validator("stop_token_ids", "bad_words", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return () if value is None else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, words in (("stop", self.stop), ("bad_words", self.bad_words)):
            if "" in words:
                raise ValueError(f"{name}: every string must have at least one character")
        if self.stop and not self.detokenize:
            raise ValueError("stop needs detokenize=True: stop strings are looked for in the text")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, not {self.min_tokens}"
            )
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be at least 1, or -1, not 0")
        return self

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a ValueError that names the first field with a token that the model lacks."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise ValueError(
                        f"{name}: {token_id} is no token of the model; they are 0 to "
                        f"{vocab_size - 1}"
                    )

    def for_prompt(self, place: int) -> Self:
        """The same for one of several prompts: equal prompts do not get equal answers."""
        if self.seed is None or place == 0:
            return self
        return self.model_copy(update={"seed": derived_seed(self.seed, prompt=place)})

    def spec(
        self,
        seed: int,
        eos_token_ids: tuple[int, ...] = (),
        bad_words: tuple[tuple[int, ...], ...] = (),
    ) -> SamplingSpec:
        """The part that the workers need.

        Args:
            seed: of this choice.
            eos_token_ids: the model's.
            bad_words: token ids of `bad_words`, in every form that is forbidden.

        Raises:
            ValueError: nothing could be sampled.
        """
        stops = () if self.ignore_eos else eos_token_ids
        blocked = dict.fromkeys((*stops, *self.stop_token_ids)) if self.min_tokens > 0 else {}
        if self.allowed_token_ids is not None and blocked.keys() >= {*self.allowed_token_ids}:
            raise ValueError(
                "allowed_token_ids has nothing but tokens that end the text, which "
                f"min_tokens={self.min_tokens} forbids; allow another one"
            )
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
            allowed_token_ids=np.array(self.allowed_token_ids or (), dtype=np.int32).tobytes(),
            bad_words=bad_words,
            logit_bias=tuple((self.logit_bias or {}).items()),
            num_logprobs=self.logprobs,
            grammar=self._grammar(eos_token_ids),
            num_prompt_logprobs=self.prompt_logprobs,
        )

    def _grammar(self, eos_token_ids: tuple[int, ...]) -> Grammar | None:
        if self.structured_outputs is None:
            return None
        return Grammar(self.structured_outputs.text, eos_token_ids, self.ignore_eos)


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
    if top_logprobs is not None and (
        not isinstance(top_logprobs, int)
        or isinstance(top_logprobs, bool)
        or not 0 <= top_logprobs <= MAX_LOGPROBS
    ):
        raise ValueError(
            f"top_logprobs: must be from 0 to {MAX_LOGPROBS}, not {shown(top_logprobs)}"
        )
    return SamplingParams(logprobs=top_logprobs)
