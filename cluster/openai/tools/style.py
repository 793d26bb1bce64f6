"""How one model writes thoughts and calls: chosen once, asked for every request."""

import logging
from dataclasses import dataclass

from saqqara.cluster.openai.formats.forced import NamedParser, RequiredParser

from .choice import NO_TOOLS, ToolUse
from .reader import PLAIN, AnswerFormat, ParserType
from .registry import AUTO, ReasoningParser, reasoning_parser, tool_parser, tool_parser_type
from .thoughts import BEGIN, END

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """What is known of a model's answers.

    Attributes:
        calls: reads its tool calls; None where nobody knows how.
        reasoning: how its thoughts are told; None for a model without thoughts.
    """

    calls: ParserType | None = None
    reasoning: ReasoningParser | None = None

    @classmethod
    def of(cls, template: str | None, tool_call_parser: str, reasoning: str) -> "ChatStyle":
        """The style of a model.

        Args:
            template: its chat template.
            tool_call_parser: a parser's name, `auto` or `none`.
            reasoning: the same of the parser of thoughts.

        Raises:
            ValueError: there is no parser of that name; names the setting.
        """
        name, why = tool_parser(tool_call_parser, template)
        thoughts, why_thoughts = reasoning_parser(reasoning, template)
        for what, chosen, reason, setting in (
            ("tool calls", name, why, tool_call_parser),
            ("thoughts", thoughts and thoughts.name, why_thoughts, reasoning),
        ):
            if setting == AUTO and template is not None:
                logger.info("parser of %s: %s (%s)", what, chosen or "none", reason)
        return cls(None if name is None else tool_parser_type(name), thoughts)

    def check(self, use: ToolUse) -> None:
        """Raise a ValueError where calls would not be understood."""
        if use.mode == "auto" and self.calls is None:
            raise ValueError(
                "tools: it is not known how this model writes calls; start with a "
                "--tool-call-parser, or send tool_choice='none', 'required' or the name of one"
            )

    def markers(self, use: ToolUse) -> tuple[str, ...]:
        """Texts that must be visible in the answer, also where they are special tokens."""
        thoughts = () if self.reasoning is None else (BEGIN, END)
        calls = self.calls.markers if self.calls is not None and use.mode == "auto" else ()
        return (*thoughts, *calls)

    def answer_format(
        self,
        use: ToolUse = NO_TOOLS,
        *,
        prompt_end: str = "",
        is_held: bool = False,
        shows_thoughts: bool = True,
    ) -> AnswerFormat:
        """How the answers to a chat are read.

        Args:
            use: of tools.
            prompt_end: the text of the prompt's last tokens, special ones by their names.
            is_held: the answer is held to a form from its first token on, so it has no thoughts.
            shows_thoughts: they are wanted.
        """
        parser = {
            "none": None,
            "auto": self.calls,
            "required": RequiredParser,
            "named": NamedParser,
        }[use.mode]
        thinks = self.reasoning is not None and not is_held and not use.is_forced
        if parser is None and not thinks:
            return PLAIN
        return AnswerFormat(
            parser,
            use.schemas,
            use.max_calls,
            thinks=thinks,
            is_open=thinks and self._is_open(prompt_end),
            shows_thoughts=shows_thoughts,
            is_named=use.mode == "named",
        )

    def _is_open(self, prompt_end: str) -> bool:
        """Whether an answer begins within the thoughts."""
        end = prompt_end.rstrip()
        if end.endswith(BEGIN):
            return True
        assert self.reasoning is not None
        return self.reasoning.always_open and not end.endswith(END)
