"""What the parsers of tool calls share: a machine that reads text in pieces of any size.

A parser is a handful of states. Each takes characters of the text from a place on and returns the
place that it has reached; what it leaves (at most a marker that has only begun) is there again with
the next piece. So the work grows with the text alone, and how the text is cut changes nothing.

A call is announced when its name is known and its arguments have begun. What turns out to be no
call before that is content; after it the call stays as it is, and content goes on from there.
"""

import json
import re
from collections.abc import Callable
from typing import ClassVar

from .deltas import SPACE, Schemas, Sink, is_tool_name, openai_call_id
from .json_text import JsonText

Step = Callable[[str, int], int]


class CallParser:
    """The base of the parsers.

    Args:
        sink: takes what is found.
        tools: the parameters (JSON schemas) of the tools that are offered, by name.

    Attributes:
        markers: the texts that the format is made of; where the tokenizer has them as special
            tokens, these must be visible in the text.
        new_id: makes the ids of calls.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    new_id: ClassVar[Callable[[], str]] = staticmethod(openai_call_id)

    def __init__(self, sink: Sink, tools: Schemas) -> None:
        self.sink = sink
        self.tools = tools
        self.has_ended = False
        self._state: Step = self.start
        self._text = ""
        self._held: list[str] = []  # what is content unless it becomes a call

    def start(self, text: str, at: int) -> int:
        """The first state."""
        raise NotImplementedError

    def unfinished(self) -> None:
        """The text has ended in the state it is in; by default, what is held is content."""
        self.release()

    def feed(self, text: str) -> None:
        """Take the next piece."""
        self._text += text
        self._run()

    def finish(self) -> None:
        """The text has ended."""
        self.has_ended = True
        self._run()
        self.unfinished()
        self.sink.content(self._text)
        self._text = ""
        self.sink.end()

    def go(self, state: Step) -> None:
        """Go on in another state."""
        self._state = state

    def hold(self, text: str) -> None:
        """Text that is content unless a call is announced."""
        self._held.append(text)

    def announce(self, name: str) -> None:
        """What is held has become a call."""
        self._held.clear()
        self.sink.begin_call(name)

    def release(self) -> None:
        """What is held has become no call."""
        self.sink.content("".join(self._held))
        self._held.clear()

    def plain(self, text: str, at: int) -> int:
        """A state: all that follows is content."""
        self.sink.content(text[at:])
        return len(text)

    def skip_space(self, text: str, at: int) -> int:
        """The place of the next character that is no space."""
        while at < len(text) and text[at] in SPACE:
            at += 1
        return at

    def may_begin(self, text: str, at: int, marker: str) -> bool:
        """Whether the rest of the text is the beginning of a marker, whose end may come."""
        rest = len(text) - at
        return not self.has_ended and rest < len(marker) and marker.startswith(text[at:])

    def find(self, text: str, at: int, markers: "Markers") -> tuple[int, str | None]:
        """The first of some markers from a place on; None with the place up to which none can be.

        Of two in one place, the longer one counts.
        """
        found = markers.search(text, at)
        if found is not None:
            return found
        return (len(text) if self.has_ended else markers.begins(text, at)), None

    def _run(self) -> None:
        at = 0
        while True:
            state = self._state
            reached = state(self._text, at)
            assert reached >= at, f"{state.__name__} has gone back"
            # A bound method is made anew each time, so they are compared, not identified.
            if (reached == at and state == self._state) or (
                reached == len(self._text) and not self.has_ended
            ):
                at = reached
                break
            at = reached
        self._text = self._text[at:]


class Markers:
    """Texts that are looked for together, in one pass."""

    def __init__(self, *texts: str) -> None:
        self._texts = tuple(sorted(texts, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))

    def search(self, text: str, at: int) -> tuple[int, str] | None:
        """Place and text of the first one."""
        found = self._pattern.search(text, at)
        return None if found is None else (found.start(), found.group())

    def begins(self, text: str, at: int) -> int:
        """Where the longest end of a text begins that is a proper beginning of one."""
        first = max(at, len(text) - len(self._texts[0]) + 1)
        for place in range(first, len(text)):
            end = text[place:]
            if any(marker.startswith(end) for marker in self._texts):
                return place
        return len(text)


class JsonCall:
    """A call that is written as a JSON object with a name and arguments.

    Args:
        parser: whose sink gets the call.
        is_bare: nothing but the object itself says that it is a call, so it must be one of a tool
            that is offered, with no other fields.

    Attributes:
        state: as of `JsonText`.
        is_announced: whether it is known to be a call.
    """

    _ARGUMENTS = ("arguments", "parameters")
    _KEYS = ("name", *_ARGUMENTS, "type", "id")

    def __init__(self, parser: CallParser, *, is_bare: bool = False) -> None:
        self.state: str = "open"
        self.is_announced = False
        self._parser = parser
        self._is_bare = is_bare
        self._next = "open"
        self._key = ""
        self._name: str | None = None
        self._value = JsonText()
        self._early: list[str] = []  # arguments that came before the name
        self._has_arguments = False
        self._streams = False  # the value that is read are arguments that are an object

    def feed(self, text: str, at: int) -> int:
        """Take what belongs to the object; returns the place of the first that does not."""
        start = at
        while at < len(text) and self.state == "open":
            before, state = at, self._next
            at = self._step(text, at)
            if at == before and self._next == state:
                break
        if not self.is_announced:
            self._parser.hold(text[start:at])
        return at

    def _step(self, text: str, at: int) -> int:
        if self._next in ("key string", "value"):
            return self._read(text, at)
        char = text[at]
        if char in SPACE and self._next != "open":
            return at + 1
        if self._next == "open" and char == "{":
            self._next = "key or end"
        elif self._next in ("key", "key or end") and char == '"':
            self._value, self._next = JsonText(), "key string"
            return at
        elif self._next == "colon" and char == ":":
            self._next = "before value"
        elif self._next == "before value":
            self._value, self._next = JsonText(), "value"
            self._streams = self._key in self._ARGUMENTS and char == "{"
            return at
        elif self._next == "comma or end" and char == ",":
            self._next = "key"
        elif self._next in ("comma or end", "key or end") and char == "}":
            return self._end(at)
        else:
            self.state = "broken"
            return at
        return at + 1

    def _read(self, text: str, at: int) -> int:
        at = self._value.feed(text, at)
        if self._next == "value" and self._streams:
            self._pass_arguments()
        if self._value.state == "broken":
            self.state = "broken"
        elif self._value.state == "done":
            if self._next == "key string":
                self._key = json.loads(self._value.take())
                self._next = "colon"
                if self._is_bare and self._key not in self._KEYS:
                    self.state = "broken"
            else:
                self._take_value()
        return at

    def _pass_arguments(self) -> None:
        if self._has_arguments:  # a second time: the first counts
            self._value.take()
            return
        if self._name is None:
            self._early.append(self._value.take())
            return
        self._announce()
        self._parser.sink.arguments(self._value.take())

    def _take_value(self) -> None:
        self._next = "comma or end"
        if self._key == "name" and self._name is None:
            text = self._value.take()
            name = json.loads(text) if text.startswith('"') else ""
            if not is_tool_name(name) or (self._is_bare and name not in self._parser.tools):
                self.state = "broken"
                return
            self._name = name
            if self._has_arguments:
                self._announce()
                self._parser.sink.arguments("".join(self._early))
        elif self._key in self._ARGUMENTS and not self._has_arguments:
            if not self._streams:
                self._take_odd_arguments(self._value.take())
            else:
                self._has_arguments = True

    def _take_odd_arguments(self, text: str) -> None:
        """Arguments that are no object: null, or an object in a string."""
        if text == "null":
            return
        inner = JsonText()
        text = json.loads(text).strip(SPACE) if text.startswith('"') else ""
        end = inner.feed(text)
        if not text.startswith("{") or inner.state != "done" or end != len(text):
            self.state = "broken"
            return
        self._early = [inner.take()]
        self._has_arguments = True
        if self._name is not None:
            self._announce()
            self._parser.sink.arguments("".join(self._early))

    def _end(self, at: int) -> int:
        if self._name is None:
            self.state = "broken"
            return at
        if not self._has_arguments:
            self._announce()
            self._parser.sink.arguments("{}")
        self.state = "done"
        return at + 1

    def _announce(self) -> None:
        if not self.is_announced:
            self.is_announced = True
            self._parser.announce(self._name or "")
