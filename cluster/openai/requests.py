"""Requests as clients write them, over HTTP and in the lines of a batch job alike.

Names and meaning are OpenAI's; beyond those there are vLLM's sampling extensions and our own
`retention` and `budget`. Fields that are neither are errors, so that nothing is dropped silently.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saqqara.cluster.chat import ChatOptions
from saqqara.cluster.sampling import FEW_ENTRIES, FailFastList, SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import DoubledKeyError, parse_json
from saqqara.configs.schema import ServerLimits
from saqqara.configs.yaml_files import CONFIG_DIR

from .errors import ApiError, a_type
from .fields import IdleChatFields, IdleCompletionFields, IdleFields, StreamOptions

Body = TypeVar("Body", bound=BaseModel)

_MAX_ID_DIGITS = 10

# Passed through to the sampler under the same name where the client sets them.
_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens"),
    *("skip_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens"),
    *("allowed_token_ids", "bad_words"),
)


def read_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: it is none, or has a key twice; `what` says what was read.
    """
    try:
        data = parse_json(text)
    except DoubledKeyError as error:
        raise ApiError(400, str(error), error.key, "invalid_value") from None
    except ValueError as error:
        half = (
            "; half of a surrogate pair (\\udXXX) is no text" if "hex escape" in str(error) else ""
        )
        message = f"{what} is not JSON: {error}{half}"
        raise ApiError(400, message, None, "invalid_value") from None
    if not isinstance(data, dict):
        message = f"{what} must be a JSON object, not {a_type(data)}"
        raise ApiError(400, message, None, "invalid_value")
    return data


def read_request(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    """A request from its fields.

    Raises:
        ApiError: a field is unknown, missing or wrong; names it.
    """
    if len(fields) > len(kind.model_fields):  # pydantic would write an error for each of them
        unknown = next(name for name in fields if name not in kind.model_fields)
        raise ApiError.unknown(unknown, kind.model_fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ApiError.of(error, known=kind.model_fields) from None


def check_model(model: str | None, names: Collection[str]) -> None:
    """Raise an `ApiError` (404) unless a request's model is the one that is here."""
    if model is not None and model not in names:
        known = " or ".join(repr(name) for name in names)
        raise ApiError(
            404,
            f"model {model!r:.200} does not exist here; there is {known}",
            "model",
            "model_not_found",
        )


class GenerationRequest(IdleFields):
    """What completions and chats have in common; None stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
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
    retention: str | dict[str, Any] | None = None
    budget: int | str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.include_usage and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check_limits(self, limits: ServerLimits) -> None:
        """Raise an `ApiError` if the request asks for more than this server gives."""
        _check_limit("n", self.n or 1, limits.max_n)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        _check_limit("stop", len(stops), limits.max_stop, " strings")
        _check_limit(self.logprobs_field, self.num_logprobs or 0, limits.max_logprobs)
        _check_limit("timeout_seconds", self.timeout_seconds or 0, limits.max_timeout_seconds)

    def check_profile(self) -> None:
        """Raise an `ApiError` if `retention` names a file: clients read none of the server's."""
        profile = self.retention.get("profile") if isinstance(self.retention, dict) else None
        if profile is None or isinstance(profile, dict):
            return
        shipped = {file.stem for file in (CONFIG_DIR / "profiles").glob("*.json")}
        if not isinstance(profile, str) or profile not in shipped:
            raise ApiError(
                400,
                f"retention: profile must be one of {sorted(shipped)} or the measured scores",
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


class CompletionRequest(GenerationRequest, IdleCompletionFields):
    """`POST /v1/completions`."""

    prompt: str | FailFastList[int] | FailFastList[str] | FailFastList[FailFastList[int]]
    logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return self.logprobs

    @property
    def default_max_tokens(self) -> int | None:
        """See `GenerationRequest`; this is OpenAI's."""
        return 16

    def prompts(self, max_prompts: int) -> list[str | list[int]]:
        """The prompts one by one.

        Raises:
            ApiError: there are none or too many.
        """
        if not self.prompt:
            message = "prompt is empty; it needs a text or token ids"
            raise ApiError(400, message, "prompt", "invalid_value")
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[Any] = list(self.prompt)
        if isinstance(prompts[0], int):
            return [prompts]
        _check_limit("prompt", len(prompts), max_prompts, " prompts")
        return prompts


class ChatFields(BaseModel):
    """How a conversation is written; see `ChatOptions`."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_options(self) -> ChatOptions:
        """The options.

        Raises:
            ApiError: they do not go together; names the field.
        """
        try:
            return ChatOptions(
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=bool(self.continue_final_message),
                template_args=self.chat_template_kwargs or {},
            )
        except ValueError as error:
            raise ApiError.of(error) from None


class ChatRequest(GenerationRequest, ChatFields, IdleChatFields):
    """`POST /v1/chat/completions`. Messages are checked by the tokenizer, which reads them."""

    messages: FailFastList[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        bounds = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(bounds) > 1:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        return self

    @property
    def prompt_field(self) -> str:
        """See `GenerationRequest`."""
        return "messages"

    @property
    def logprobs_field(self) -> str:
        """See `GenerationRequest`."""
        return "top_logprobs"

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """See `GenerationRequest`."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class TokenizeRequest(ChatFields):
    """`POST /tokenize`: a text, or a chat as its template writes it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: FailFastList[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        return self


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: FailFastList[int]


def _check_limit(name: str, value: float, limit: float, what: str = "") -> None:
    if value > limit:
        message = f"{name} may be at most {limit:.10g}{what} here, not {value:.10g}"
        raise ApiError(400, message, name, "limit_exceeded")


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
