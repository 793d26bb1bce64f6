"""A conversation as the model's chat template writes it, within bounds.

A template is a program that came with the model, and it meets whatever clients write: it may fail
in any way, or find no end. Either costs the conversation alone. What it holds in memory is not
bounded (`'a' * 10**10` in the template itself): a model's template is trusted so far.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from .tools import check_tools

_TEMPLATE_FILE = "<template>"  # the file of the code that jinja makes of a template
# Lines of the template, calls of anything, and characters written, for a conversation of nothing.
# A usual template takes a few dozen lines per message and writes it once.
MAX_LINES = 200_000
MAX_CALLS = 1_000_000  # compiling a template of 15 kB takes a sixth of it
MAX_CHARS = 1_000_000
_PER_MESSAGE = 1_000
_PER_CHAR = 10
_MAX_REASON_CHARS = 300

# What transformers takes under these names is no variable of the template.
RESERVED_ARGS = frozenset(
    {
        *("self", "conversation", "messages", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)


class Backend(Protocol):
    """The part of a Hugging Face tokenizer that renders conversations."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **settings: Any) -> Any:
        """The text, with `tokenize=False`."""
        ...

    def get_chat_template(
        self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The template that would be used."""
        ...


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is written; names and meaning are those of transformers.

    Args:
        add_generation_prompt: end with the head of the assistant's answer; default: unless the
            final message is continued.
        continue_final_message: leave the final message open, so that the answer goes on with it.
        template_args: variables for the template, e.g. `{"enable_thinking": False}`.
        chat_template: a template instead of the model's own.
        add_special_tokens: put the tokenizer's special tokens around what the template has written.
        tools: what the model may call, in OpenAI's form; see `check_tools`.
        reasoning_effort: a variable of some templates; `none` is also `enable_thinking=False`.

    Raises:
        ValueError: both a new message and a continued one are wanted, a variable is reserved, or a
            tool is none.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    template_args: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    add_special_tokens: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    reasoning_effort: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tuple(check_tools(self.tools)))
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message: the answer either goes on with the final message or "
                "begins a new one; leave add_generation_prompt out, or false"
            )
        for name in self.template_args:
            if name in RESERVED_ARGS:
                raise ValueError(f"chat_template_kwargs: {name!r} is no variable of the template")


def render_chat(
    backend: Backend, messages: Sequence[Mapping[str, Any]], options: ChatOptions
) -> str:
    """The text of a conversation.

    Args:
        backend: the tokenizer.
        messages: checked ones, with plain-text contents.
        options: see `ChatOptions`.

    Raises:
        ValueError: the template refuses the conversation, fails on it or finds no end, or it has no
            place for tools or calls of them.
    """
    _check_place_of_tools(backend, messages, options)
    effort = _effort_args(backend, options)
    begins_answer = options.add_generation_prompt
    if begins_answer is None:
        begins_answer = not options.continue_final_message
    settings: dict[str, Any] = {**effort, **options.template_args}
    if options.chat_template is not None:
        settings["chat_template"] = options.chat_template
    if options.tools:
        settings["tools"] = [dict(tool) for tool in options.tools]
    try:
        with _bounded([*messages, *options.tools]):
            text: str = backend.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=begins_answer,
                continue_final_message=options.continue_final_message,
                tokenize=False,
                **settings,
            )
    except Exception as error:  # whatever a template may do
        raise ValueError(f"messages: {_reason(error)}") from error
    return text


def _check_place_of_tools(
    backend: Backend, messages: Sequence[Mapping[str, Any]], options: ChatOptions
) -> None:
    """Raise a ValueError for tools and calls that a template would leave out without a word."""
    calls = [i for i, message in enumerate(messages) if "tool_calls" in message]
    if not options.tools and not calls:
        return
    tools = [dict(tool) for tool in options.tools] or None
    template = backend.get_chat_template(options.chat_template, tools=tools)
    if tools and not re.search(r"\btools\b", template):
        raise ValueError(
            "tools: the model's chat template has no place for them; start with a --chat-template "
            "that has, or leave them out"
        )
    if calls and "tool_calls" not in template:
        raise ValueError(
            f"messages[{calls[0]}].tool_calls: the model's chat template has no place for them; "
            "start with a --chat-template that has"
        )


def _effort_args(backend: Backend, options: ChatOptions) -> dict[str, Any]:
    """The variables that say how much the model is to think.

    Raises:
        ValueError: the template has no such variable.
    """
    effort = options.reasoning_effort
    if effort is None:
        return {}
    template = backend.get_chat_template(options.chat_template)
    if effort == "none" and "enable_thinking" in template:
        return {"enable_thinking": False}
    if effort == "none" or "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    raise ValueError(
        "reasoning_effort: the model's chat template has no such variable; leave it out, or see "
        "chat_template_kwargs"
    )


def read_template(path: str) -> str:
    """A chat template from a file.

    Raises:
        ValueError: it cannot be read, or is no template.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template: {path} cannot be read: {error}") from None
    except TemplateSyntaxError as error:
        raise ValueError(f"chat_template: {path}:{error.lineno}: {error.message}") from None
    return text


class _EndlessTemplateError(Exception):
    """A template has exceeded its bounds."""


def _reason(error: Exception) -> str:
    from jinja2 import TemplateError

    if isinstance(error, _EndlessTemplateError):
        return f"the model's chat template finds no end: {error}"
    message = str(error)
    if len(message) > _MAX_REASON_CHARS:
        message = message[:_MAX_REASON_CHARS] + "..."
    if isinstance(error, TemplateError):
        return f"the model's chat template refuses: {message}"
    return f"the model's chat template fails: {type(error).__name__}: {message}"


@contextmanager
def _bounded(messages: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Have the template raise `_EndlessTemplateError` beyond its bounds.

    Counting events is the same on a slow machine, and a trace ends loops that write nothing.
    """
    num_chars = num_characters(messages)
    more = _PER_MESSAGE * len(messages) + _PER_CHAR * num_chars
    meter = _Meter(MAX_LINES + more, MAX_CALLS + more, MAX_CHARS + more)
    before = sys.gettrace()
    sys.settrace(meter.call)
    try:
        yield
    finally:
        sys.settrace(before)


def num_characters(value: Any) -> int:
    """About how much there is to read in a JSON value, wherever it stands."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + num_characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(1 + num_characters(item) for item in value)
    return 1


class _Meter:
    """Trace functions that count down."""

    def __init__(self, lines: int, calls: int, chars: int) -> None:
        self._lines = lines
        self._calls = calls
        self._chars = chars

    def call(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._calls -= 1
        if self._calls < 0:
            raise _EndlessTemplateError("it makes too many calls")
        return self.line if frame.f_code.co_filename == _TEMPLATE_FILE else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self._lines -= 1
            if self._lines < 0:
                raise _EndlessTemplateError("it runs too many lines")
        elif event == "return" and isinstance(arg, str):  # also what it yields
            self._chars -= len(arg)
            if self._chars < 0:
                raise _EndlessTemplateError("it writes too much")
        return self.line
