"""What a chat's answer says: its growing text becomes thoughts, content and tool calls.

The one reader of whole answers, streams, batch lines and the items of responses alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from saqqara.cluster.openai.formats.call_parser import CallParser
from saqqara.cluster.openai.formats.deltas import (
    Answer,
    AnswerDelta,
    CallDelta,
    Schemas,
    Sink,
    ToolCall,
)

from .thoughts import ThoughtSplitter

__all__ = ["PLAIN", "Answer", "AnswerDelta", "AnswerFormat", "AnswerReader", "CallDelta"]


class ParserType(Protocol):
    """The class of a parser."""

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that its format is made of."""
        ...

    @property
    def new_id(self) -> Callable[[], str]:
        """Makes the ids of calls."""
        ...

    def __call__(self, sink: Sink, tools: Schemas) -> CallParser:
        """A parser of one answer."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers to one chat are to be read; plain text by default.

    Args:
        parser: reads tool calls; None: nothing is a call.
        tools: the parameters of the tools that are offered, by name.
        max_calls: calls of an answer; later ones are left out.
        thinks: there may be thoughts before the answer.
        is_open: the prompt has begun them.
        shows_thoughts: thoughts are reported; else they are read and left out.
        is_named: the client has named the function to call, so that the answer ends with `stop`.
    """

    parser: ParserType | None = None
    tools: Schemas = field(default_factory=dict)
    max_calls: int | None = None
    thinks: bool = False
    is_open: bool = False
    shows_thoughts: bool = True
    is_named: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether an answer's text is its content, as it is."""
        return self.parser is None and not self.thinks

    def finish_reason(self, reason: str | None, *, has_calls: bool) -> str | None:
        """Why an answer has ended, for the client; `reason` is the engine's.

        One that ran into its bound says so: its last call's arguments may be cut.
        """
        return "tool_calls" if has_calls and reason == "stop" and not self.is_named else reason

    def read(self, text: str) -> Answer:
        """A whole answer."""
        reader = AnswerReader(self)
        delta = reader.read(text, is_finished=True)
        calls = tuple(ToolCall(c.id or "", c.name or "", c.arguments) for c in delta.calls)
        has_more = bool(calls) or reader.has_thoughts
        content = None if has_more and not delta.content else delta.content
        return Answer(delta.reasoning if reader.has_thoughts else None, content, calls)


PLAIN = AnswerFormat()


class AnswerReader:
    """Reads one answer while it grows.

    What it has given out stays: no later text takes anything back.

    Attributes:
        has_calls: whether there are tool calls.
        has_thoughts: whether thoughts have been reported.
    """

    def __init__(self, answer_format: AnswerFormat) -> None:
        self.format = answer_format
        self.has_thoughts = False
        self._num_chars = 0
        self._thoughts = ThoughtSplitter(is_open=answer_format.is_open)
        self._sink = Sink()
        self._parser: CallParser | None = None
        if answer_format.parser is not None:
            self._sink = Sink(answer_format.parser.new_id, answer_format.max_calls)
            self._parser = answer_format.parser(self._sink, answer_format.tools)

    @property
    def has_calls(self) -> bool:
        """Whether there are tool calls."""
        return self._sink.num_calls > 0

    def read(self, text: str, *, is_finished: bool) -> AnswerDelta:
        """What is new in an answer.

        Args:
            text: all of the answer's text so far.
            is_finished: no more will come.
        """
        piece = text[self._num_chars :]
        self._num_chars = len(text)
        reasoning = ""
        if self.format.thinks:
            reasoning, piece = self._thoughts.feed(piece, is_end=is_finished)
        if not self.format.shows_thoughts:
            reasoning = ""
        self.has_thoughts = self.has_thoughts or bool(reasoning)
        if self._parser is None:
            return AnswerDelta(reasoning, piece)
        self._parser.feed(piece)
        if is_finished:
            self._parser.finish()
        found = self._sink.take()
        return AnswerDelta(reasoning, found.content, found.calls)
