"""A needle in a haystack: one fact at a given depth of a long text, asked for at its end.

The test is Kamradt's (2023); keys and values are of the kind that RULER uses (arXiv 2404.06654,
section 3). The wording is our own, short enough for small models to follow.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.evaluation.prompts.haystack import Split
from saqqara.evaluation.prompts.prompt_maker import PromptMaker, settings_of
from saqqara.evaluation.prompts.words import draw_key, draw_number
from saqqara.evaluation.result import Result
from saqqara.evaluation.session import Session

from .question import Question, ask

FACT = "\nRemember this: the magic number of {key} is {value}.\n"
QUESTION = "\n\nWhat is the magic number of {key}?"
ANSWER = "The magic number of {key} is"
MAX_TOKENS = 16


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
        maker = PromptMaker.load(tokenizer, self.haystack, self.split)
        generator = np.random.default_rng(self.seed)
        return [
            needle_question(maker, length, depth, generator)
            for length in self.lengths
            for depth in self.depths
            for _ in range(self.num_samples)
        ]

    def run(self, session: Session) -> Result:
        """Ask for every needle; the score is 1 where the answer holds the value, else 0."""
        return ask(session, self.name, settings_of(self), self.questions(session.tokenizer))


def needle_question(
    maker: PromptMaker, num_tokens: int, depth: float, generator: np.random.Generator
) -> Question:
    """One prompt of exactly `num_tokens` tokens.

    Raises:
        ValueError: there is no room for a text, or the text is too short.
    """
    while True:
        key, value = draw_key(generator), draw_number(generator)
        facts = [(depth, FACT.format(key=key, value=value))]
        texts = QUESTION.format(key=key), ANSWER.format(key=key)
        token_ids = maker.hidden(num_tokens, facts, texts, (key, value), generator)
        if token_ids is not None:
            details = {"length": num_tokens, "depth": depth, "key": key}
            return Question(token_ids, (value,), f"{num_tokens} tokens", MAX_TOKENS, details)
