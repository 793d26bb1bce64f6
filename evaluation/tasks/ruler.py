"""Generated tasks in the style of RULER (arXiv 2404.06654): what context length is really used."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.evaluation.prompts.haystack import Split
from saqqara.evaluation.prompts.prompt_maker import PromptMaker, settings_of
from saqqara.evaluation.result import Result
from saqqara.evaluation.session import Session

from .question import Question, ask
from .ruler_tasks import TASKS


@dataclass(frozen=True, slots=True)
class RulerTask:
    """Every task at every length, several prompts each.

    Attributes:
        tasks: names in `ruler_tasks.TASKS`.
        lengths: of prompts, in tokens, chat template and beginning of the answer included.
        num_samples: prompts of each task and length.
        seed: of haystacks, keys, values and words.
        haystack: folder with texts, or None for the topics of `pydoc`.
        split: the half of the text.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (2048,)
    num_samples: int = 5
    seed: int = 0
    haystack: Path | None = None
    split: Split = "tune"

    name = "ruler"

    def questions(self, tokenizer: Tokenizer) -> list[Question]:
        """The prompts; each task has random numbers of its own, whatever tasks come with it.

        Raises:
            ValueError: an unknown task, or a length that is too short for one.
        """
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks: unknown {task!r}; known: {', '.join(TASKS)}")
        maker = PromptMaker.load(tokenizer, self.haystack, self.split)
        found = []
        for task in self.tasks:
            generator = np.random.default_rng([self.seed, list(TASKS).index(task)])
            for length in self.lengths:
                found += [TASKS[task](maker, length, generator) for _ in range(self.num_samples)]
        return found

    def run(self, session: Session) -> Result:
        """Ask all; the score is the share of the reference strings that the answer holds."""
        return ask(session, self.name, settings_of(self), self.questions(session.tokenizer))
