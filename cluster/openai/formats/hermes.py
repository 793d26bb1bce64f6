"""Calls of Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from typing import ClassVar

from .call_parser import CallParser, JsonCall, Markers
from .deltas import Schemas, Sink

_BEGIN = "<tool_call>"
_END = "</tool_call>"


class HermesParser(CallParser):
    """One JSON object between two markers for each call."""

    markers: ClassVar[tuple[str, ...]] = (_BEGIN, _END)
    _starts = Markers(_BEGIN)

    def __init__(self, sink: Sink, tools: Schemas) -> None:
        super().__init__(sink, tools)
        self._call = JsonCall(self)

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
        if place < len(text):
            self._call = JsonCall(self)
            self.go(self._in_call)
        return place

    def _in_call(self, text: str, at: int) -> int:
        at = self._call.feed(text, at)
        if self._call.state != "open":
            self.go(self._after_call if self._call.is_announced else self._no_call)
        return at

    def _after_call(self, text: str, at: int) -> int:
        """The closing marker, which some models forget."""
        place = self.skip_space(text, at)
        self.sink.content(text[at:place])
        if place == len(text) or self.may_begin(text, place, _END):
            return place
        self.go(self.start)
        return place + len(_END) if text.startswith(_END, place) else place

    def _no_call(self, text: str, at: int) -> int:
        self.release()
        self.go(self.start)
        return at
