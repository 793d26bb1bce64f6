"""A grammar that would end or hold up its process is found out in another one, and refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from llguidance import LLMatcher
from pydantic import ValidationError

from saqqara import SamplingParams
from saqqara.workers.grammar.trial import Trial

NUM_RULES = 4000
RULES = range(NUM_RULES)
START = f'start: r0\nr{NUM_RULES}: "z"\n'
DEFS = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(2500)}
TOO_DEEP: dict[str, dict[str, Any]] = {
    "rules": {"grammar": START + "\n".join(f'r{i}: "a" r{i + 1} | "b" r{i + 1}' for i in RULES)},
    "terminals": {
        "grammar": START.upper().replace("START", "start").replace('"Z"', '"z"')
        + "\n".join(f"R{i}: R{i + 1}" for i in RULES)
    },
    "references": {"json": {"$defs": {**DEFS, "d2500": {}}, "$ref": "#/$defs/d0"}},
}
INTERSECTION = "start: A\nA: " + " & ".join(f"/.*a{i}.*/" for i in range(30))


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    trial = Trial(cpu_seconds=1)
    yield trial
    trial.close()


@pytest.mark.parametrize("form", TOO_DEEP.values(), ids=TOO_DEEP)
def test_what_is_nested_too_deep_is_refused(form: dict[str, Any]) -> None:
    [kind] = form
    with pytest.raises(ValidationError, match=f"{kind}: its rules, or references, are nested"):
        SamplingParams(structured_outputs=form)


def test_what_takes_for_ever_is_refused_and_the_next_is_not(trial: Trial) -> None:
    assert "too much time" in (trial.error_of(LLMatcher.grammar_from_lark(INTERSECTION)) or "")
    assert trial.error_of(LLMatcher.grammar_from_regex("[ab]{3}")) is None


def test_what_has_no_first_token_in_the_limits_is_refused(trial: Trial) -> None:
    words = " | ".join(f'"w{i}" r' for i in range(3000))
    error = trial.error_of(LLMatcher.grammar_from_lark(f'start: {words}\nr: "r" r'))
    assert "max is 2000" in (error or "")


def test_what_people_write_is_taken(trial: Trial) -> None:
    defs = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(50)}
    schema: dict[str, Any] = {"$defs": {**defs, "d50": {"$ref": "#"}}, "$ref": "#/$defs/d0"}
    for _ in range(30):
        schema = {
            "$defs": schema["$defs"],
            "items": {k: v for k, v in schema.items() if k != "$defs"},
        }
    texts = [
        LLMatcher.grammar_from_json_schema(json.dumps(schema)),
        LLMatcher.grammar_from_lark(
            "start: r0\nr200: /z+/\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(200))
        ),
        LLMatcher.grammar_from_regex("(a{100}|[^b]{10,20}){5}\n?"),
    ]
    assert [trial.error_of(text) for text in texts] == [None] * len(texts)
