"""A needle in a haystack: one fact at a given depth of a long text, asked for at its end.

The test is Kamradt's (2023); fact, key and value are of the kind that RULER uses (arXiv 2404.06654,
section 3), in our own words.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saqqara.cluster.tokenizer import Tokenizer

from .chat_frame import ChatFrame
from .haystack import Haystack, Split
from .question import Question, ask
from .result import Result
from .session import Session
from .words import draw_key, draw_number

INTRODUCTION = (
    "Magic numbers are hidden in the text below. Remember them; I will ask for them "
    "afterwards.\n\n"
)
FACT = "\nRemember this: the magic number of {key} is {value}.\n"
QUESTION = "\n\nWhat is the magic number of {key}?"
ANSWER = "The magic number of {key} is"
MAX_TOKENS = 16
MIN_HAYSTACK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """A grid of lengths and depths with several needles at each point.

    Attributes:
        lengths: of prompts, in tokens, chat template and beginning of the answer included.
        depths: where the fact stands, from 0 (start of the text) to 1 (end).
        num_samples: prompts at each length and depth.
        seed: of haystacks, keys and values.
        haystack: folder with texts, or None for the topics of `pydoc`.
        split: the half of the text.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_samples: int = 5
    seed: int = 0
    haystack: Path | None = None
    split: Split = "tune"

    name = "needle"

    def questions(self, tokenizer: Tokenizer) -> list[Question]:
        """The prompts; those of one point come one after another.

        Raises:
            ValueError: a length has no room for a text, or a depth lies outside [0, 1].
        """
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths: must lie in [0, 1], not {list(self.depths)}")
        frame = ChatFrame.of(tokenizer)
        hay = Haystack.load(tokenizer, self.haystack, self.split)
        generator = np.random.default_rng(self.seed)
        return [
            needle_question(tokenizer, frame, hay, length, depth, generator)
            for length in self.lengths
            for depth in self.depths
            for _ in range(self.num_samples)
        ]

    def run(self, session: Session) -> Result:
        """Ask for every needle; the score is 1 where the answer holds the value, else 0."""
        settings = {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "haystack": None if self.haystack is None else str(self.haystack),
            "split": self.split,
        }
        return ask(session, self.name, settings, self.questions(session.tokenizer))


def needle_question(
    tokenizer: Tokenizer,
    frame: ChatFrame,
    hay: Haystack,
    num_tokens: int,
    depth: float,
    generator: np.random.Generator,
) -> Question:
    """One prompt of exactly `num_tokens` tokens.

    Raises:
        ValueError: there is no room for a text, or the text is too short.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    key, value = draw_key(generator), draw_number(generator)
    head, fact = encode(INTRODUCTION), encode(FACT.format(key=key, value=value))
    tail, prefix = encode(QUESTION.format(key=key)), encode(ANSWER.format(key=key))
    num_fixed = frame.num_tokens + sum(map(len, (head, fact, tail, prefix)))
    piece = hay.piece(haystack_room(num_tokens, num_fixed), generator)
    text = tokenizer.decode(piece.token_ids)
    if value in text or key in text:  # found by chance, it would be no needle
        return needle_question(tokenizer, frame, hay, num_tokens, depth, generator)
    message = [*head, *piece.insert([(depth, fact)]), *tail]
    details = {"length": num_tokens, "depth": depth, "key": key}
    token_ids = frame.wrap(message, prefix)
    return Question(token_ids, (value,), f"{num_tokens} tokens", MAX_TOKENS, details)


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
