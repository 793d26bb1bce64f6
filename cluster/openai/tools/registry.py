"""Names of the parsers of tool calls and of thoughts, and which of them fits a model.

A parser is a class in a file of its own in `formats` and a line in `TOOL_PARSERS`; it is imported
when it is first used.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from .reader import ParserType

_FORMATS = "saqqara.cluster.openai.formats"

AUTO = "auto"
NONE = "none"

TOOL_PARSERS: Mapping[str, tuple[str, str]] = {
    "hermes": ("hermes", "HermesParser"),
    "llama3_json": ("llama3_json", "Llama3JsonParser"),
    "mistral": ("mistral", "MistralParser"),
    "qwen3_coder": ("qwen3_coder", "Qwen3CoderParser"),
}
# What a chat template must have for the parser to be chosen; the first that fits counts.
_TOOL_SIGNS = (
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("<|start_header_id|>ipython", "llama3_json"),
)


@dataclass(frozen=True, slots=True)
class ReasoningParser:
    """How a model's thoughts are told from its answer.

    Args:
        name: as in `--reasoning-parser`.
        always_open: answers begin within the thoughts, whether or not the prompt has begun them.
    """

    name: str
    always_open: bool


REASONING_PARSERS: Mapping[str, ReasoningParser] = {
    "deepseek_r1": ReasoningParser("deepseek_r1", always_open=True),
    "qwen3": ReasoningParser("qwen3", always_open=False),
}
_REASONING_SIGNS = (("<\uff5cAssistant\uff5c>", "deepseek_r1"), ("", "qwen3"))
_THOUGHTS_END = "</think>"


def tool_parser(name: str, template: str | None) -> tuple[str | None, str]:
    """The name of the parser of tool calls, and why it is this one; None for none.

    Args:
        name: a parser's, `none`, or `auto` for the one that fits the template.
        template: the model's chat template.

    Raises:
        ValueError: there is no parser of that name.
    """
    _check("tool_call_parser", name, TOOL_PARSERS)
    if name != AUTO:
        return (None if name == NONE else name), "as set"
    for sign, parser in _TOOL_SIGNS:
        if sign in (template or ""):
            return parser, f"the chat template has {sign!r}"
    return None, "the chat template has no sign of a known format"


def tool_parser_type(name: str) -> ParserType:
    """The class of a parser, by its name."""
    module, kind = TOOL_PARSERS[name]
    return cast(ParserType, getattr(importlib.import_module(f"{_FORMATS}.{module}"), kind))


def reasoning_parser(name: str, template: str | None) -> tuple[ReasoningParser | None, str]:
    """How thoughts are read, and why so; None for a model without thoughts.

    Raises:
        ValueError: there is no parser of that name.
    """
    _check("reasoning_parser", name, REASONING_PARSERS)
    if name != AUTO:
        return REASONING_PARSERS.get(name), "as set"
    if _THOUGHTS_END not in (template or ""):
        return None, f"the chat template has no {_THOUGHTS_END!r}"
    chosen = next(parser for sign, parser in _REASONING_SIGNS if sign in (template or ""))
    return REASONING_PARSERS[chosen], f"the chat template has {_THOUGHTS_END!r}"


def _check(field: str, name: str, known: Mapping[str, object]) -> None:
    if name not in (AUTO, NONE, *known):
        names = ", ".join([AUTO, NONE, *known])
        raise ValueError(f"{field}: {name!r} is not known; there are {names}")
