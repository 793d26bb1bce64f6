"""What a schema leaves open is narrowed; what it says is not."""

import json
from typing import Any

import jsonschema
import pytest
from harness.random_schemas import random_schemas

from saqqara.cluster.structured.narrowing import MAX_INTEGER, MAX_NUMBER, NUMBER_STEP, narrowed

OPEN_NUMBER = {"minimum": -MAX_NUMBER, "maximum": MAX_NUMBER, "multipleOf": NUMBER_STEP}
OPEN_INTEGER = {"minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}
NARROWED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an integer": ({"type": "integer"}, {"type": "integer", **OPEN_INTEGER}),
    "an integer with a bound": (
        {"type": "integer", "exclusiveMinimum": 3},
        {"type": "integer", "exclusiveMinimum": 3, "maximum": MAX_INTEGER},
    ),
    "a number": ({"type": "number"}, {"type": "number", **OPEN_NUMBER}),
    "a number of steps": (
        {"type": "number", "multipleOf": 5},
        {"type": "number", **OPEN_NUMBER, "multipleOf": 5},
    ),
    "an object": (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {
            "type": "object",
            "properties": {"a": {"type": "integer", **OPEN_INTEGER}},
            "required": ["a"],
            "additionalProperties": False,
        },
    ),
    "an object that requires another name": (
        {"type": "object", "properties": {"a": {}}, "required": ["b", "a"]},
        {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "required": ["b", "a"],
            "additionalProperties": False,
        },
    ),
    "one of several": (
        {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        {"anyOf": [{"type": "integer", **OPEN_INTEGER}, {"type": "null"}]},
    ),
    "one of two types": (
        {"type": ["null", "integer"]},
        {"type": ["null", "integer"], **OPEN_INTEGER},
    ),
    "all of one": (
        {"allOf": [{"type": "integer"}], "title": "a"},
        {"allOf": [{"type": "integer", **OPEN_INTEGER}], "title": "a"},
    ),
    "a definition": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", **OPEN_INTEGER}}},
    ),
}
KEPT: dict[str, dict[str, Any]] = {
    "large bounds": {"type": "integer", "minimum": 2**60},
    "a narrow range": {"type": "number", "minimum": 1e-9, "maximum": 2e-9},
    "anything else": {"type": "object", "properties": {"a": {}}, "additionalProperties": {}},
    "a required name that a pattern may have": {
        "type": "object",
        "properties": {"a": {}},
        "required": ["b"],
        "patternProperties": {"^b": {"type": "null"}},
    },
    "values": {"enum": [{"type": "integer"}], "default": {"type": "number"}},
    "all of several": {"allOf": [{"type": "object", "properties": {"a": {}}}, {}]},
    "one of two": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    "all of one and more": {"allOf": [{"type": "integer"}], "maximum": 3},
    "parts of all": {
        "allOf": [{"$ref": "#/$defs/a"}],
        "$defs": {"a": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    },
    "a combined object": {"type": "object", "properties": {"a": {}}, "anyOf": [{}]},
}


@pytest.mark.parametrize("case", NARROWED)
def test_what_is_open_gets_bounds(case: str) -> None:
    given, expected = NARROWED[case]
    before = json.dumps(given)
    assert narrowed(given) == expected
    assert json.dumps(given) == before
    assert narrowed(expected) == expected


@pytest.mark.parametrize("case", KEPT)
def test_what_is_said_stays(case: str) -> None:
    assert narrowed(KEPT[case]) == KEPT[case]


def test_what_is_narrower_is_a_schema_still() -> None:
    for schema in random_schemas(200, seed=1):
        jsonschema.Draft202012Validator.check_schema(narrowed(schema))
