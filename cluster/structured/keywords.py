"""The schemas within a schema: where they lie, what is said there, and what says nothing."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Keywords of a schema below which further schemas lie.
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_LISTS = ("prefixItems", "anyOf", "allOf", "oneOf", "items")
_OF_ONE = (
    *("items", "additionalProperties", "additionalItems", "not", "if", "then", "else"),
    *("contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)
# Keywords that every value satisfies with this value (JSON Schema 2020-12).
_IDLE: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "propertyNames": (True, {}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "not": (False,),
}
# Keywords that say something only beside one of these.
_NEEDS = {
    "if": ("then", "else"),
    "then": ("if",),
    "else": ("if",),
    "minContains": ("contains",),
    "maxContains": ("contains",),
}


def children(schema: Any) -> Iterator[tuple[str, Any]]:
    """(JSON pointer from the schema, what lies there) of the schemas directly within a schema."""
    if not isinstance(schema, Mapping):
        return
    for name, value in schema.items():
        if name in _OF_NAMES and isinstance(value, Mapping):
            for key, child in value.items():
                yield f"/{name}/{_escaped(key)}", child
        elif name in _OF_LISTS and isinstance(value, list | tuple):
            for number, child in enumerate(value):
                yield f"/{name}/{number}", child
        elif name in _OF_ONE:
            yield f"/{name}", value


def schemas_within(schema: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(JSON pointer, schema) of all schemas within a schema and of itself, the innermost first."""
    for step, child in children(schema):
        yield from schemas_within(child, place + step)
    yield place or "/", schema


def keywords(schema: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(JSON pointer of a schema, keyword) of a schema and of those within, the outermost first."""
    if not isinstance(schema, Mapping):
        return
    for name in schema:
        yield place or "/", name
    for step, child in children(schema):
        yield from keywords(child, place + step)


def without_idle(schema: Any) -> Any:
    """The schema without keywords that say nothing, here and below, such as `uniqueItems: false`.

    They are refused by what does not implement the keyword, whatever its value.
    """
    if not isinstance(schema, Mapping):
        return schema
    return {
        name: _mapped(name, value, without_idle)
        for name, value in schema.items()
        if not _is_idle(name, value, schema)
    }


def _is_idle(name: str, value: Any, schema: Mapping[str, Any]) -> bool:
    if name in _NEEDS:
        return not any(other in schema for other in _NEEDS[name])
    # By type, too: 0 equals False, and is no value of `uniqueItems`.
    return any(type(value) is type(idle) and value == idle for idle in _IDLE.get(name, ()))


def _mapped(name: str, value: Any, change: Callable[[Any], Any]) -> Any:
    """A keyword's value, with the schemas in it changed."""
    if name in _OF_NAMES and isinstance(value, Mapping):
        return {key: change(child) for key, child in value.items()}
    if name in _OF_LISTS and isinstance(value, list | tuple):
        return [change(child) for child in value]
    return change(value) if name in _OF_ONE else value


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
