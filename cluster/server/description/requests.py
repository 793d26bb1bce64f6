"""What the document says of requests beyond what their models do: bounds, messages, an example.

Values of sampling are checked by `SamplingParams`, and conversations by what writes them, so the
models of requests alone do not tell their bounds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from saqqara.cluster.sampling import SamplingParams

Json = dict[str, Any]

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems")
_MEANING = {
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "top_logprobs": "logprobs",
}
_SAMPLED = ("CompletionRequest", "ChatRequest", "ResponseRequest")
_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_NULL = {"type": "null"}
_CALL = {
    "type": "object",
    "required": ["id", "type", "function"],
    "properties": {
        "id": {"type": "string", "minLength": 1},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "arguments": {"type": "string", "description": "A JSON object as text."},
            },
        },
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}, _NULL]},
        "name": {"anyOf": [{"type": "string", "minLength": 1}, _NULL]},
        "tool_calls": {
            "anyOf": [{"type": "array", "items": _CALL}, _NULL],
            "description": "Of the assistant; then the content may be null.",
        },
        "tool_call_id": {
            "anyOf": [_TEXT, _NULL],
            "description": "Of the role `tool`: the call that it answers.",
        },
    },
}
_USER = [{"role": "user", "content": "Where is the oldest pyramid?"}]
EXAMPLES: Mapping[str, Json] = {
    "ChatRequest": {"messages": _USER, "max_completion_tokens": 64},
    "CompletionRequest": {"prompt": "The oldest pyramid stands in", "max_tokens": 16},
    "ResponseRequest": {"input": "Where is the oldest pyramid?", "max_output_tokens": 64},
    "TokenizeRequest": {"messages": _USER},
    "DetokenizeRequest": {"tokens": [1, 2, 3]},
}


def complete(definitions: Mapping[str, Json], model: str) -> dict[str, Json]:
    """The schemas of requests with their bounds, messages and an example.

    Args:
        definitions: by the names of the models.
        model: the name of the model that is served.
    """
    made = {}
    for name, schema in definitions.items():
        fields = dict(schema.get("properties", {}))
        if name in _SAMPLED:
            fields = {field: _bounded(field, told) for field, told in fields.items()}
        if "messages" in fields and name in EXAMPLES:
            fields["messages"] = _with_messages(fields["messages"])
        made[name] = {**schema, "properties": fields} if fields else schema
        if name in EXAMPLES:
            made[name] = {**made[name], "examples": [{"model": model, **EXAMPLES[name]}]}
    return made


def _bounded(name: str, schema: Json) -> Json:
    bounds = _SAMPLING.get(_MEANING.get(name, name))
    if bounds is None:
        return schema
    if "anyOf" in schema:
        return {**schema, "anyOf": [_narrowed(member, bounds) for member in schema["anyOf"]]}
    return _narrowed(schema, bounds)


def _narrowed(schema: Json, bounds: Json) -> Json:
    """A schema with the bounds of those of the same type."""
    for source in _members(bounds):
        if source.get("type") != schema.get("type"):
            continue
        schema = {**schema, **{key: source[key] for key in _BOUNDS if key in source}}
        if "items" in source:
            schema["items"] = source["items"]
    return schema


def _members(schema: Json) -> Iterator[Json]:
    yield from schema.get("anyOf", [schema])


def _with_messages(schema: Json) -> Json:
    """A list of messages, where the model says no more than that it is one of objects."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_with_messages(member) for member in schema["anyOf"]]}
    return {**schema, "items": _MESSAGE, "minItems": 1} if schema.get("type") == "array" else schema


_SAMPLING = SamplingParams.model_json_schema()["properties"]
