"""What an answer must look like: JSON of a schema, a regular expression, a choice or a grammar.

llguidance matches answers token by token; here its form of the grammar is made and checked, before
anything is queued. This module imports it only where such a request is made.
"""

import json as json_format
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from saqqara.configs.json_text import parse_json
from saqqara.workers.grammar.compiler import first_line
from saqqara.workers.grammar.trial import shared_trial

from .keywords import keywords, schemas_within, without_idle
from .narrowing import narrowed

MAX_SCHEMA_BYTES = 128 << 10
MAX_SCHEMA_DEPTH = 64
MAX_REGEX_CHARS = 16 << 10
MAX_GRAMMAR_CHARS = 128 << 10
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 4096
MAX_PATTERN_CHARS = 128
_MAX_SEARCHED_CHARS = 256 << 10  # in all schemas within one that are looked at for an error
_LOOK_CHARS = 64  # what a look costs beside
_STRICT = {"lenient": False}  # what cannot be enforced is an error
KINDS = ("json", "regex", "choice", "grammar", "json_object")
DEFAULT_WHITESPACE = "[ ]?"  # at most one space: a small model may else write blanks without end

# How llguidance begins to say that it does not take a keyword, which one (in the text, if none is
# here), and what we add.
_REFUSALS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Unimplemented keys: ", (), "; leave it out"),
    ("oneOf constraints", ("oneOf",), " where its schemas do not exclude each other; say anyOf"),
    (
        "min/maxProperties only",
        ("minProperties", "maxProperties"),
        " unless all names in properties are required; leave it out",
    ),
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StructuredOutputs:
    """The form of an answer; names and meaning are those of vLLM's. Exactly one kind is given.

    A bad value is a `ValueError` that names the field, and of a schema the keyword and where it
    stands, as a JSON pointer.

    Attributes:
        json: a JSON schema, as an object or as text. The answer is JSON that it validates.
        regex: a regular expression (of Rust's crate, no look-around) that the whole answer matches.
        choice: the answers that there are.
        grammar: a context-free grammar, Lark's or GBNF (`root ::= ...`).
        json_object: any JSON object.
        whitespace_pattern: what may stand between the tokens of JSON, a regular expression;
            default: one space or none.
        disable_any_whitespace: nothing may.
        complete_within_max_tokens: where tokens run out, the answer takes the shortest ending that
            is found to complete it. Without, it is cut wherever it is.
    """

    json: dict[str, Any] | str | None = None
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)] | None = None
    choice: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)], ...],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None
    json_object: bool | None = None
    whitespace_pattern: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)] | None = None
    disable_any_whitespace: bool = False
    complete_within_max_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, given: Any) -> Any:
        """Leave one unknown field to be refused: a body may have a million."""
        if not isinstance(given, Mapping):
            return given
        unknown = [name for name in given if name not in cls.__dataclass_fields__]
        more = set(unknown[1:])
        return {name: value for name, value in given.items() if name not in more}

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"needs exactly one of {', '.join(KINDS)}, not {found}")
        if self.whitespace_pattern is not None:
            if self.disable_any_whitespace:
                raise ValueError("whitespace_pattern and disable_any_whitespace exclude each other")
            if given[0] not in ("json", "json_object"):
                raise ValueError(f"whitespace_pattern is for JSON, not for {given[0]}")
        error = _error_of(self.text)
        if error is not None:
            raise ValueError(self._explained(given[0], error))
        return self

    @cached_property
    def text(self) -> str:
        """The grammar as workers get it.

        Raises:
            ValueError: it cannot be told.
        """
        from llguidance import LLMatcher

        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.choice is not None:
            words = " | ".join(json_format.dumps(word, allow_nan=False) for word in self.choice)
            return LLMatcher.grammar_from_lark(f"start: {words}")
        if self.grammar is not None:
            return LLMatcher.grammar_from_lark(_as_lark(self.grammar))
        options = {
            "whitespace_flexible": not self.disable_any_whitespace,
            "whitespace_pattern": self.whitespace_pattern or DEFAULT_WHITESPACE,
            **_STRICT,
        }
        if self.disable_any_whitespace:
            del options["whitespace_pattern"]
        schema = without_idle(self._checked_schema)
        texts = [
            LLMatcher.grammar_from_json_schema(written, overrides=options)  # type: ignore[arg-type]
            for written in (_written(narrowed(schema)), _written(schema))
        ]
        return texts[0] if _error_of(texts[0]) is None else texts[1]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the kinds that have one."""
        if self.json is None:
            return {"type": "object"}
        return self.json if isinstance(self.json, dict) else _read_schema(self.json)

    @property
    def _checked_schema(self) -> dict[str, Any]:
        schema = self.schema
        _check_depth(schema)
        try:
            num_bytes = len(_written(schema).encode())
        except (ValueError, TypeError) as error:
            raise ValueError(f"json: the schema cannot be written as JSON: {error}") from None
        if num_bytes > MAX_SCHEMA_BYTES:
            raise ValueError(
                f"json: the schema may have at most {MAX_SCHEMA_BYTES} bytes, not {num_bytes}"
            )
        if "x-guidance" in schema:
            raise ValueError("json: the keyword 'x-guidance' at / is not supported")
        return schema

    def _explained(self, kind: str, error: str) -> str:
        """An error of llguidance, with the place of the keyword that it does not take."""
        if kind != "json":
            return f"{kind}: {error}"
        for start, names, advice in _REFUSALS:
            if not error.startswith(start):
                continue
            names = names or tuple(json_format.loads(error.removeprefix(start)))
            said = keywords(without_idle(self.schema))
            places = [(name, place) for place, name in said if name in names]
            name, place = places[0] if places else (names[0], "/")
            return f"json: the keyword {name!r} at {place} is not supported{advice}"
        return f"json: {error}{_place_of(error, self.schema)}"


def _place_of(error: str, schema: dict[str, Any]) -> str:
    """Where in a schema an error lies: in the innermost part that has it by itself."""
    from llguidance import LLMatcher

    num_left = _MAX_SEARCHED_CHARS
    for place, part in schemas_within(schema):
        if not isinstance(part, Mapping):
            if error.startswith("schema must be") and not isinstance(part, bool):
                return f", at {place}"
            continue
        written = _written(part)
        num_left -= len(written) + _LOOK_CHARS
        if num_left < 0:
            break
        grammar = LLMatcher.grammar_from_json_schema(written, overrides=_STRICT)  # type: ignore[arg-type]
        if _checked(grammar) == error:
            return f", at {place}"
    return ""


def _written(schema: Any) -> str:
    return json_format.dumps(schema, allow_nan=False, separators=(",", ":"))


@lru_cache(maxsize=64)  # the same few schemas come again and again
def _error_of(text: str) -> str | None:
    """What is wrong with a grammar, or None."""
    return _checked(text)


def _checked(text: str) -> str | None:
    error = shared_trial().error_of(text)
    return None if error is None else first_line(error)


def _as_lark(grammar: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # the library's own class, or whatever its parser meets
        raise ValueError(f"grammar: {first_line(str(error))}") from None


def _read_schema(text: str) -> dict[str, Any]:
    if len(text.encode(errors="replace")) > MAX_SCHEMA_BYTES:
        raise ValueError(f"json: the schema may have at most {MAX_SCHEMA_BYTES} bytes")
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise ValueError(f"json: the schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("json: a schema is an object, not another value")
    return schema


def _check_depth(schema: Any) -> None:
    """Raise a ValueError for what is nested too deep to be walked."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise ValueError(f"json: the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
