"""Schemas made narrower where they say nothing, so that answers come to an end.

A schema says what values are valid, and leaves much open: numbers of a thousand digits, properties
of any name. A model that samples among all of that may never stop. What is valid here is valid
under the schema as it was given, and what a schema says is never changed.
"""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

MAX_INTEGER = 2**53 - 1  # what every reader of JSON keeps exactly (RFC 7493)
MAX_NUMBER = 10**15
NUMBER_STEP = 1e-6  # with at most 15 digits before the point
_LOW, _HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_COMBINED = ("allOf", "oneOf", "anyOf", "$ref", "not", "if")
_OF_NAMES = ("properties", "patternProperties")
_DEFINITIONS = ("$defs", "definitions")


def narrowed(schema: Json) -> Json:
    """The schema with bounds for what it leaves open.

    Integers lie within 2**53 - 1, numbers within 10**15 with six decimals and no exponent, and an
    object that names properties has no others than these and the required ones. What `allOf` or
    `oneOf` combine stays as it is, since a narrower part could leave nothing, or make two parts
    exclude each other that do not.
    """
    narrower: Json = _narrowed(schema, definitions=not _combines(schema))
    return narrower


def _narrowed(schema: Any, definitions: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found: Json = {}
    for name, value in schema.items():
        if name in _OF_NAMES or (name in _DEFINITIONS and definitions):
            found[name] = _each(value, definitions)
        elif name in ("items", "additionalProperties"):
            found[name] = _narrowed(value, definitions)
        elif name in ("prefixItems", "anyOf") and isinstance(value, list):
            found[name] = [_narrowed(child, definitions) for child in value]
        elif name in ("allOf", "oneOf") and _is_alone(value):
            found[name] = (
                [_narrowed(value[0], definitions)] if _only_notes_beside(schema, name) else value
            )
        else:
            found[name] = value
    if any(name in schema for name in _COMBINED):
        return found
    for kind in _kinds(schema.get("type")):
        found = {"integer": _integer, "number": _number, "object": _object}.get(kind, dict)(found)
    return found


def _kinds(given: Any) -> list[str]:
    """The types that a schema names; of the two kinds of numbers the wider one."""
    kinds = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    is_wide = "number" in kinds
    return [kind for kind in kinds if isinstance(kind, str) and not (is_wide and kind == "integer")]


def _each(schemas: Any, definitions: bool) -> Any:
    if not isinstance(schemas, Mapping):
        return schemas
    return {name: _narrowed(schema, definitions) for name, schema in schemas.items()}


def _integer(schema: Json) -> Json:
    return _within(schema, MAX_INTEGER)


def _number(schema: Json) -> Json:
    if "multipleOf" in schema:
        return _within(schema, MAX_NUMBER)
    bounded = _within(schema, MAX_NUMBER)
    if bounded is schema or _width(bounded) < 1:
        return schema  # there may be no number of six decimals between its bounds
    return {**bounded, "multipleOf": NUMBER_STEP}


def _width(schema: Json) -> float:
    """How far the bounds lie apart of a schema that has both."""
    low = max(schema[name] for name in _LOW if name in schema)
    high = min(schema[name] for name in _HIGH if name in schema)
    return float(high - low)


def _within(schema: Json, most: int) -> Json:
    """With both bounds, unless one lies outside of ours."""
    given = [schema.get(name, 0) for name in (*_LOW, *_HIGH)]
    if any(isinstance(v, bool) or not isinstance(v, int | float) or abs(v) > most for v in given):
        return schema
    low = {} if any(name in schema for name in _LOW) else {"minimum": -most}
    high = {} if any(name in schema for name in _HIGH) else {"maximum": most}
    return {**schema, **low, **high}


def _object(schema: Json) -> Json:
    names, required = schema.get("properties"), schema.get("required", [])
    says_more = any(name in schema for name in ("additionalProperties", "unevaluatedProperties"))
    if says_more or not isinstance(names, Mapping) or not names or not isinstance(required, list):
        return schema
    if not all(isinstance(name, str) for name in required):
        return schema
    missing = [name for name in required if name not in names]
    if not missing:
        return {**schema, "additionalProperties": False}
    if "patternProperties" in schema:  # which may say what these are
        return schema
    named = {**names, **{name: {} for name in missing}}
    return {**schema, "properties": named, "additionalProperties": False}


def _only_notes_beside(schema: Mapping[str, Any], name: str) -> bool:
    return not {*schema} - {name, "title", "description"}


def _is_alone(parts: Any) -> bool:
    return isinstance(parts, list) and len(parts) == 1


def _combines(value: Any) -> bool:
    """Whether `allOf` or `oneOf` stands anywhere in a value."""
    if isinstance(value, Mapping):
        return "allOf" in value or "oneOf" in value or any(map(_combines, value.values()))
    return isinstance(value, list) and any(map(_combines, value))
