"""Random requests for all that `/openapi.json` describes, each answer compared with the document.

Schemathesis makes the requests, valid ones and wrong ones, and checks status, headers, type and
body of each answer; `Description` checks the same again.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from .described import Description

Json = dict[str, Any]
SERVER_ERRORS = (429, 503)  # what a server may say that is not broken
BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_NOTHING = [HealthCheck(check) for check in HealthCheck]
_CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


def _parsed(schema: Any) -> list[Any]:
    """The operations of a document, of which none may be beyond understanding."""
    return [result.ok() for result in schema.get_all_operations()]


@dataclass
class Tally:
    """What was asked and answered, by operation."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        """All of them."""
        return sum(counts.total() for counts in self.statuses.values())

    def never(self) -> list[str]:
        """Operations that no request succeeded of."""
        return [
            name
            for name, counts in self.statuses.items()
            if not any(200 <= status < 300 for status in counts)
        ]


class Fuzzer:
    """Asks one server.

    Args:
        url: of the server.
        key: an API key.
        document: the description; by default a copy of what the server says.
        model: the name of the model.
    """

    def __init__(self, url: str, key: str, document: Mapping[str, Any], model: str) -> None:
        self.tally = Tally()
        self.ids: dict[str, str] = {}
        self._url = url
        self._key = key
        self._model = model
        self._document = document
        self._description = Description(document)
        schema = schemathesis.openapi.from_dict(dict(document))
        self._operations = {o.label: o for o in _parsed(schema)}

    def labels(self) -> list[str]:
        """The operations: what must still run to be cancelled first, and what deletes last."""

        def turn(label: str) -> tuple[bool, bool, str]:
            return label.startswith("DELETE"), not label.endswith("/cancel"), label

        return sorted(self._operations, key=turn)

    def has_example(self, label: str) -> bool:
        """Whether the document has an example of its body."""
        return self._example(label) is not None

    def run(self, label: str, mode: str, count: int) -> None:
        """Ask so many times.

        Args:
            label: of the operation.
            mode: `positive`: as the schema says; `negative`: against it; `example`: an example
                with some fields as the schema says.
            count: of requests.

        Raises:
            AssertionError: an answer is not as described, or a server error.
        """
        operation = self._operations[label]
        negative = mode == "negative"
        wanted = GenerationMode.NEGATIVE if negative else GenerationMode.POSITIVE
        example = self._example(label)

        @seed(0)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=_NOTHING,
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=wanted), random=st.randoms())
        def ask(case: Case[Any], random: Random) -> None:
            self._prepare(case, random, example if mode == "example" else None, negative)
            self._ask(label, case)

        try:
            ask()
        except Unsatisfiable:
            assert negative, f"{label} has no valid request"

    def _prepare(
        self, case: Case[Any], random: Random, example: Json | None, negative: bool
    ) -> None:
        """Name what there is, and keep answers short."""
        for name, value in self.ids.items():
            if name in case.path_parameters and random.random() < 0.5:
                case.path_parameters[name] = value
        if negative or not isinstance(case.body, dict) or case.media_type != "application/json":
            return
        if example is not None:
            some = {
                k: v for k, v in case.body.items() if k not in example and random.random() < 0.3
            }
            case.body = {**some, **example}
            if "stream" in self._fields(case.operation.label) and random.random() < 0.3:
                case.body["stream"] = True
        if "model" in case.body and random.random() < 0.9:
            case.body["model"] = self._model
        if "input_file_id" in case.body and random.random() < 0.5:
            case.body["input_file_id"] = self.ids["file_id"]
        for name in BOUNDS:
            if name in self._fields(case.operation.label) and random.random() < 0.9:
                case.body[name] = random.randint(1, 3)

    def _ask(self, label: str, case: Case[Any]) -> None:
        authorization = {"Authorization": f"Bearer {self._key}"}
        answer = case.call(base_url=self._url, headers=authorization, timeout=60)
        status = answer.status_code
        self.tally.statuses.setdefault(label, Counter())[status] += 1
        told = f"{label} {case.body!r:.1000}: {status} {answer.text:.500}"
        assert status < 500 or status in SERVER_ERRORS, told
        case.validate_response(answer, checks=_CHECKS, excluded_checks=[not_a_server_error])
        method, _, path = label.partition(" ")
        kind = answer.headers.get("content-type", [""])[0]
        found = self._description.wrong(method, path, status, kind, answer.text)
        assert found is None, f"{found}\n{told}"

    def _example(self, label: str) -> Json | None:
        schema = self._body_schema(label)
        return schema["examples"][0] if "examples" in schema else None

    def _fields(self, label: str) -> Json:
        fields: Json = self._body_schema(label).get("properties", {})
        return fields

    def _body_schema(self, label: str) -> Json:
        method, _, path = label.partition(" ")
        operation = self._document["paths"][path][method.lower()]
        content = operation.get("requestBody", {}).get("content", {})
        name = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        schemas: Json = self._document["components"]["schemas"]
        found: Json = schemas.get(re.sub(r".*/", "", name), {})
        return found
