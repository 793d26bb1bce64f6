"""Random JSON schemas, the same ones for the same seed.

Every keyword of draft 2020-12 that constrains values of a type may stand in a schema of that type,
supported here or not: the usual ones in a quarter of the schemas that can have them, the rare ones
(`uniqueItems`, `contains`, `not`, `if`, `propertyNames`, `dependentRequired`, `minProperties`,
`maxProperties`) in one of twenty. What is drawn is a schema, but need not be one that any value
satisfies.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Json = dict[str, Any]
Draw = Callable[[], Any]
Kind = Callable[[Random, Draw], Json]

USUAL, RARE = 0.25, 0.05
NAMES = ("id", "name", "kind", "size", "tags", "next", "a b", "é")
WORDS = ("", "red", "green", "two words", 'a "quote"', "é\n", "back\\slash", "日本")
PATTERNS = ("^[a-z]{2,8}$", "^[A-Z][a-z]+$", "[0-9]", r"^(\d{3}-)?\d{4}$", r"^\S+$", "x")
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri")


def random_schemas(count: int, seed: int, depth: int = 2) -> list[Json]:
    """So many different schemas."""
    rng = Random(seed)
    found: dict[str, Json] = {}
    while len(found) < count:
        schema = random_schema(rng, depth)
        found.setdefault(json.dumps(schema, sort_keys=True, allow_nan=False), schema)
    return list(found.values())


def digest(schemas: list[Json]) -> str:
    """A short name of a list of schemas, to tell that two runs had the same."""
    text = json.dumps(schemas, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def random_schema(rng: Random, depth: int = 2) -> Json:
    """A schema, below which others lie at most so deep."""
    kinds: list[Kind] = [_string, _integer, _number, _plain, _enum]
    if depth:
        kinds += [_array, _object, _object, _combined]
    return rng.choice(kinds)(rng, lambda: random_schema(rng, depth - 1))


def _with(rng: Random, required: Json, usual: Mapping[str, Draw], rare: Mapping[str, Draw]) -> Json:
    """A schema of these keywords, and some of those that are optional."""
    schema = dict(required)
    notes: dict[str, Draw] = {"title": lambda: "A title", "description": lambda: "What it is."}
    for share, keywords in ((USUAL, {**usual, **notes}), (RARE, rare)):
        schema |= {name: draw() for name, draw in keywords.items() if rng.random() < share}
    return schema


def _plain(rng: Random, _: Draw) -> Json:
    return _with(rng, {"type": rng.choice(("boolean", "null"))}, {}, {})


def _string(rng: Random, _: Draw) -> Json:
    usual: dict[str, Draw] = {
        "minLength": lambda: rng.randint(0, 8),
        "maxLength": lambda: rng.randint(4, 40),
        "pattern": lambda: rng.choice(PATTERNS),
        "format": lambda: rng.choice(FORMATS),
        "default": lambda: "x",
    }
    return _with(rng, {"type": "string"}, usual, {})


def _integer(rng: Random, _: Draw) -> Json:
    return _bounded(rng, "integer", lambda: rng.randint(-1000, 1000))


def _number(rng: Random, _: Draw) -> Json:
    return _bounded(rng, "number", lambda: rng.randint(-4000, 4000) / 4)


def _bounded(rng: Random, kind: str, bound: Draw) -> Json:
    names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    usual: dict[str, Draw] = dict.fromkeys(names, bound)
    usual["multipleOf"] = lambda: rng.randint(1, 12)
    return _with(rng, {"type": kind}, usual, {})


def _enum(rng: Random, _: Draw) -> Json:
    def value() -> Any:
        several = [rng.randint(0, 9) for _ in range(rng.randint(0, 3))]
        return rng.choice((rng.choice(WORDS), rng.randint(-99, 99), True, None, several))

    if rng.random() < USUAL:
        return _with(rng, {"const": value()}, {}, {})
    return _with(rng, {"enum": [value() for _ in range(rng.randint(1, 5))]}, {}, {})


def _array(rng: Random, inner: Draw) -> Json:
    usual: dict[str, Draw] = {
        "minItems": lambda: rng.randint(0, 3),
        "maxItems": lambda: rng.randint(2, 8),
        "prefixItems": lambda: [inner() for _ in range(rng.randint(1, 3))],
    }
    rare: dict[str, Draw] = {"uniqueItems": lambda: True, "contains": inner}
    return _with(rng, {"type": "array", "items": inner()}, usual, rare)


def _object(rng: Random, inner: Draw) -> Json:
    def some_names() -> list[str]:
        return rng.sample(NAMES, rng.randint(1, 3))

    names = rng.sample(NAMES, rng.randint(1, 4))
    usual: dict[str, Draw] = {
        "required": some_names,
        "additionalProperties": lambda: rng.choice((False, False, inner())),
        "patternProperties": lambda: {rng.choice(("^x", "[0-9]$")): inner()},
    }
    rare: dict[str, Draw] = {
        "minProperties": lambda: rng.randint(0, 2),
        "maxProperties": lambda: rng.randint(2, 6),
        "propertyNames": lambda: {"maxLength": 8},
        "dependentRequired": lambda: {rng.choice(NAMES): some_names()},
    }
    properties = {name: inner() for name in names}
    return _with(rng, {"type": "object", "properties": properties}, usual, rare)


def _combined(rng: Random, inner: Draw) -> Json:
    rare: dict[str, Draw] = {"not": inner, "if": inner}
    name = rng.choice(("anyOf", "anyOf", "allOf", "oneOf"))
    return _with(rng, {name: [inner() for _ in range(rng.randint(1, 3))]}, {}, rare)
