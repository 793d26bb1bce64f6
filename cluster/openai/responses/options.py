"""Tools, text formats and thoughts, as requests for responses write them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from saqqara.cluster.openai.fields import only
from saqqara.cluster.sampling import FailFastList

from .items import MAX_NAME_CHARS, NO_ASYNC, Name, Part, of_type

Json = dict[str, Any]
Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
_SUMMARY = "thoughts come whole, as reasoning_text"


class FunctionTool(Part):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    allowed_callers: Annotated[Any, only(["direct"], why="the model alone calls")] = None
    defer_loading: Annotated[Any, only(False, why="the prompt has all tools")] = None
    output_schema: Annotated[Any, only(why="say it in the description")] = None
    is_async: Annotated[Any, only(False, why=NO_ASYNC)] = Field(None, alias="async")

    @property
    def shown(self) -> Json:
        """What the model is told of it."""
        return self.model_dump(include={"name", "description", "parameters", "strict"})

    def chat_tool(self) -> Json:
        """The same in the words of chats."""
        fields = {name: value for name, value in self.shown.items() if value is not None}
        return {"type": "function", "function": fields}


Tool = Annotated[Annotated[FunctionTool, Tag("<function>")], of_type("function")]


class NamedFunction(Part):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class AllowedTools(Part):
    """The functions that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[FailFastList[NamedFunction], Field(min_length=1, max_length=128)]


def _choice(given: Any) -> str:
    if not isinstance(given, Mapping):
        return "<word>"
    return "<allowed_tools>" if given.get("type") == "allowed_tools" else "<function>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedFunction, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(_choice),
]


class FreeFormat(Part):
    """Text that is free."""

    type: Literal["text"]


class ObjectFormat(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Part):
    """JSON of this schema."""

    model_config = ConfigDict(extra="forbid", strict=True, serialize_by_alias=True)

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    json_schema: Json = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


TextFormat = Annotated[
    Annotated[FreeFormat, Tag("<text>")]
    | Annotated[ObjectFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")],
    of_type("text", "json_object", "json_schema"),
]


class TextSettings(Part):
    """What the text must be."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, only("medium", why="say it in the instructions")] = None

    def chat_fields(self) -> Json:
        """The same in the words of chats."""
        if self.format is None or self.format.type == "text":
            return {}
        if not isinstance(self.format, SchemaFormat):
            return {"response_format": {"type": self.format.type}}
        schema = self.format.model_dump(exclude={"type"}, exclude_none=True)
        return {"response_format": {"type": "json_schema", "json_schema": schema}}


class Reasoning(Part):
    """How much the model thinks."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Annotated[Any, only("auto", why=_SUMMARY)] = None
    generate_summary: Annotated[Any, only("auto", why=_SUMMARY)] = None
    context: Annotated[Any, only("auto", why="the chat template decides")] = None
    mode: Annotated[Any, only("standard", why="there is one mode")] = None


class StreamOptions(Part):
    """Settings of a stream."""

    include_obfuscation: Annotated[Any, only(False, why="streams are not padded here")] = None
