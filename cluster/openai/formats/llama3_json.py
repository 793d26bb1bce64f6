"""Calls as Llama 3 writes them: `{"name": ..., "parameters": {...}}`, several with `;` between.

They are the whole answer, or follow `<|python_tag|>`. Nothing else marks them, so an object counts
if it has the name of a tool that is offered and no other fields: an answer in JSON stays content.
"""

from typing import ClassVar

from .call_parser import CallParser, JsonCall, Markers
from .deltas import SPACE, Schemas, Sink

_TAG = "<|python_tag|>"


class Llama3JsonParser(CallParser):
    """JSON objects at the answer's beginning or after the tag."""

    markers: ClassVar[tuple[str, ...]] = (_TAG,)
    _starts = Markers(_TAG)

    def __init__(self, sink: Sink, tools: Schemas) -> None:
        super().__init__(sink, tools)
        self._call = JsonCall(self, is_bare=True)

    def start(self, text: str, at: int) -> int:
        """The answer's beginning."""
        return self._before_call(text, at)

    def _before_call(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place == len(text):
            return place
        if text[place] == "{":
            self._call = JsonCall(self, is_bare=True)
            self.go(self._in_call)
        else:
            self._give_up()
        return place

    def _in_call(self, text: str, at: int) -> int:
        at = self._call.feed(text, at)
        if self._call.state != "open":
            if self._call.is_announced:
                self.go(self._after_call)
            else:
                self._give_up()
        return at

    def _after_call(self, text: str, at: int) -> int:
        """Another call, after a `;` or on a line of its own."""
        place = self.skip_space(text, at)
        if place == len(text):
            self.hold(text[at:place])
            return place
        if text[place] == ";":
            self.hold(text[at : place + 1])
            self.go(self._before_call)
            return place + 1
        if text[place] == "{" and self._call.state == "done":
            self.go(self._before_call)
        else:
            self._give_up()
        return at

    def _give_up(self) -> None:
        self.release()
        self.go(self._content)

    def _content(self, text: str, at: int) -> int:
        place, marker = self.find(text, at, self._starts)
        self.sink.content(text[at:place])
        if marker is None:
            return place
        self.hold(marker)
        self.go(self._before_call)
        return place + len(marker)

    def unfinished(self) -> None:
        """A `;` at the end is no content."""
        if not self.sink.num_calls or "".join(self._held).strip(SPACE + ";"):
            self.release()
        self._held.clear()
