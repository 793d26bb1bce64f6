"""Calls as Qwen3-Coder writes them: XML with a line for each parameter.

    <tool_call>
    <function=name>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Values are plain text; what they are in JSON is said by the tool's parameters. Strings are passed on
as they come, other values when they are whole. The outer marker may be missing.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from .call_parser import CallParser, Markers
from .deltas import Schemas, Sink, is_tool_name
from .json_text import JsonText

_BEGIN = "<tool_call>"
_END = "</tool_call>"
_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_MAX_NAME_CHARS = 256
_JSON_TYPES = ("object", "array", "number", "integer", "boolean", "null")


class Qwen3CoderParser(CallParser):
    """Functions and parameters as XML."""

    markers: ClassVar[tuple[str, ...]] = (_BEGIN, _END, _FUNCTION, _PARAMETER)
    _starts = Markers(_BEGIN, _FUNCTION)
    # A forgotten end is put up with where the next thing begins on a line of its own.
    _value_ends = Markers(
        "\n" + _PARAMETER_END, _PARAMETER_END, "\n" + _PARAMETER, "\n" + _FUNCTION_END
    )

    def __init__(self, sink: Sink, tools: Schemas) -> None:
        super().__init__(sink, tools)
        self._properties: Mapping[str, Any] = {}
        self._num_parameters = 0
        self._parameter = ""
        self._is_fresh = False  # nothing of the value has been seen
        self._value: list[str] | None = None  # of a value that is passed on when it is whole

    def start(self, text: str, at: int) -> int:
        """Content, up to the first marker."""
        place, marker = self.find(text, at, self._starts)
        self.sink.content(text[at:place])
        if marker is None:
            return place
        if marker == _FUNCTION:
            self.go(self._function)
            return place
        self.hold(marker)
        self.go(self._before_function)
        return place + len(marker)

    def _before_function(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place == len(text) or self.may_begin(text, place, _FUNCTION):
            return place
        if text.startswith(_FUNCTION, place):
            self.go(self._function)
        else:
            self._give_up()
        return place

    def _function(self, text: str, at: int) -> int:
        name, end = self._name(text, at + len(_FUNCTION))
        if name is None and end is None:
            return at
        if name is None or not is_tool_name(name):
            self.hold(_FUNCTION)
            self._give_up()
            return at + len(_FUNCTION)
        assert end is not None
        self.announce(name)
        self.sink.arguments("{")
        found = self.tools.get(name, {}).get("properties")
        self._properties = found if isinstance(found, Mapping) else {}
        self._num_parameters = 0
        self.go(self._before_parameter)
        return end

    def _before_parameter(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        if place == len(text):
            return place
        for marker in (_PARAMETER, _FUNCTION_END, _END):
            if self.may_begin(text, place, marker):
                return place
        if text.startswith(_PARAMETER, place):
            self.go(self._parameter_name)
            return place
        # The function's end, or a model that has lost the thread: the arguments end in any case.
        self.sink.arguments("}")
        self.go(self._after_function)
        return place + len(_FUNCTION_END) if text.startswith(_FUNCTION_END, place) else place

    def _parameter_name(self, text: str, at: int) -> int:
        name, end = self._name(text, at + len(_PARAMETER))
        if name is None and end is None:
            return at
        if name is None:
            self.sink.arguments("}")
            self.go(self.start)
            return at
        assert end is not None
        self._parameter = name
        comma = ", " if self._num_parameters else ""
        self._num_parameters += 1
        self.sink.arguments(f"{comma}{_quoted(name)}: ")
        self._value = None if _is_text(self._properties.get(name)) else []
        if self._value is None:
            self.sink.arguments('"')
        self._is_fresh = True
        self.go(self._in_value)
        return end

    def _in_value(self, text: str, at: int) -> int:
        place, marker = self.find(text, at, self._value_ends)
        self._pass(text[at:place])
        if marker is None:
            return place
        self._end_value()
        self.go(self._before_parameter)
        if marker.endswith(_PARAMETER_END):
            return place + len(marker)
        return place + 1

    def _pass(self, text: str) -> None:
        if self._is_fresh and text:  # the line break after the tag is none of the value's
            self._is_fresh = False
            text = text.removeprefix("\n")
        if self._value is None:
            self.sink.arguments(_quoted(text)[1:-1])
        else:
            self._value.append(text)

    def _end_value(self) -> None:
        if self._value is None:
            self.sink.arguments('"')
        else:
            schema = self._properties.get(self._parameter)
            self.sink.arguments(_as_json("".join(self._value), schema))

    def _after_function(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        self.sink.content(text[at:place])
        if place == len(text) or self.may_begin(text, place, _END):
            return place
        self.go(self.start)
        return place + len(_END) if text.startswith(_END, place) else place

    def _name(self, text: str, at: int) -> tuple[str | None, int | None]:
        """A name up to `>`, and the place after it; (None, 0) for none, two None for not yet."""
        end = text.find(">", at, at + _MAX_NAME_CHARS)
        if end >= 0:
            name = text[at:end]
            return (name, end + 1) if name and "\n" not in name else (None, 0)
        if len(text) - at < _MAX_NAME_CHARS and not self.has_ended:
            return None, None
        return None, 0

    def _give_up(self) -> None:
        self.release()
        self.go(self.start)


def _types(schema: Any) -> set[str]:
    """The types that a parameter's schema allows; none where it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    types = {kind} if isinstance(kind, str) else set()
    if isinstance(kind, list):
        types |= {name for name in kind if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        members = schema.get(key)
        for member in members if isinstance(members, list) else ():
            types |= _types(member)
    return types


def _is_text(schema: Any) -> bool:
    """Whether a value can be nothing but a string."""
    return not _types(schema) & {*_JSON_TYPES}


def _as_json(text: str, schema: Any) -> str:
    """A value in JSON; one that its schema does not allow stays a string."""
    types = _types(schema)
    stripped = text.strip()
    lower = stripped.lower()
    if "string" in types and not (lower == "null" and "null" in types):
        return _quoted(text)
    if lower in ("true", "false", "null", "none"):
        return lower.replace("none", "null")
    value = JsonText()
    end = value.feed(stripped)
    value.end()
    if value.state == "done" and end == len(stripped):
        return value.take()
    return _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False, allow_nan=False)
