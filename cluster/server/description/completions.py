"""Replies of `/v1/chat/completions` and `/v1/completions`."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Count, KvCache, Reply, TokenLogprob, UnixTime

FinishReason = Literal["stop", "length", "tool_calls"]
StopReason = Annotated[
    int | str | None, Field(description="The stop string or token id that ended it.")
]


TokenIds = list[Count]


class PromptLogprob(Reply):
    """A token in a place of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class PromptTokensDetails(Reply):
    """Tokens of the prompts that were not computed: earlier requests have left them."""

    cached_tokens: Count


class Usage(Reply):
    """Tokens of the prompts, each once, and of all their choices."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    kv_cache: KvCache | None = None


class EndedConversation(Reply):
    """A conversation of which nothing is kept any more."""

    id: str
    object: Literal["conversation.deleted"]
    deleted: Literal[True]


class ChatLogprobs(Reply):
    """One entry per token."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Reply):
    """What is called, with arguments in JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Reply):
    """A tool that the model calls."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Reply):
    """The answer; thoughts are there under both of their names."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(min_length=1)] = None


class ChatChoice(Reply):
    """One answer."""

    index: Count
    message: ChatMessage
    token_ids: TokenIds | None = None
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason


class ChatCompletion(Reply):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: UnixTime
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: Usage
    prompt_token_ids: TokenIds | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CalledFunctionDelta(Reply):
    """What is new of a call's arguments; its first piece has the name."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Reply):
    """What is new of a call; its first piece has the id."""

    index: Count
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunctionDelta


class ChatDelta(Reply):
    """What is new of a message; its first one has the role."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Reply):
    """What is new of one answer."""

    index: Count
    delta: ChatDelta
    token_ids: TokenIds | None = None
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason


class ChatCompletionChunk(Reply):
    """An event of a chat's stream; the one with the usage has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: UnixTime
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: TokenIds | None = None


class CompletionLogprobs(Reply):
    """Parallel lists, one item per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class CompletionChoice(Reply):
    """One continuation."""

    index: Count
    text: str
    token_ids: TokenIds | None = None
    prompt_token_ids: TokenIds | None = None
    prompt_logprobs: PromptLogprobs | None = None
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason


class Completion(Reply):
    """The continuations of prompts."""

    id: str
    object: Literal["text_completion"]
    created: UnixTime
    model: str
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]
    usage: Usage


class CompletionChunkChoice(CompletionChoice):
    """What is new of one continuation."""

    finish_reason: FinishReason | None  # type: ignore[assignment]


class CompletionChunk(Reply):
    """An event of a stream; the one with the usage has no choices."""

    id: str
    object: Literal["text_completion"]
    created: UnixTime
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
