"""What can be asked of an answer's form, and that answers have it: through a whole engine.

The model is a tiny random one of bytes, sampled at temperature 1: by itself it writes noise.
"""

import json
import pickle
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from harness.random_schemas import random_schemas
from pydantic import ValidationError
from support.byte_llama import save_tiny_llama

from saqqara import LLM, SamplingParams
from saqqara.cluster.request import RequestOutput
from saqqara.cluster.structured.outputs import MAX_SCHEMA_BYTES, StructuredOutputs

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "kind": {"enum": ["x", "y"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "a regular expression": ({"regex": "[a-c]{3}-[0-9]{1,4}x"}, "[a-c]{3}-[0-9]{1,4}x"),
    "a choice": ({"choice": ["yes", 'no "é"\n']}, 'yes|no "é"\n'),
    "Lark": ({"grammar": 'start: "a" | "b" start'}, "b*a"),
    "GBNF": ({"grammar": 'root ::= "a" | "b" root'}, "b*a"),
    "no whitespace": ({"json": PERSON, "disable_any_whitespace": True}, r"\{\"[^ ]*\}"),
    "own whitespace": ({"json": PERSON, "whitespace_pattern": "_"}, r"\{[^ ]*\}"),
    "a schema as text": ({"json": json.dumps({"const": "é"})}, '"é"'),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("bytes")
    save_tiny_llama(folder)
    settings: dict[str, Any] = {"dtype": "float32", "load_format": "dummy", "max_num_seqs": 8}
    with LLM(str(folder), kv_memory_gib=0.05, check_integrity=True, **settings) as llm:
        yield llm


def ask(llm: LLM, form: dict[str, Any], count: int = 4, **sampling: Any) -> list[RequestOutput]:
    """Several answers of that form."""
    usual = {"max_tokens": 200, "structured_outputs": form}
    params = [SamplingParams(**{**usual, "seed": seed, **sampling}) for seed in range(count)]
    return llm.generate(["hello"] * count, params)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_have_the_form(llm: LLM, kind: str) -> None:
    form, pattern = KINDS[kind]
    for output in ask(llm, form):
        [choice] = output.outputs
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.text), choice.text


def test_answers_validate_and_differ(llm: LLM) -> None:
    answers = [json.loads(o.outputs[0].text) for o in ask(llm, {"json": PERSON})]
    for answer in answers:
        jsonschema.validate(answer, PERSON)
    assert len({str(answer) for answer in answers}) > 1


def test_any_object(llm: LLM) -> None:
    for output in ask(llm, {"json_object": True}, max_tokens=400):
        if output.outputs[0].finish_reason == "stop":
            assert isinstance(json.loads(output.outputs[0].text), dict)


def test_answers_are_complete_where_their_tokens_run_out(llm: LLM) -> None:
    """They are what they would have been, but for their last tokens; what ends in time is not."""
    form = {"json": {"type": "array", "items": {"type": "string"}}}
    whole = [o.outputs[0] for o in ask(llm, form, 6, max_tokens=40)]
    cut = [
        o.outputs[0]
        for o in ask(llm, form | {"complete_within_max_tokens": False}, 6, max_tokens=40)
    ]
    assert {(c.finish_reason, c.stop_reason) for c in cut} >= {("length", None)}
    for one, other in zip(whole, cut, strict=True):
        jsonschema.validate(json.loads(one.text), form["json"])
        if other.finish_reason == "stop":
            assert one == other
        else:
            assert (one.finish_reason, one.stop_reason) == ("stop", "max_tokens")
            assert one.token_ids[:30] == other.token_ids[:30]


def test_requests_with_and_without_share_their_steps(llm: LLM) -> None:
    """What the others are asked changes no answer."""
    free = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    form = {"structured_outputs": {"regex": "[ab]{30}"}}
    bound = SamplingParams(max_tokens=30, seed=5, **form)
    alone = [llm.generate("abc", params)[0].outputs[0].token_ids for params in (free, bound)]
    params = [free, bound, SamplingParams(max_tokens=7, seed=5, **form)]
    together = [o.outputs[0] for o in llm.generate(["abc"] * 3, params)]
    assert [choice.token_ids for choice in together[:2]] == alone
    assert together[2].token_ids == alone[1][:7]
    assert together[2].finish_reason == "length"


def test_several_choices_are_matched_each_by_itself(llm: LLM) -> None:
    params = SamplingParams(n=5, max_tokens=50, structured_outputs={"regex": "[a-z]{5,9}!"})
    [output] = llm.generate("hello", params)
    texts = [choice.text for choice in output.outputs]
    assert all(re.fullmatch("[a-z]{5,9}!", text) for text in texts)
    assert len(set(texts)) == 5


def test_an_answer_ends_with_the_grammar_whatever_min_tokens_say(llm: LLM) -> None:
    for output in ask(llm, {"choice": ["ab"]}, count=1, min_tokens=9, ignore_eos=True):
        assert output.outputs[0].text == "ab"
        assert output.outputs[0].finish_reason == "stop"


def test_min_tokens_put_off_an_end_that_the_grammar_allows(llm: LLM) -> None:
    short, long = (
        [o.outputs[0] for o in ask(llm, {"regex": "a*"}, 8, min_tokens=n)] for n in (0, 40)
    )
    assert min(len(choice.text) for choice in short) < 40
    assert all(len(choice.text) >= 40 for choice in long)


def test_ignoring_eos_goes_on_while_the_grammar_does(llm: LLM) -> None:
    for output in ask(llm, {"regex": "a*"}, ignore_eos=True, max_tokens=50):
        assert output.outputs[0].text == "a" * 50
        assert output.outputs[0].finish_reason == "length"


def test_stop_strings_and_tokens_cut_a_form(llm: LLM) -> None:
    [output] = ask(llm, {"regex": "abcd"}, count=1, stop=["c"])
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("ab", "c")
    [letter] = llm.get_tokenizer().encode("d")
    [output] = ask(llm, {"regex": "abcd"}, count=1, stop_token_ids=[letter])
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("abc", letter)


def test_what_leaves_no_token_ends_that_request_alone(llm: LLM) -> None:
    [letter] = llm.get_tokenizer().encode("z")
    form = {"structured_outputs": {"choice": ["ab", "cd"]}, "max_tokens": 5}
    params = [SamplingParams(allowed_token_ids=[letter], **form), SamplingParams(**form)]
    broken, sound = llm.generate(["hello"] * 2, params)
    assert broken.error_code == "constraint_failed"
    assert "structured_outputs: no token is left that may stand at position 5" in str(broken.error)
    assert sound.outputs[0].text in ("ab", "cd")


def test_biases_choose_among_what_is_allowed(llm: LLM) -> None:
    letters = llm.get_tokenizer().encode("xyz")
    bias = {letters[0]: 100, letters[2]: 90}  # x is likelier, but not allowed
    for output in ask(llm, {"regex": "[yz]{9}"}, count=1, logit_bias=bias):
        assert output.outputs[0].text == "z" * 9


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    [output] = ask(llm, {"choice": ["ab"]}, count=1, logprobs=2)
    assert output.outputs[0].logprobs is not None
    for entry, token_id in zip(
        output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
    ):
        assert entry[token_id].logprob < -0.01  # not 0, as of the only token that was allowed


TEXT = {"type": "string"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "needs exactly one of json, regex, choice, grammar, json_object, not none"),
    "two kinds": ({"regex": "a", "json_object": True}, "not regex and json_object"),
    "no such kind": ({"xml": "a"}, "Unexpected keyword"),
    "a false json_object": ({"json_object": False}, "not none"),
    "a broken expression": ({"regex": "(a"}, "regex: .*unclosed group"),
    "looking around": ({"regex": "(?=a)b"}, "look-around"),
    "no choices": ({"choice": []}, "at least 1 item"),
    "too many choices": ({"choice": ["a"] * 2000}, "at most 1024 items"),
    "an empty choice": ({"choice": ["a", ""]}, "at least 1 character"),
    "a long expression": ({"regex": "a" * 20_000}, "at most 16384 characters"),
    "a rule that is missing": ({"grammar": "start: other"}, 'grammar: .*unknown name: "other"'),
    "GBNF that is broken": ({"grammar": "root ::= ("}, "grammar: Expected"),
    "a schema that is a list": ({"json": "[1]"}, "json: a schema is an object"),
    "a schema that is no JSON": ({"json": "{"}, "json: the schema is not JSON"),
    "a schema with NaN": ({"json": {"const": float("nan")}}, "cannot be written as JSON"),
    "a large schema": ({"json": {"const": "a" * MAX_SCHEMA_BYTES}}, "at most 131072 bytes"),
    "a wrong type": ({"json": {"type": "no"}}, "json: Invalid type: no"),
    "a lost reference": ({"json": {"$ref": "#/$defs/a"}}, "json: .*does not exist"),
    "nothing between": ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
    "options of the library": ({"json": {"x-guidance": {}}}, "'x-guidance' at / is not"),
    "whitespace in no JSON": ({"regex": "a", "whitespace_pattern": " "}, "is for JSON"),
    "whitespace twice": (
        {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
        "exclude each other",
    ),
    "an unknown format": (
        {"json": {"properties": {"a": {"items": {"type": "string", "format": "phone"}}}}},
        "json: Unknown format: phone, at /properties/a/items",
    ),
    "a wrong value in a definition": (
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"pattern": "(", **TEXT}]}}}},
        r"json: regex parse error: unclosed group, at /\$defs/a/anyOf/0",
    ),
    "no schema": ({"json": {"properties": {"a": 3}}}, "json: schema must be .*, at /properties/a"),
    "an unknown keyword below": (
        {"json": {"properties": {"a/b": {"items": [{}, {"anyOf": [{"not": {}}]}]}}}},
        "json: the keyword 'not' at /properties/a~1b/items/1/anyOf/0 is not supported",
    ),
    "a keyword that says something elsewhere": (
        {"json": {"uniqueItems": False, "items": {"uniqueItems": True}}},
        "json: the keyword 'uniqueItems' at /items is not supported",
    ),
    "a keyword that is a name, too": (
        {"json": {"properties": {"contains": {"uniqueItems": True}}, "enum": [{"contains": 1}]}},
        "json: the keyword 'uniqueItems' at /properties/contains is not supported",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_when_it_is_said(case: str) -> None:
    form, message = WRONG[case]
    with pytest.raises(ValidationError, match=message) as caught:
        SamplingParams(structured_outputs=form)
    assert caught.value.errors()[0]["loc"][0] == "structured_outputs"


def test_a_schema_that_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(ValidationError, match="nested deeper than 64 levels"):
        SamplingParams(structured_outputs={"json": schema})


IDLE: list[dict[str, Any]] = [
    {"uniqueItems": False},
    {"propertyNames": {}, "unevaluatedProperties": True, "unevaluatedItems": {}},
    {"dependentRequired": {}, "dependentSchemas": {}, "dependencies": {}},
    {"not": False},
    {"if": {"type": "string"}},
    {"then": {"type": "string"}, "else": {"type": "null"}},
    {"minContains": 2, "maxContains": 3},
]


@pytest.mark.parametrize("idle", IDLE, ids=lambda idle: next(iter(idle)))
def test_keywords_that_say_nothing_are_taken(idle: dict[str, Any]) -> None:
    schema = {"allOf": [{**PERSON, **idle}], "$defs": {"a": idle}}
    plain = StructuredOutputs(json={"allOf": [PERSON], "$defs": {"a": {}}})
    assert StructuredOutputs(json=schema).text == plain.text
    for value in (*idle, 1, "a", [1, 1], [], {"a": 1}, None):  # none is refused for these words
        jsonschema.Draft202012Validator(idle).validate(value)


def test_it_travels_and_compares() -> None:
    params = SamplingParams(structured_outputs={"json": PERSON})
    assert pickle.loads(pickle.dumps(params)) == params
    assert params.structured_outputs == StructuredOutputs(json=PERSON)
    grammar = params.spec(0, (2,)).grammar
    assert grammar is not None
    assert len(pickle.dumps(grammar)) < 500
    assert SamplingParams().spec(0, (2,)).grammar is None


def test_answers_of_random_schemas_validate(llm: LLM) -> None:
    """At temperature 1, from a model of noise: whatever ends is valid."""
    schemas: list[dict[str, Any]] = []
    params: list[SamplingParams] = []
    for number, schema in enumerate(random_schemas(60, seed=7)):
        try:
            form = StructuredOutputs(json=schema)
        except ValidationError:
            continue
        schemas.append(schema)
        params.append(SamplingParams(max_tokens=150, seed=number, structured_outputs=form))
    outputs = llm.generate(["JSON: "] * len(params), params)
    num_ended = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.error is None, (schema, output.error)
        if output.outputs[0].finish_reason == "stop":
            num_ended += 1
            jsonschema.validate(json.loads(output.outputs[0].text), schema)
    assert num_ended > len(schemas) / 2
