"""Prompts of an exact length: facts in a haystack, a question, and the beginning of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saqqara.cluster.engine.tokenizer import Tokenizer

from .chat_frame import ChatFrame
from .haystack import Haystack, Split

INTRODUCTION = (
    "Magic numbers are hidden in the text below. Remember them; I will ask for them afterwards.\n\n"
)
MIN_HAYSTACK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """A tokenizer, its chat template and a text to hide things in."""

    tokenizer: Tokenizer
    frame: ChatFrame
    hay: Haystack

    @classmethod
    def load(cls, tokenizer: Tokenizer, folder: Path | None, split: Split) -> "PromptMaker":
        """Of a folder's texts (None: the topics of `pydoc`) and one half of them.

        Raises:
            ValueError: as `Haystack.load` and `ChatFrame.of`.
        """
        return cls(tokenizer, ChatFrame.of(tokenizer), Haystack.load(tokenizer, folder, split))

    def encode(self, text: str) -> list[int]:
        """Token ids of a part of a message."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def num_tokens(self, message: str, answer_prefix: str) -> int:
        """Tokens of a prompt."""
        return self.frame.num_tokens + len(self.encode(message)) + len(self.encode(answer_prefix))

    def wrap(self, message: str, answer_prefix: str) -> tuple[int, ...]:
        """The prompt of a message and the beginning of its answer."""
        return self.frame.wrap(self.encode(message), self.encode(answer_prefix))

    def hidden(
        self,
        num_tokens: int,
        facts: Sequence[tuple[float, str]],
        ask: tuple[str, str],
        secrets: Sequence[str],
        generator: np.random.Generator,
        introduction: str = INTRODUCTION,
    ) -> tuple[int, ...] | None:
        """A prompt of exactly `num_tokens` tokens with facts in a piece of the haystack.

        Args:
            num_tokens: of the prompt.
            facts: depth in the text (0 to 1) and text of each.
            ask: question after the text, and beginning of the answer.
            secrets: strings that must not stand in the haystack by chance.
            generator: draws the piece.
            introduction: put before the text.

        Returns:
            The prompt, or None when the haystack holds a secret: then others have to be drawn.

        Raises:
            ValueError: there is no room for a text, or the text is too short.
        """
        pieces = [(depth, self.encode(fact)) for depth, fact in facts]
        head, tail, prefix = (self.encode(text) for text in (introduction, *ask))
        num_fixed = self.frame.num_tokens + sum(
            len(part) for part in (head, tail, prefix, *(ids for _, ids in pieces))
        )
        piece = self.hay.piece(haystack_room(num_tokens, num_fixed), generator)
        text = self.tokenizer.decode(piece.token_ids)
        if any(secret in text for secret in secrets):
            return None
        return self.frame.wrap([*head, *piece.insert(pieces), *tail], prefix)


def haystack_room(num_tokens: int, num_fixed: int) -> int:
    """Tokens of text that a prompt has room for beside its fixed parts.

    Raises:
        ValueError: too few to hide anything.
    """
    room = num_tokens - num_fixed
    if room < MIN_HAYSTACK_TOKENS:
        raise ValueError(
            f"lengths: {num_tokens} tokens leave no room for a text beside the {num_fixed} of "
            f"template, facts and question; give at least {num_fixed + MIN_HAYSTACK_TOKENS}"
        )
    return room


def settings_of(task: Any) -> dict[str, Any]:
    """The fields of a task as JSON values."""
    found = {}
    for name in task.__dataclass_fields__:
        value = getattr(task, name)
        found[name] = str(value) if isinstance(value, Path) else value
        if isinstance(value, tuple):
            found[name] = list(value)
    return found
