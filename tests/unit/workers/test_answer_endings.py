"""Answers are completed within their tokens, and what would end in time is not touched."""

import json
from collections.abc import Sequence
from random import Random
from typing import Any

import jsonschema
import pytest
from support.byte_llama import save_tiny_llama

from saqqara.cluster.structured.outputs import StructuredOutputs
from saqqara.workers.grammar.compiler import Compiler, token_table
from saqqara.workers.grammar.endings import MAX_TOKENS, Endings
from saqqara.workers.grammar.matchers import Matchers
from saqqara.workers.plan import Grammar

EOS, SIZE = 0, 257  # of a tiny model of bytes: the token that ends a text, and how many there are

OPEN: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "sizes": {"type": "array", "items": {}}},
    "required": ["name"],
}
PLAIN = {*map(chr, range(32, 127))} - {*'"\\]}'}
BEGUN: dict[str, tuple[dict[str, Any], str]] = {
    "nothing yet": (OPEN, ""),
    "text": (OPEN, '{"name": "]} and'),
    "an escape": (OPEN, '{"name": "\\'),
    "lists in a list": (OPEN, '{"name": "", "sizes": [[1, [-'),
    "a name": ({"type": "object", "patternProperties": {"[0-9]$": {"type": "null"}}}, '{"an'),
    "a multiple": ({"type": "array", "items": {"type": "integer", "multipleOf": 12}}, "[12, 1"),
    "a pattern": ({"type": "string", "pattern": "x"}, '"abc'),
    "several patterns": (
        {"type": "array", "minItems": 3, "items": {"type": "string", "pattern": "^[A-Z][a-z]+$"}},
        '["Ab',
    ),
    "an address": ({"type": "string", "format": "email"}, '"who'),
    "a date": ({"type": "string", "format": "date"}, '"20'),
    "a long text": ({"type": "string", "minLength": 30}, '"'),
    "a value of several": ({"anyOf": [{"const": "a b"}, {"type": "boolean"}]}, ""),
}


class Bed:
    """Grammars for a model whose tokens are single bytes."""

    def __init__(self, folder: str) -> None:
        self.compiler = Compiler(folder, SIZE)
        self.endings = self.compiler.endings((EOS,))
        self._table = token_table(folder, SIZE, (EOS,))

    def tokens(self, text: str) -> list[int]:
        return list(self._table.greedy_tokenize(text))

    def text(self, token_ids: Sequence[int]) -> str:
        return str(self._table.decode_str([token for token in token_ids if token != EOS]))

    def write(self, grammar: Grammar, wanted: list[int], most: int, known: int = 0) -> list[int]:
        """The answer, of `most` tokens, of a model that wants these and has some already."""
        matchers = Matchers(self.compiler)
        matchers.open(0, grammar, wanted[:known], most)
        written = wanted[:known]
        while len(written) < most:
            sampled = wanted[len(written)] if len(written) < len(wanted) else EOS
            written.append(matchers.choose(0, sampled))
            if matchers.advance(0, written[-1]):
                break
        return written


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    path = tmp_path_factory.mktemp("bytes")
    save_tiny_llama(path)
    return Bed(str(path))


def of_json(schema: dict[str, Any]) -> Grammar:
    return Grammar(StructuredOutputs(json=schema).text, (EOS,))


@pytest.mark.parametrize("case", BEGUN)
def test_an_ending_completes_what_is_begun(bed: Bed, case: str) -> None:
    schema, begun = BEGUN[case]
    matcher = bed.compiler.matcher(of_json(schema))
    assert matcher.consume_tokens(bed.tokens(begun))
    found = bed.endings.find(matcher, MAX_TOKENS)
    assert found is not None
    answer = json.loads(begun + bed.text(found))
    jsonschema.validate(answer, schema, format_checker=jsonschema.FormatChecker())
    assert bed.endings.is_ending(matcher, found)


def test_what_ends_in_time_is_not_touched(bed: Bed) -> None:
    wanted = bed.tokens('{"name": "some text", "sizes": [1, {"a": [2]}]}')
    assert bed.write(of_json(OPEN), wanted, len(wanted)) == wanted


def test_an_answer_is_complete_however_few_tokens_it_has(bed: Bed) -> None:
    """It goes on as it would as long as it can: what is added is an ending."""
    wanted = bed.tokens('{"name": "some text", "sizes": [1, {"a": [2]}]}')
    for most in range(len('{"name":""}'), len(wanted)):
        written = bed.write(of_json(OPEN), wanted, most)
        assert len(written) <= most
        jsonschema.validate(json.loads(bed.text(written)), OPEN)
        same = next(i for i, (a, b) in enumerate(zip(written, wanted, strict=False)) if a != b)
        assert same >= most - 12  # the longest ending that is missing anything is `{"name":""}`


def test_a_resumed_answer_ends_as_it_would_have(bed: Bed) -> None:
    wanted = bed.tokens('{"name": "some text that goes on and on')
    grammar, most = of_json(OPEN), 30
    whole = bed.write(grammar, wanted, most)
    for known in range(most - 2):
        assert bed.write(grammar, wanted, most, known) == whole


def test_random_answers_are_complete(bed: Bed) -> None:
    """Whatever a model writes that has no idea of an end."""
    rng = Random(0)
    for schema, _ in BEGUN.values():
        matchers = Matchers(bed.compiler)
        matchers.open(0, of_json(schema), [], 60)
        written: list[int] = []
        while not written or not matchers.advance(0, written[-1]):
            masks, _errors = matchers.masks([0])
            assert masks is not None
            octets = masks.words.view("uint8")[0]
            allowed = [t for t in range(SIZE) if octets[t // 8] >> (t % 8) & 1]
            plain = [t for t in allowed if bed.text([t]) in PLAIN]
            written.append(matchers.choose(0, rng.choice(plain or allowed)))
            if len(written) == 60:
                break
        jsonschema.validate(json.loads(bed.text(written)), schema)


def test_an_answer_that_is_complete_at_any_place_is_cut_there(bed: Bed) -> None:
    """Nothing is won by an end: the reason says that there would be more."""
    grammar = Grammar(StructuredOutputs(regex="[a-z]*").text, (EOS,))
    assert bed.write(grammar, bed.tokens("abcdefgh"), 5) == bed.tokens("abcde")
    grammar = Grammar(StructuredOutputs(regex="a(b{50})?").text, (EOS,))
    assert bed.write(grammar, bed.tokens("abbbbbbbbb"), 5) == [*bed.tokens("a"), EOS]


def test_what_cannot_end_in_time_is_left_alone_and_costs_little(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = of_json({"type": "array", "items": {"const": 1}, "minItems": 10_000})
    searches: list[int] = []
    find = Endings.find

    def counted(self: Endings, matcher: Any, most: int) -> tuple[int, ...] | None:
        searches.append(most)
        return find(self, matcher, most)

    monkeypatch.setattr(Endings, "find", counted)
    wanted = bed.tokens("[" + "1," * 100)
    assert bed.write(grammar, wanted, 150) == wanted[:150]
    assert len(searches) <= 2 * MAX_TOKENS.bit_length()
