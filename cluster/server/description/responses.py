"""Replies of `/v1/responses`, and the events of their streams."""

from typing import Annotated, Any, Literal

from pydantic import Field

from saqqara.cluster.openai.responses.options import AllowedTools, NamedFunction

from .base import Count, KvCache, Reply, TokenLogprob, UnixTime

Status = Literal["in_progress", "completed", "incomplete"]


class AnswerText(Reply):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[TokenLogprob]


class OutputMessage(Reply):
    """A message of the assistant."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: Annotated[list[AnswerText], Field(max_length=1)]


class AnswerThoughts(Reply):
    """Thoughts."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Reply):
    """What the model thought."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: Annotated[list[Any], Field(max_length=0)]
    content: Annotated[list[AnswerThoughts], Field(max_length=1)]


class FunctionCallItem(Reply):
    """A call of a function; its output is sent back with `call_id`."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class ResponseTool(Reply):
    """A tool as it was given."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool


class ResponseText(Reply):
    """What the text is to be."""

    format: Annotated[dict[str, Any], Field(description="As given, or free text.")]
    verbosity: Literal["medium"]


class ResponseReasoning(Reply):
    """How much the model was to think."""

    effort: str | None
    summary: None


class ResponseError(Reply):
    """Why a response has failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(Reply):
    """Why a response ends before its end."""

    reason: Literal["max_output_tokens"]


class InputDetails(Reply):
    """Of the input's tokens."""

    cached_tokens: Count
    cache_write_tokens: Count


class OutputDetails(Reply):
    """Of the answer's tokens."""

    reasoning_tokens: Count


class ResponseUsage(Reply):
    """Tokens of the input and of the answer."""

    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: OutputDetails
    total_tokens: Count
    kv_cache: KvCache | None = None


class ResponseObject(Reply):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: UnixTime
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Annotated[Literal[False], Field(description="No response is stored.")]
    temperature: float
    text: ResponseText
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools
    tools: list[ResponseTool]
    top_logprobs: Count
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class StateEvent(Reply):
    """The response as it begins, and as it ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: Count
    response: ResponseObject


class ItemEvent(Reply):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: Count
    output_index: Count
    item: OutputItem


class _InItem(Reply):
    sequence_number: Count
    item_id: str
    output_index: Count


class PartEvent(_InItem):
    """The part of an item begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: AnswerText | AnswerThoughts


class TextDeltaEvent(_InItem):
    """More of a text."""

    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(_InItem):
    """A whole text."""

    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDeltaEvent(_InItem):
    """More thoughts."""

    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]
    delta: str


class ReasoningDoneEvent(_InItem):
    """All thoughts of an item."""

    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class ArgumentsDeltaEvent(_InItem):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_InItem):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class FailureEvent(Reply):
    """The response ends here; `response.failed` follows."""

    type: Literal["error"]
    sequence_number: Count
    code: str | None
    message: str
    param: str | None


ResponseEvent = (
    StateEvent
    | ItemEvent
    | PartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | FailureEvent
)
