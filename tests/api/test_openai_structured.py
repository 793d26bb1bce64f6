"""Structured output through the official client, against the server.

The model has random weights: without a form it writes noise.
"""

import json
import re
from enum import Enum
from typing import Any, Literal

import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from pydantic import BaseModel, Field
from support.api_server import MODEL

Json = dict[str, Any]
USER: Any = {"role": "user", "content": "hi"}


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Flag(BaseModel):
    colour: Colour
    stripes: int = Field(ge=0, le=99)


class Point(BaseModel):
    x: int
    y: float


class Shape(BaseModel):
    kind: Literal["line", "dot"]
    points: list[Point] = Field(max_length=2)
    label: str | None = Field(max_length=10)


class Tree(BaseModel):
    size: int
    left: "Tree | None"


class Verdict(BaseModel):
    is_true: bool
    code: str = Field(pattern=r"^[A-Z]{3}-\d{2}$")


MODELS: list[type[BaseModel]] = [Flag, Point, Shape, Verdict]


def chat(client: OpenAI, *, seed: int = 0, **fields: Any) -> Any:
    """The first choice of a chat's answer."""
    usual: Json = {"model": MODEL, "messages": [USER], "max_tokens": 300, "seed": seed}
    return client.chat.completions.create(**{**usual, **fields}).choices[0]


def held(client: OpenAI, form: Json, **fields: Any) -> str:
    """An answer that has ended, held to a form."""
    choice = chat(client, extra_body={"structured_outputs": form}, **fields)
    assert choice.finish_reason == "stop"
    return str(choice.message.content)


def of_schema(schema: Json, **more: Any) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


@pytest.mark.parametrize("model", MODELS)
def test_a_class_is_parsed(client: OpenAI, model: type[BaseModel]) -> None:
    completion = client.chat.completions.parse(
        model=MODEL, messages=[USER], max_tokens=400, seed=1, response_format=model
    )
    assert isinstance(completion.choices[0].message.parsed, model)


async def test_a_class_is_parsed_by_the_client_for_asyncio(async_client: AsyncOpenAI) -> None:
    completion = await async_client.chat.completions.parse(
        model=MODEL, messages=[USER], max_tokens=400, seed=1, response_format=Flag
    )
    assert isinstance(completion.choices[0].message.parsed, Flag)


@pytest.mark.parametrize("model", [Flag, Verdict])
def test_a_class_is_parsed_from_a_stream(client: OpenAI, model: type[BaseModel]) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=[USER], max_tokens=400, seed=1, response_format=model
    ) as stream:
        assert any(event.type == "content.delta" for event in stream)
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, model)


def test_a_class_that_holds_itself(client: OpenAI) -> None:
    for seed in range(3):
        choice = chat(client, seed=seed, response_format=of_schema(Tree.model_json_schema()))
        if choice.finish_reason == "stop":
            Tree.model_validate_json(choice.message.content)


def test_any_object(client: OpenAI) -> None:
    choice = chat(client, response_format={"type": "json_object"}, max_tokens=1000)
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_holds_whatever_strict_says(client: OpenAI, strict: bool | None) -> None:
    schema = {"type": "array", "items": {"enum": [1, "a", None]}, "minItems": 2, "maxItems": 3}
    choice = chat(client, response_format=of_schema(schema, strict=strict, description="some"))
    jsonschema.validate(json.loads(choice.message.content), schema)


def test_text_is_no_form(client: OpenAI) -> None:
    choice = chat(client, response_format={"type": "text"}, max_tokens=5)
    assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
        ({"choice": ["yes", "no", "é"]}, "yes|no|é"),
        ({"grammar": 'start: "a" ("b" | "c")~3'}, "a[bc]{3}"),
        ({"grammar": 'root ::= "a" [bc] [bc]'}, "a[bc]{2}"),
        ({"json": {"enum": ["x", 5]}}, '"x"|5'),
        ({"json": '{"const": {"a": 1}}', "disable_any_whitespace": True}, r'\{"a":1\}'),
    ],
)
def test_the_kinds_of_vllm(client: OpenAI, form: Json, pattern: str) -> None:
    assert re.fullmatch(pattern, held(client, form))


def test_completions_are_held_too(client: OpenAI) -> None:
    choices = client.completions.create(
        model=MODEL,
        prompt=["a", "b"],
        n=2,
        max_tokens=20,
        extra_body={"structured_outputs": {"regex": "[xy]{5}"}},
    ).choices
    assert len(choices) == 4
    assert all(re.fullmatch("[xy]{5}", choice.text) for choice in choices)


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    choice = chat(client, max_tokens=4, extra_body={"structured_outputs": {"regex": "[ab]{9}"}})
    assert choice.finish_reason == "length"
    assert re.fullmatch("[ab]{4}", choice.message.content)


def test_log_probabilities_come_along(client: OpenAI) -> None:
    form = {"structured_outputs": {"choice": ["abc"]}}
    choice = chat(client, logprobs=True, top_logprobs=2, extra_body=form)
    assert [entry.token for entry in choice.logprobs.content] == ["a", "b", "c"]


def test_a_stop_string_cuts_the_form(client: OpenAI) -> None:
    assert held(client, {"choice": ["ab;cd"]}, stop=";") == "ab"


WRONG: dict[str, tuple[Json, str, str]] = {
    "a keyword": (
        {"response_format": of_schema({"properties": {"a": {"not": {}}}})},
        "response_format",
        "the keyword 'not' at /properties/a is not supported",
    ),
    "a format": ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "needs"),
    "two kinds": (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs",
        "exactly one",
    ),
    "an expression": ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
    "a grammar": (
        {"structured_outputs": {"grammar": "start: gone"}},
        "structured_outputs",
        "unknown name",
    ),
    "both fields": (
        {
            "structured_outputs": {"regex": "a"},
            "response_format": {"type": "json_object"},
        },
        "structured_outputs",
        "exclude each other",
    ),
    "an earlier name": ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs"),
    "nothing left": (
        {"structured_outputs": {"choice": ["b"]}, "allowed_token_ids": [70]},
        "structured_outputs",
        "no token is left",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told(client: OpenAI, case: str) -> None:
    fields, param, message = WRONG[case]
    with pytest.raises(BadRequestError, match=message) as caught:
        chat(client, extra_body=fields)
    assert caught.value.param == param
    assert held(client, {"choice": ["fine"]}) == "fine"
