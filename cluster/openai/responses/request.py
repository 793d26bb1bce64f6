"""`POST /v1/responses`: the request, and the chat that it asks for.

A response is a chat with other words, so it is checked, sampled and constrained as one; errors
speak of the fields that the client has used.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.fields import SmallObject, only
from saqqara.cluster.openai.requests import ChatRequest, read_request
from saqqara.cluster.request import MAX_SALT_CHARS
from saqqara.cluster.sampling import FailFastList

from .conversation import messages_of, without_oldest
from .items import Item, Message, TextOrItems
from .options import Include, Reasoning, StreamOptions, TextSettings, Tool, ToolChoice

LOGPROBS: Include = "message.output_text.logprobs"
MAX_TOOLS = 128
MAX_METADATA = 16
_NO_STATE = "nothing is kept between requests here; send the items of earlier answers as input"
_Text = Annotated[str, Field(max_length=512)]


def _check_size(given: Any) -> Any:
    if isinstance(given, Mapping) and len(given) > MAX_METADATA:
        raise ValueError(f"should have at most {MAX_METADATA} items, not {len(given)}")
    return given


_Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], _Text],
    Field(json_schema_extra={"maxProperties": MAX_METADATA}),
    BeforeValidator(_check_size),  # before there is an error for each of them
]
# Fields that mean in a chat what they mean here.
_SAME = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos"),
    *("chat_template_kwargs", "retention", "budget", "priority", "timeout_seconds", "user"),
    "cache_salt",
    *(
        "safety_identifier",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "metadata",
    ),
    *("parallel_tool_calls", "include_reasoning", "structured_outputs"),
)


class ResponseRequest(BaseModel):
    """`POST /v1/responses`; what is not OpenAI's stands at the end."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    input: TextOrItems
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: Annotated[FailFastList[Include], Field(max_length=16)] | None = None
    tools: Annotated[FailFastList[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: _Metadata | None = None
    store: bool | None = Field(None, description="Taken, but no response is stored.")

    # For the client's own book-keeping.
    user: _Text | None = None
    safety_identifier: _Text | None = None
    service_tier: _Text | None = None
    prompt_cache_key: _Text | None = None
    prompt_cache_retention: _Text | None = None
    prompt_cache_options: SmallObject | None = None

    # What would need a memory, or parts that are not here.
    previous_response_id: Annotated[Any, only(why=_NO_STATE)] = None
    conversation: Annotated[Any, only(why=_NO_STATE)] = None
    background: Annotated[Any, only(False, why=_NO_STATE)] = None
    background_options: Annotated[Any, only(why=_NO_STATE)] = None
    access_programs: Annotated[Any, only(why="there are none here")] = None
    image: Annotated[Any, only(why="models here read and write text alone")] = None
    prompt: Annotated[Any, only(why="no templates of prompts are kept here")] = None
    context_management: Annotated[Any, only(why="see truncation")] = None
    max_tool_calls: Annotated[
        Any, only(why="it bounds built-in tools, of which there are none")
    ] = None
    moderation: Annotated[Any, only(why="there is no moderation here")] = None

    # vLLM's, and our own.
    seed: int | None = None
    stop: str | FailFastList[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    include_reasoning: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    retention: str | dict[str, Any] | None = None
    budget: int | str | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.wants_logprobs:
            raise ValueError(f'top_logprobs needs include=["{LOGPROBS}"]')
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's tokens come with their log-probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def items(self) -> Sequence[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return self.input

    def chat(self, num_dropped: int = 0) -> "ResponseChat":
        """The chat that is asked for, without so many of its oldest items.

        Raises:
            ApiError: a field is wrong; names it.
        """
        items = without_oldest(self.items, num_dropped)
        fields = {name: getattr(self, name) for name in _SAME if name in ChatRequest.model_fields}
        fields["messages"] = messages_of(self.instructions, items)
        fields["max_completion_tokens"] = self.max_output_tokens
        fields["logprobs"] = self.wants_logprobs or None
        fields["top_logprobs"] = self.top_logprobs
        fields |= self.tool_fields()
        if self.text is not None:
            fields |= self.text.chat_fields()
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return read_request(ResponseChat, given)
        except ApiError as error:
            raise _in_our_words(error) from None

    def tool_fields(self) -> Mapping[str, Any]:
        """Tools and their choice; of allowed ones, the others are not offered."""
        tools, choice = self.tools or [], self.tool_choice
        if choice is None or isinstance(choice, str):
            chosen: Any = choice
        elif choice.type == "function":
            chosen = {"type": "function", "function": {"name": choice.name}}
        else:
            allowed = {tool.name for tool in choice.tools}
            unknown = sorted(allowed - {tool.name for tool in tools})
            if unknown:
                message = f"tool_choice: {unknown[0]!r:.200} is none of the tools"
                raise ApiError(400, message, "tool_choice", "invalid_value")
            tools = [tool for tool in tools if tool.name in allowed]
            chosen = choice.mode
        return {"tools": [tool.chat_tool() for tool in tools] or None, "tool_choice": chosen}


# What the fields of a chat are called here.
RENAMED = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
}


class ResponseChat(ChatRequest):
    """A chat that a response asks for."""

    @property
    def prompt_field(self) -> str:
        """See `GenerationRequest`."""
        return "input"

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """See `GenerationRequest`."""
        return "max_output_tokens", self.max_completion_tokens


def _in_our_words(error: ApiError) -> ApiError:
    """An error of a chat, of the fields that the client has used."""
    error = error.renamed(RENAMED)
    message = str(error).replace("text.format.json_schema", "text.format")
    param = (error.param or "").replace("text.format.json_schema", "text.format") or None
    return ApiError(error.status, message, param, error.code, error.headers)


def read_response(fields: Mapping[str, Any]) -> ResponseRequest:
    """A request from its fields.

    Raises:
        ApiError: a field is unknown, missing or wrong; names it, however deep it lies.
    """
    known = ResponseRequest.model_fields
    if len(fields) > len(known):  # pydantic would write an error for each of them
        raise ApiError.unknown(next(name for name in fields if name not in known), known)
    try:
        return ResponseRequest.model_validate(fields)
    except ValidationError as error:
        raise ApiError.of(error, known=known, given=fields) from None
