"""What an `input` is made of: messages, calls of functions and their outputs, thoughts.

Clients send the items of an earlier answer back, with fields that say nothing to the model (`id`,
`status`, `annotations`, ...). Those are taken and not read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from saqqara.cluster.openai.fields import only
from saqqara.cluster.sampling import FailFastList

MAX_ITEMS = 4096
MAX_PARTS = 1024
MAX_NAME_CHARS = 128
NO_ASYNC = "a call is answered before the model goes on"

T = TypeVar("T")
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


class Part(BaseModel):
    """What an object of a request has in common: unset fields may be null, unknown ones not be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """What is set; of unknown fields the first, because each would have an error."""
        if not isinstance(given, Mapping):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        is_set = {name: value for name, value in given.items() if value is not None}
        unknown = [name for name in is_set if name not in known]
        return {name: is_set[name] for name in is_set if name in known or name in unknown[:1]}


class InputText(Part):
    """A text of a message."""

    type: Literal["input_text"]
    text: str


class OutputText(Part):
    """A text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: FailFastList[dict[str, Any]] | None = None
    logprobs: FailFastList[dict[str, Any]] | None = None


class Refusal(Part):
    """What another model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What it said."""
        return self.refusal


class SummaryText(Part):
    """A summary of thoughts."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(Part):
    """Thoughts."""

    type: Literal["reasoning_text"]
    text: str


def of_type(*names: str, default: str | None = None) -> Discriminator:
    """Says which member of a union an object is, by its `type`; members are tagged `<TYPE>`."""

    def tag(given: Any) -> str | None:
        is_object = isinstance(given, Mapping)
        kind = given.get("type") if is_object else getattr(given, "type", None)
        if kind is None and (is_object or isinstance(given, Part)):
            kind = default
        return f"<{kind}>" if isinstance(kind, str) and kind in names else None

    known = " or ".join(repr(name) for name in names)
    return Discriminator(
        tag,
        custom_error_type="unsupported_type",
        custom_error_message=f"must be an object with the type {known}",
    )


def _is_text(given: Any) -> str:
    return "<text>" if isinstance(given, str) else "<list>"


TextPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[OutputText, Tag("<output_text>")]
    | Annotated[Refusal, Tag("<refusal>")],
    of_type("input_text", "output_text", "refusal"),
]
TextOrParts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[FailFastList[TextPart], Field(max_length=MAX_PARTS), Tag("<list>")],
    Discriminator(_is_text),
]


class Message(Part):
    """A message of anybody."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: TextOrParts
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class _OfFunction(Part):
    """What a call and its output may say at OpenAI's defaults alone."""

    caller: Annotated[Any, only({"type": "direct"}, why="the model alone calls")] = None
    namespace: Annotated[Any, only(why="functions have no namespaces here")] = None


class FunctionCall(_OfFunction):
    """A call that the model made; `arguments` are JSON."""

    type: Literal["function_call"]
    call_id: Annotated[Id, Field(min_length=1)]
    name: Name
    arguments: str
    id: Id | None = None
    status: Status | None = None
    is_async: Annotated[Any, only(False, why=NO_ASYNC)] = Field(None, alias="async")


class FunctionCallOutput(_OfFunction):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Annotated[Id, Field(min_length=1)]
    output: TextOrParts
    name: Name | None = None
    id: Id | None = None
    status: Status | None = None


class Reasoning(Part):
    """Thoughts of an earlier answer; `content` counts, or else `summary`."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Annotated[FailFastList[SummaryText], Field(max_length=MAX_PARTS)] = []
    content: Annotated[FailFastList[ReasoningText], Field(max_length=MAX_PARTS)] | None = None
    encrypted_content: Annotated[Any, only(why="thoughts are read in the clear")] = None
    status: Status | None = None

    @property
    def text(self) -> str:
        """The thoughts."""
        return "\n".join(part.text for part in (self.content or self.summary))


Item = Annotated[
    Annotated[Message, Tag("<message>")]
    | Annotated[FunctionCall, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[Reasoning, Tag("<reasoning>")],
    of_type(*("message", "function_call", "function_call_output", "reasoning"), default="message"),
]
Items = Annotated[FailFastList[Item], Field(min_length=1, max_length=MAX_ITEMS)]
TextOrItems = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Items, Tag("<list>")], Discriminator(_is_text)
]


def plain(content: str | list[InputText | OutputText | Refusal]) -> str:
    """The text of a content; parts are joined by line breaks, as those of chats are."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
