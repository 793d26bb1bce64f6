"""`/openapi.json` and `/docs`: the paths of the API and the fields of its requests.

The page is plain HTML, so that it needs neither scripts nor a network.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .description.base import Error
from .description.requests import complete
from .description.table import REPLIES, UNTOLD, Replies, reply_schemas

_REF = "#/components/schemas/"
_ERRORS = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The origin of a page, or the name that the server is asked by, is not allowed.",
    404: "There is no such thing.",
    408: "The body did not come in time, or the answer is not complete in the time that it has.",
    409: "It is not in a state for this.",
    413: "The body is too large.",
    416: "The file has no such bytes.",
    415: "The body is not of a type that is taken here.",
    429: "The queue is full; see `Retry-After`.",
    500: "The model's output for this request is not finite.",
    503: "The server ends, or its engine is being replaced; see `Retry-After`.",
}
_RETRY = {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
_HEADERS: Mapping[int, Mapping[str, Any]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}},
    429: {"Retry-After": {"required": True, **_RETRY}},
    503: {"Retry-After": _RETRY},
}
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;"
    "vertical-align:top}code{font-family:monospace}"
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path of the API.

    Attributes:
        body: the request's model; None: it has no body.
        streams: whether the answer may be server-sent events.
        needs_key: whether an API key is asked for, where the server has any.
        media_type: of the answer.
    """

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    streams: bool = False
    needs_key: bool = True
    media_type: str = "application/json"


def openapi(
    endpoints: Sequence[Endpoint], version: str, root: str = "", model: str = "MODEL"
) -> dict[str, Any]:
    """The description of the API in OpenAPI 3.1.

    The schema of a stream is that of each of its events.

    Args:
        endpoints: what there is.
        version: of the server.
        root: what stands before the paths.
        model: the name of the model that is served, for examples.
    """
    kinds = dict.fromkeys(e.body for e in endpoints if e.body is not None)
    template = _REF + "{model}"
    _, requests = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=template
    )
    known = {(e.method, e.path): REPLIES.get((e.method, e.path), UNTOLD) for e in endpoints}
    replies, definitions = reply_schemas(known, template)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, known[endpoint.method, endpoint.path], replies)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Saqqara", "version": version},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {
            "schemas": _together(complete(requests.get("$defs", {}), model), definitions),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _together(requests: Mapping[str, Any], replies: Mapping[str, Any]) -> dict[str, Any]:
    """Definitions by name; a name means one thing in requests and in replies."""
    for name in requests.keys() & replies.keys():
        assert requests[name] == replies[name], f"two models have the name {name}"
    return {**requests, **replies}


def docs_page(spec: Mapping[str, Any]) -> str:
    """A page that shows a description made by `openapi`."""
    title = escape(f"{spec['info']['title']} {spec['info']['version']}")
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"]
    parts.append(f"<style>{_STYLE}</style><h1>{title}</h1>")
    root = spec["servers"][0]["url"].rstrip("/")
    parts.append(
        f"<p>OpenAI's HTTP API; <a href='{escape(root)}/openapi.json'>openapi.json</a> "
        "describes it for programs.</p>"
    )
    schemas = spec["components"]["schemas"]
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(root + path)}</code></h2>")
            parts.append(f"<p>{escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                (content,) = operation["requestBody"]["content"].values()
                name = content["schema"].get("$ref", "").removeprefix(_REF)
                parts.extend(_fields(schemas.get(name, content["schema"])))
    parts.append("<h2>Errors</h2><table>")
    parts.extend(f"<tr><td>{s}<td>{escape(text)}" for s, text in _ERRORS.items())
    parts.append("</table></html>")
    return "\n".join(parts)


def _operation(
    endpoint: Endpoint, known: Replies, schemas: Mapping[tuple[str, str, str], Any]
) -> dict[str, Any]:
    key = endpoint.method, endpoint.path
    schema = schemas.get((*key, "reply"), {"type": "string"})
    content: dict[str, Any] = {endpoint.media_type: {"schema": schema}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": _event(known, schemas.get((*key, "event"), {}))}
    responses: dict[str, Any] = {}
    if known.is_found:
        responses["200"] = {"description": "The answer.", "content": content}
    if known.has_parts:
        responses["206"] = {"description": "A part of it.", "content": content}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{endpoint.path.translate(_TO_NAME)}",
        "responses": responses,
    }
    if parameters := _parameters(endpoint.path, known):
        operation["parameters"] = parameters
    if endpoint.needs_key:
        operation["security"] = [{"key": []}, {}]
    if endpoint.body is not None:
        body: Any = {"application/json": {"schema": {"$ref": _REF + endpoint.body.__name__}}}
        operation["requestBody"] = {"required": True, "content": body}
    elif known.form is not None:
        body = {"multipart/form-data": {"schema": known.form}}
        operation["requestBody"] = {"required": True, "content": body}
    for status in known.errors:
        operation["responses"][str(status)] = _error(status)
    return operation


def _event(known: Replies, schema: Mapping[str, Any]) -> dict[str, Any]:
    """One event of a stream, as OpenAPI 3.2 describes them: `data` is JSON in a text."""
    kinds = [schema]
    if known.last_event is not None:
        kinds.append({"$ref": f"{_REF}{Error.__name__}"})
    data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json"}
    data["contentSchema"] = schema if len(kinds) == 1 else {"anyOf": kinds}
    if known.last_event is not None:
        data = {"anyOf": [{"const": known.last_event}, data]}
    properties = {"event": {"type": "string"}, "data": data}
    return {"type": "object", "required": ["data"], "properties": properties}


def _parameters(path: str, known: Replies) -> list[dict[str, Any]]:
    """Those of the path and those of the query."""
    parameters: list[dict[str, Any]] = []
    if "{" in path:
        name = path.partition("{")[2].partition("}")[0]
        schema = {"type": "string", "minLength": 1}
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})
    for name, schema in known.query.items():
        parameters.append({"name": name, "in": "query", "required": False, "schema": schema})
    return parameters


def _error(status: int) -> dict[str, Any]:
    """How an error of this status is answered."""
    content = {"application/json": {"schema": {"$ref": f"{_REF}{Error.__name__}"}}}
    headers = {"headers": _HEADERS[status]} if status in _HEADERS else {}
    return {"description": _ERRORS[status], **headers, "content": content}


_TO_NAME = str.maketrans({"/": "_", "{": None, "}": None})


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "<table><tr><th>field<th>type<th>default<th>"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        default = "required" if name in required else _shown(field.get("default"))
        text = escape(field.get("description", ""))
        kind = escape(_type(field))
        yield f"<tr><td><code>{escape(name)}</code><td>{kind}<td>{default}<td>{text}"
    yield "</table>"


def _shown(default: Any) -> str:
    return "" if default is None else f"<code>{escape(json.dumps(default))}</code>"


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_type(kind) for kind in field["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in field or "enum" in field:
        return " or ".join(json.dumps(v) for v in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if "$ref" in field or "allOf" in field:
        return "object"
    return str(field.get("type", "anything"))
