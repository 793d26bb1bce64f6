"""`POST /v1/chat/completions`, and how a conversation is written."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from saqqara.cluster.chat import MAX_TOOLS, ChatOptions
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.fields import IdleChatFields, SmallObject
from saqqara.cluster.openai.tools.choice import NO_TOOLS, ToolUse, read_tool_use
from saqqara.cluster.sampling import FailFastList

from .generation import GenerationRequest

# What the models do not say of these fields, because `check_tools` and `read_tool_use` check them.
_TOOLS: dict[str, Any] = {
    "description": 'Functions: {"type": "function", "function": {"name", "parameters", ...}}.',
    "maxItems": MAX_TOOLS,
}
_TOOL_CHOICE: dict[str, Any] = {
    "description": 'none, auto, required, or {"type": "function", "function": {"name": ...}}.'
}


class ChatFields(BaseModel):
    """How a conversation is written; see `ChatOptions`."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: SmallObject | None = None
    chat_template: str | None = None
    add_special_tokens: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tools: Annotated[list[Any] | None, Field(json_schema_extra=_TOOLS)] = None

    @property
    def offered_tools(self) -> Sequence[Mapping[str, Any]]:
        """The tools that the model is told of."""
        return self.tools or ()

    def chat_options(self, *, trusts_templates: bool = False) -> ChatOptions:
        """The options.

        Args:
            trusts_templates: take a template from the client: it is a program.

        Raises:
            ApiError: they do not go together; names the field.
        """
        if self.chat_template and not trusts_templates:
            message = (
                "chat_template: templates are taken from clients only where the server was started "
                "with --trust-request-chat-template; leave it out"
            )
            raise ApiError(400, message, "chat_template", "invalid_value")
        try:
            return ChatOptions(
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=bool(self.continue_final_message),
                template_args=self.chat_template_kwargs or {},
                chat_template=self.chat_template or None,
                add_special_tokens=bool(self.add_special_tokens),
                tools=self.offered_tools,
                reasoning_effort=self.reasoning_effort,
            )
        except ValueError as error:
            raise ApiError.of(error) from None


class ChatRequest(GenerationRequest, ChatFields, IdleChatFields):
    """`POST /v1/chat/completions`. Messages are checked by the tokenizer, which reads them."""

    messages: FailFastList[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Annotated[Any, Field(json_schema_extra=_TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    _tool_use: ToolUse = PrivateAttr(NO_TOOLS)

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        self._tool_use = read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        if self.tool_use.is_forced and super().structure is not None:
            raise ValueError(
                f"tool_choice: a call that must be made is a form of its own; leave out "
                f"{super().structure_field}"
            )
        return self

    @property
    def structure(self) -> dict[str, Any] | None:
        """See `StructureFields`; a call that must be made is a form, too."""
        schema = self.tool_use.answer_schema()
        return super().structure if schema is None else {"json": schema}

    @property
    def structure_field(self) -> str:
        """See `StructureFields`."""
        return "tools" if self.tool_use.is_forced else super().structure_field

    @property
    def tool_use(self) -> ToolUse:
        """How tools are used."""
        return self._tool_use

    @property
    def offered_tools(self) -> Sequence[Mapping[str, Any]]:
        """See `ChatFields`; with `tool_choice` `none` there are none."""
        return self.tool_use.tools

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
