"""Agreement with full retention, token by token along full's own greedy answers.

Each setting is teacher-forced along the answer that `full` gave: at every token it sees the same
past, so one early difference does not count again and again as it does where free-running answers
are compared. Reported are the share of tokens that the setting, too, holds most likely (top-1
agreement), the mean Kullback-Leibler divergence of its distribution from full's (told from the 20
most likely tokens of both: a lower bound, see `divergence`), and the mean difference of the
log-probability of full's token. Full is scored itself, along its own answers: what it lacks to 100%
is the numerical difference between generating and scoring.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saqqara.compression.retention import Retention
from saqqara.evaluation.prompts.chat_frame import ChatFrame
from saqqara.evaluation.prompts.haystack import Haystack, Split
from saqqara.evaluation.prompts.prompt_maker import haystack_room, settings_of
from saqqara.evaluation.result import Outcome, Result
from saqqara.evaluation.session import Session

from .divergence import TOP_TOKENS, divergence

REQUEST = "Read this text.\n\n"
QUESTION = "\n\nExplain in a few sentences what the text above says."


@dataclass(frozen=True, slots=True)
class AgreementTask:
    """Requests to sum up pieces of a text.

    Attributes:
        prompt_tokens: length of each prompt, chat template included.
        max_tokens: of full's answers.
        num_samples: prompts.
        seed: of the pieces.
        haystack: folder with texts, or None for the topics of `pydoc`.
        split: the half of the text.
    """

    prompt_tokens: int = 1024
    max_tokens: int = 64
    num_samples: int = 10
    seed: int = 0
    haystack: Path | None = None
    split: Split = "tune"

    name = "agreement"

    def prompts(self, session: Session) -> list[tuple[int, ...]]:
        """The prompts, each of exactly `prompt_tokens` tokens.

        Raises:
            ValueError: the prompts are too short for a text, or the text for the prompts.
        """
        tokenizer = session.tokenizer
        frame = ChatFrame.of(tokenizer)
        hay = Haystack.load(tokenizer, self.haystack, self.split)
        head, tail = (tokenizer.encode(t, add_special_tokens=False) for t in (REQUEST, QUESTION))
        room = haystack_room(self.prompt_tokens, frame.num_tokens + len(head) + len(tail))
        generator = np.random.default_rng(self.seed)
        return [
            frame.wrap([*head, *hay.piece(room, generator).token_ids, *tail])
            for _ in range(self.num_samples)
        ]

    def run(self, session: Session) -> Result:
        """Generate with full and score under all; the score is the share of equal top tokens."""
        prompts = self.prompts(session)
        full = session.answers_under([Retention()], prompts, [self.max_tokens] * len(prompts))
        answers = [outputs[0].outputs[0].token_ids for outputs in full]
        scored = session.scores(prompts, answers, top_logprobs=TOP_TOKENS)
        outcomes = []
        for sample, outputs in enumerate(scored):
            reference = outputs[0]
            for retention, output in zip(session.retentions, outputs, strict=True):
                num = len(output.token_ids)
                apart = map(divergence, reference.top_logprobs, output.top_logprobs)
                details = {
                    "answer_tokens": num,
                    "identical": output.is_greedy,
                    "divergence": math.fsum(apart) / num,
                    "logprob_difference": (output.sum - reference.sum) / num,
                    "ranks": list(output.ranks),
                    "full_answer": full[sample][0].outputs[0].text,
                }
                share = sum(rank == 1 for rank in output.ranks) / num
                group = f"{self.prompt_tokens} tokens"
                outcomes.append(
                    Outcome(retention.label, sample, group, self.prompt_tokens, share, details)
                )
        return session.result(self.name, settings_of(self), outcomes)
