"""What all requests for text have in common.

Names and meaning are OpenAI's; beyond those there are vLLM's sampling extensions and our own
`retention` and `budget`. Fields that are neither are errors, so that nothing is dropped silently.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.fields import IdleFields, StreamOptions
from saqqara.cluster.openai.shown import Shown
from saqqara.cluster.request import CONVERSATION_ID, MAX_SALT_CHARS
from saqqara.cluster.sampling import FEW_ENTRIES, FailFastList, SamplingParams
from saqqara.compression.profiles.head_profile import AUTO
from saqqara.compression.retention import Retention
from saqqara.configs.schema import ServerLimits
from saqqara.configs.yaml_files import CONFIG_DIR

from .reading import check_limit
from .structure import StructureFields

_MAX_ID_DIGITS = 10

# Passed through to the sampler under the same name where the client sets them.
_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens"),
    *("skip_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens"),
    *("truncation_side", "allowed_token_ids", "bad_words"),
)


class GenerationRequest(StructureFields, IdleFields):
    """What completions and chats have in common; None stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | FailFastList[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], FEW_ENTRIES] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: FailFastList[int] | None = None
    allowed_token_ids: FailFastList[int] | None = None
    bad_words: FailFastList[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    retention: str | dict[str, Any] | None = None
    budget: int | str | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] | None = None
    conversation_id: Annotated[str, Field(pattern=CONVERSATION_ID)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.include_usage and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.continuous_usage and not self.include_usage:
            raise ValueError(
                "stream_options: continuous_usage_stats needs include_usage=true, and stream=true"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed; leave stream out")
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise ValueError(f"best_of must be at least n={self.n or 1}, not {self.best_of}")
            if self.stream and self.best_of > (self.n or 1):
                raise ValueError("best_of cannot be streamed: the best is known at the end")
        return self

    @model_validator(mode="after")
    def _check_turn(self) -> Self:
        if self.conversation_id is None:
            return self
        for field in ("n", "best_of"):
            if (getattr(self, field) or 1) > 1:
                raise ValueError(
                    f"{field}: a turn of a conversation has one choice: the next goes on from it; "
                    "leave out conversation_id"
                )
        if self.num_prompt_logprobs is not None:
            raise ValueError(
                f"{self.names.get('prompt_logprobs', 'prompt_logprobs')}: a turn of a conversation "
                "does not compute its whole prompt; leave out conversation_id"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def shown(self) -> Shown:
        """What the answer shows of what is computed."""
        return Shown(
            num_choices=self.n or 1,
            num_logprobs=self.num_logprobs,
            num_prompt_logprobs=self.prompt_logprobs,
            token_ids=bool(self.return_token_ids),
            prompt_token_ids=bool(self.return_token_ids),
            tokens_as_ids=bool(self.return_tokens_as_token_ids),
        )

    def check_limits(self, limits: ServerLimits) -> None:
        """Raise an `ApiError` if the request asks for more than this server gives."""
        check_limit("n", self.n or 1, limits.max_n)
        check_limit("best_of", self.best_of or 1, limits.max_n)
        check_limit("prompt_logprobs", self.prompt_logprobs or 0, limits.max_logprobs)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        check_limit("stop", len(stops), limits.max_stop, " strings")
        check_limit(self.logprobs_field, self.num_logprobs or 0, limits.max_logprobs)
        check_limit("timeout_seconds", self.timeout_seconds or 0, limits.max_timeout_seconds)
        if limits.min_priority is not None and (self.priority or 0) < limits.min_priority:
            message = f"priority must be at least {limits.min_priority} here, not {self.priority}"
            raise ApiError(400, message, "priority", "limit_exceeded")

    def check_profile(self) -> None:
        """Raise an `ApiError` if `retention` names a file: clients read none of the server's."""
        profile = self.retention.get("profile") if isinstance(self.retention, dict) else None
        if profile is None or isinstance(profile, dict):
            return
        named = [AUTO, *sorted(file.stem for file in (CONFIG_DIR / "profiles").glob("*.json"))]
        if not isinstance(profile, str) or profile not in named:
            raise ApiError(
                400,
                f"retention: profile must be one of {named} or the measured scores",
                "retention",
                "invalid_value",
            )

    @property
    def prompt_field(self) -> str:
        """The field that the prompt stands in."""
        return "prompt"

    @property
    def names(self) -> Mapping[str, str]:
        """What the client calls the fields that the engine's messages name."""
        return {
            "prompt": self.prompt_field,
            "max_tokens": self.max_new_tokens[0],
            "logprobs": self.logprobs_field,
            "structured_outputs": self.structure_field,
            **({} if self.best_of is None else {"n": "best_of"}),
        }

    @property
    def logprobs_field(self) -> str:
        """The field that says how many log-probabilities are wanted."""
        return "logprobs"

    @property
    def num_logprobs(self) -> int | None:
        """Best tokens wanted beside the sampled one; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Best tokens wanted beside each of the prompt's; None for no log-probabilities of it."""
        return self.prompt_logprobs

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def default_max_tokens(self) -> int | None:
        """Tokens of an answer at most where nobody says; None: what the context leaves."""
        return None

    def sampling_params(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """How the request is sampled.

        Args:
            defaults: values of `SamplingParams` for what the request does not say.

        Raises:
            ApiError: a value is out of range; names its field.
        """
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given["max_tokens"] = self.max_new_tokens[1]
        given["logprobs"] = self.num_logprobs
        given["structured_outputs"] = self.structure
        given["prompt_logprobs"] = self.num_prompt_logprobs
        if self.best_of is not None and self.best_of > (self.n or 1):  # chosen by their likelihood
            given |= {"n": self.best_of, "logprobs": self.num_logprobs or 0}
        given["logit_bias"] = _token_ids(self.logit_bias or {}) or None
        given = {name: value for name, value in given.items() if value is not None}
        usual = {"max_tokens": self.default_max_tokens, **(defaults or {})}
        try:
            return SamplingParams(**{**usual, **given})
        except ValidationError as error:
            raise ApiError.of(error).renamed(self.names) from None

    def read_retention(self, default: Retention) -> Retention:
        """Which keys and values are kept; `default` is the engine's.

        Raises:
            ApiError: `retention` or `budget` is wrong.
        """
        asks_for_none = self.retention is None or self.retention == {}
        if asks_for_none and self.budget is None:
            return default
        spec = default if asks_for_none else self.retention
        try:
            return Retention.parse(spec, self.budget)
        except ValueError as error:
            is_budget = self.budget is not None and str(error).startswith("budget")
            field = "budget" if is_budget else "retention"
            message = str(error) if is_budget else f"retention: {error}"
            raise ApiError(400, message, field, "invalid_value") from None


def _token_ids(bias: Mapping[str, float]) -> dict[int, float]:
    ids: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or len(key) > _MAX_ID_DIGITS:
            message = f"logit_bias: {key!r:.80} is no token id"
            raise ApiError(400, message, "logit_bias", "invalid_value")
        if int(key) in ids:  # such as "7" and "07"
            message = f"logit_bias: {key!r} is a token id that is there already"
            raise ApiError(400, message, "logit_bias", "invalid_value")
        ids[int(key)] = value
    return ids
