"""Calls as Mistral writes them: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, and later
`[TOOL_CALLS]name[ARGS]{...}`, where `[ARGS]` may be missing and `[CALL_ID]...` may stand before it.
"""

import re
from typing import ClassVar

from .call_parser import CallParser, JsonCall, Markers
from .deltas import Schemas, Sink, is_tool_name, mistral_call_id
from .json_text import JsonText

_BEGIN = "[TOOL_CALLS]"
_ID = "[CALL_ID]"
_ARGUMENTS = "[ARGS]"
_MAX_HEAD_CHARS = 256  # name and id: what is longer is no call
_WORD = re.compile(r"[a-zA-Z0-9_.-]*")


class MistralParser(CallParser):
    """A marker, and then a list of calls or one call."""

    markers: ClassVar[tuple[str, ...]] = (_BEGIN, _ID, _ARGUMENTS)
    new_id = staticmethod(mistral_call_id)
    _starts = Markers(_BEGIN)

    def __init__(self, sink: Sink, tools: Schemas) -> None:
        super().__init__(sink, tools)
        self._call = JsonCall(self)
        self._arguments = JsonText()
        self._name = ""

    def start(self, text: str, at: int) -> int:
        """Content, up to the first marker."""
        place, marker = self.find(text, at, self._starts)
        self.sink.content(text[at:place])
        if marker is None:
            return place
        self.hold(marker)
        self.go(self._before_call)
        return place + len(marker)

    def _before_call(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place == len(text):
            return place
        if text[place] == "[":
            self.hold("[")
            self.go(self._before_item)
            return place + 1
        self.go(self._name_of_call)
        return place

    def _before_item(self, text: str, at: int) -> int:
        """A list, before one of its calls."""
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place < len(text):
            self._call = JsonCall(self)
            self.go(self._in_item)
        return place

    def _in_item(self, text: str, at: int) -> int:
        at = self._call.feed(text, at)
        if self._call.state == "done" and self._call.is_announced:
            self.go(self._after_item)
        elif self._call.state != "open":
            self._give_up()
        return at

    def _after_item(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        if place == len(text):
            return place
        if text[place] == ",":
            self.hold(text[at : place + 1])
            self.go(self._before_item)
            return place + 1
        self.go(self.start)
        return place + 1 if text[place] == "]" else place

    def _name_of_call(self, text: str, at: int) -> int:
        """A name, and what stands between it and its arguments."""
        found = _WORD.match(text, at)
        assert found is not None
        end = found.end()
        if end - at > _MAX_HEAD_CHARS or (end == len(text) and self.has_ended):
            self._give_up()
            return at
        if end == len(text):
            return at
        self._name = found[0]
        if is_tool_name(self._name):
            self.hold(self._name)
            self.go(self._before_arguments)
            return end
        self._give_up()
        return at

    def _before_arguments(self, text: str, at: int) -> int:
        if self.may_begin(text, at, _ID) or self.may_begin(text, at, _ARGUMENTS):
            return at
        if text.startswith(_ID, at):
            found = _WORD.match(text, at + len(_ID))
            assert found is not None
            is_whole = found.end() < len(text) or self.has_ended
            if is_whole or found.end() - at > _MAX_HEAD_CHARS:
                self.hold(text[at : found.end()])
                return found.end()
            return at
        place = at + len(_ARGUMENTS) if text.startswith(_ARGUMENTS, at) else at
        self.hold(text[at:place])
        self.go(self._before_object)
        return place

    def _before_object(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place == len(text):
            return place
        if text[place] == "{":
            self.announce(self._name)
            self._arguments = JsonText()
            self.go(self._in_arguments)
        else:
            self._give_up()
        return place

    def _in_arguments(self, text: str, at: int) -> int:
        at = self._arguments.feed(text, at)
        self.sink.arguments(self._arguments.take())
        if self._arguments.state != "open":
            self.go(self.start)
        return at

    def _give_up(self) -> None:
        self.release()
        self.go(self.start)
