"""Answers that a grammar makes calls of: `tool_choice` `required`, or the name of a function.

With `required` the answer is a list of `{"name": ..., "parameters": {...}}`; with a name it is that
function's arguments. The JSON schemas that say so are made here, too.
"""

from collections.abc import Mapping
from typing import Any

from .call_parser import CallParser, JsonCall
from .deltas import Schemas, Sink
from .json_text import JsonText

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def required_schema(tools: Schemas, max_calls: int | None) -> dict[str, Any]:
    """A list of calls of any of the tools, of at most so many."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [name]},
                "parameters": {"$ref": f"#/$defs/{name}"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in tools
    ]
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "$defs": {
            name: _moved(named_schema(schema), f"#/$defs/{name}") for name, schema in tools.items()
        },
    }
    if max_calls is not None:
        schema["maxItems"] = max_calls
    return schema


def named_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one function: an object, also where its parameters do not say so."""
    return {**_ANY_OBJECT, **parameters}


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at another place than the root, to which its references point."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema


class RequiredParser(CallParser):
    """A list of calls, and nothing beside it."""

    def __init__(self, sink: Sink, tools: Schemas) -> None:
        super().__init__(sink, tools)
        self._call = JsonCall(self, is_bare=True)

    def start(self, text: str, at: int) -> int:
        """The list's beginning."""
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place == len(text):
            return place
        if text[place] != "[":
            return self._give_up(place)
        self.hold("[")
        self.go(self._before_call)
        return place + 1

    def _before_call(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place < len(text):
            self._call = JsonCall(self, is_bare=True)
            self.go(self._in_call)
        return place

    def _in_call(self, text: str, at: int) -> int:
        at = self._call.feed(text, at)
        if self._call.state == "done" and self._call.is_announced:
            self.go(self._after_call)
        elif self._call.state != "open":
            self._give_up(at)
        return at

    def _after_call(self, text: str, at: int) -> int:
        place = self.skip_space(text, at)
        if place == len(text):
            return place
        if text[place] == ",":
            self.go(self._before_call)
            return place + 1
        return self._give_up(place + 1 if text[place] == "]" else place)

    def unfinished(self) -> None:
        """What is held after a call is the space and the beginning of another one."""
        if not self.sink.num_calls:
            self.release()
        self._held.clear()

    def _give_up(self, place: int) -> int:
        self.release()
        self.go(self.plain)
        return place


class NamedParser(CallParser):
    """The arguments of the one tool that there is, and nothing beside them."""

    def __init__(self, sink: Sink, tools: Schemas) -> None:
        super().__init__(sink, tools)
        (self._name,) = tools
        self._arguments = JsonText()

    def start(self, text: str, at: int) -> int:
        """The arguments' beginning."""
        place = self.skip_space(text, at)
        self.hold(text[at:place])
        if place == len(text):
            return place
        if text[place] == "{":
            self.announce(self._name)
            self.go(self._in_arguments)
        else:
            self.release()
            self.go(self.plain)
        return place

    def _in_arguments(self, text: str, at: int) -> int:
        at = self._arguments.feed(text, at)
        self.sink.arguments(self._arguments.take())
        if self._arguments.state != "open":
            self.go(self.plain)
        return at
