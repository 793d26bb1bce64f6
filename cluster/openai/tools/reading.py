"""How the answers to a job's chats are read: thoughts and tool calls as the model writes them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from saqqara.cluster.chat import ChatOptions

from .choice import ToolUse
from .reader import AnswerFormat
from .registry import AUTO
from .style import ChatStyle

logger = logging.getLogger(__name__)

_END_CHARS = 64  # of a prompt: enough for the marker that begins the thoughts, and space


class ChatTokenizer(Protocol):
    """The part of a tokenizer that writes chats."""

    @property
    def chat_template(self) -> str | None:
        """Its chat template."""

    def chat_text(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The text of a conversation."""


class ChatReading:
    """Reads chats' answers in the style of a model, whose tokenizer is loaded at the first chat.

    Args:
        load: loads the tokenizer; None where there is none.
        tool_call_parser: a parser's name, `auto` or `none`.
        reasoning_parser: the same of the parser of thoughts.
    """

    def __init__(
        self,
        load: Callable[[], ChatTokenizer] | None = None,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> None:
        self._load = load
        self._parsers = (tool_call_parser, reasoning_parser)

    @cached_property
    def style(self) -> ChatStyle:
        """How the model writes thoughts and calls."""
        template = None if self._tokenizer is None else self._tokenizer.chat_template
        return ChatStyle.of(template, *self._parsers)

    @cached_property
    def _tokenizer(self) -> ChatTokenizer | None:
        """The model's, if it is on this machine; the engine may be on another one."""
        if self._load is None:
            return None
        try:
            return self._load()
        except ValueError as error:
            logger.warning(
                "the chat template cannot be read here, so thoughts and tool calls are told only "
                "as --reasoning-parser and --tool-call-parser say: %s",
                error,
            )
            return None

    def answers(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions,
        use: ToolUse,
        *,
        is_held: bool,
        shows_thoughts: bool,
    ) -> AnswerFormat:
        """How the answers to a chat are read; see `ChatStyle.answer_format`.

        Raises:
            ValueError: tools may be called, and nobody knows how the model does that.
        """
        self.style.check(use)
        end = ""
        if self.style.reasoning is not None and self._tokenizer is not None:
            try:
                end = self._tokenizer.chat_text(messages, options)[-_END_CHARS:]
            except ValueError:  # the engine says the same, in its answer to this row
                end = ""
        return self.style.answer_format(
            use, prompt_end=end, is_held=is_held, shows_thoughts=shows_thoughts
        )
