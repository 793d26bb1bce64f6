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

_REF = "#/components/schemas/"
_ERRORS = {
    "400": "A field is wrong; `param` names it.",
    "401": "The API key is missing or wrong.",
    "403": "The page's origin is not allowed.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not `application/json`.",
    "429": "The queue is full; see `Retry-After`.",
    "503": "The server ends, or its engine is being replaced; see `Retry-After`.",
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
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


def openapi(endpoints: Sequence[Endpoint], version: str, root: str = "") -> dict[str, Any]:
    """The description of the API in OpenAPI 3.1.

    Args:
        endpoints: what there is.
        version: of the server.
        root: what stands before the paths.
    """
    kinds = dict.fromkeys(e.body for e in endpoints if e.body is not None)
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_REF + "{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Saqqara", "version": version},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


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
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                parts.extend(_fields(schemas[schema["$ref"].removeprefix(_REF)]))
    parts.append("<h2>Errors</h2><table>")
    parts.extend(f"<tr><td>{s}<td>{escape(text)}" for s, text in _ERRORS.items())
    parts.append("</table></html>")
    return "\n".join(parts)


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.media_type: {}}
    if endpoint.streams:
        content["text/event-stream"] = {}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{endpoint.path.translate(_TO_NAME)}",
        "responses": {"200": {"description": "The answer.", "content": content}},
    }
    if "{" in endpoint.path:
        name = endpoint.path.partition("{")[2].partition("}")[0]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if endpoint.needs_key:
        operation["security"] = [{"key": []}, {}]
    if endpoint.body is not None:
        schema = {"$ref": _REF + endpoint.body.__name__}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
        error = {"application/json": {"schema": {"$ref": _REF + "Error"}}}
        for status, text in _ERRORS.items():
            operation["responses"][status] = {"description": text, "content": error}
    return operation


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
