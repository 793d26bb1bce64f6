"""What is new in an answer, and the sink into which the parsers of tool calls write."""

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from saqqara.cluster.chat import TOOL_NAME

Json = dict[str, Any]
SPACE = " \t\r\n"
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of one tool call; the first one of a call has its id and name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def json(self) -> Json:
        """As it stands in a chunk of a stream."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What is new in an answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


@dataclass(slots=True)
class ToolCall:
    """A tool call as it stands in a whole answer; `arguments` are JSON as the model wrote it."""

    id: str
    name: str
    arguments: str

    def json(self) -> Json:
        """As it stands in a message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `content` is None where there is none beside calls or thoughts."""

    reasoning: str | None
    content: str | None
    calls: tuple[ToolCall, ...]


def is_tool_name(name: str) -> bool:
    """Whether a tool may be called so."""
    return TOOL_NAME.fullmatch(name) is not None


def openai_call_id() -> str:
    """An id such as OpenAI's."""
    return f"call_{secrets.token_hex(12)}"


def mistral_call_id() -> str:
    """Nine letters and digits: Mistral's templates refuse any other id."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(slots=True)
class Sink:
    """Takes what a parser has found, in order, and gives it out as deltas.

    Space around calls belongs to their format: it is content only between two pieces of content.

    Args:
        new_id: makes the ids of calls.
        max_calls: later ones are left out; None for no bound.

    Attributes:
        num_calls: calls so far.
    """

    new_id: Callable[[], str] = openai_call_id
    max_calls: int | None = None
    num_calls: int = 0
    _content: list[str] = field(default_factory=list)
    _space: list[str] = field(default_factory=list)
    _follows_call: bool = False
    _has_content: bool = False
    _heads: dict[int, tuple[str, str]] = field(default_factory=dict)
    _arguments: dict[int, list[str]] = field(default_factory=dict)

    def content(self, text: str) -> None:
        """Text that belongs to no call."""
        body = text.rstrip(SPACE)
        if not body:
            self._space.append(text)
            return
        if self._follows_call and not self._has_content:
            self._content.append(body.lstrip(SPACE))
        else:
            self._content += [*self._space, body]
        self._follows_call = False
        self._has_content = True
        self._space = [text[len(body) :]]

    def begin_call(self, name: str) -> None:
        """A call of the tool of that name; its arguments follow."""
        self._space.clear()
        self._follows_call = True
        self.num_calls += 1
        if self._is_wanted:
            self._heads[self.num_calls - 1] = (self.new_id(), name)

    def arguments(self, text: str) -> None:
        """What comes next of the latest call's arguments."""
        if text and self._is_wanted:
            self._arguments.setdefault(self.num_calls - 1, []).append(text)

    def end(self) -> None:
        """No more will come, so space at the end is content; after a call it is not."""
        if not self._follows_call:
            self._content += self._space
        self._space.clear()

    def take(self) -> AnswerDelta:
        """What came since the last time."""
        indices = sorted({*self._heads, *self._arguments})
        calls = tuple(
            CallDelta(
                index,
                id=self._heads[index][0] if index in self._heads else None,
                name=self._heads[index][1] if index in self._heads else None,
                arguments="".join(self._arguments.get(index, ())),
            )
            for index in indices
        )
        delta = AnswerDelta(content="".join(self._content), calls=calls)
        self._content.clear()
        self._heads.clear()
        self._arguments.clear()
        return delta

    @property
    def _is_wanted(self) -> bool:
        return self.max_calls is None or self.num_calls <= self.max_calls


Schemas = Mapping[str, Mapping[str, Any]]  # of the tools that are offered: their parameters
