"""Whether an answer is as `/openapi.json` says; shares no code with what makes the document."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator

Json = dict[str, Any]


class Description:
    """A document of OpenAPI 3.1, and what it says of an answer.

    Args:
        document: the document.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._validator = lru_cache(maxsize=None)(self._make)

    @property
    def operations(self) -> list[tuple[str, str]]:
        """Methods and paths."""
        return [
            (method.upper(), path)
            for path, operations in self.document["paths"].items()
            for method in operations
        ]

    def wrong(self, method: str, path: str, status: int, media_type: str, text: str) -> str | None:
        """What is not as described of an answer; None where all is.

        Args:
            method: of the operation.
            path: of the operation, with its parameters' names.
            status: that came.
            media_type: that came, maybe with parameters.
            text: the body.
        """
        responses = self.document["paths"][path][method.lower()]["responses"]
        if str(status) not in responses:
            return f"status {status} is not described: {text:.300}"
        content = responses[str(status)].get("content", {})
        kind = media_type.partition(";")[0].strip()
        if kind not in content:
            return f"{kind!r} is not described for status {status}"
        schema = content[kind]["schema"]
        if kind == "text/event-stream":
            return self._wrong_events(schema["properties"]["data"], text)
        value = json.loads(text) if kind == "application/json" else text
        return self._invalid(schema, value)

    def _wrong_events(self, data: Json, text: str) -> str | None:
        """An event has one line of data: the last event's words, or JSON."""
        kinds = data.get("anyOf", [data])
        words = [kind["const"] for kind in kinds if "const" in kind]
        (schema,) = (kind["contentSchema"] for kind in kinds if "contentSchema" in kind)
        for event in text.removesuffix("\n\n").split("\n\n"):
            lines = [line for line in event.split("\n") if line.startswith("data: ")]
            if len(lines) != 1:
                return f"an event has no one line of data: {event!r:.200}"
            value = lines[0].removeprefix("data: ")
            found = None if value in words else self._invalid(schema, json.loads(value))
            if found is not None:
                return found
        return None

    def _invalid(self, schema: Json, value: Any) -> str | None:
        error = next(iter(self._validator(json.dumps(schema)).iter_errors(value)), None)
        return None if error is None else f"{error.json_path}: {error.message:.500}"

    def _make(self, schema: str) -> Draft202012Validator:
        return Draft202012Validator(
            {**json.loads(schema), "components": self.document["components"]}
        )
