"""Perplexity of real text that follows a context whose keys and values went through retention."""

from dataclasses import dataclass
from pathlib import Path

from saqqara.evaluation.prompts.chat_frame import ChatFrame
from saqqara.evaluation.prompts.haystack import Haystack, Split
from saqqara.evaluation.prompts.prompt_maker import settings_of
from saqqara.evaluation.result import Outcome, Result
from saqqara.evaluation.session import Session


@dataclass(frozen=True, slots=True)
class PerplexityTask:
    """Windows over a text: a context, and the continuation that is scored after it.

    Attributes:
        context_tokens: of each window, the BOS token included where the model has one.
        continuation_tokens: of each window, all scored.
        stride: tokens from one window's start to the next; None spreads them over the half
            of the text, side by side where it is short.
        num_samples: windows at most.
        haystack: folder with texts, or None for the topics of `pydoc`.
        split: the half of the text.
    """

    context_tokens: int = 1024
    continuation_tokens: int = 128
    stride: int | None = None
    num_samples: int = 10
    haystack: Path | None = None
    split: Split = "tune"

    name = "perplexity"

    def windows(
        self, hay: Haystack, bos: tuple[int, ...]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Context and continuation of each window.

        Raises:
            ValueError: the text holds no window.
        """
        num_context = self.context_tokens - len(bos)
        size = num_context + self.continuation_tokens
        stride = self.stride or max(size, len(hay.token_ids) // self.num_samples)
        starts = range(0, len(hay.token_ids) - size + 1, stride)[: self.num_samples]
        if num_context < 1 or not starts:
            raise ValueError(
                f"context_tokens: a window of {self.context_tokens} and "
                f"{self.continuation_tokens} tokens does not fit this half of the text, which has "
                f"{len(hay.token_ids)}"
            )
        return [
            (
                (*bos, *hay.token_ids[start : start + num_context]),
                hay.token_ids[start + num_context : start + size],
            )
            for start in starts
        ]

    def session_windows(self, session: Session) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The windows of the task's own text, in the tokens of the session's model.

        Raises:
            ValueError: as `windows` and `Haystack.load`.
        """
        hay = Haystack.load(session.tokenizer, self.haystack, self.split)
        return self.windows(hay, ChatFrame.plain(session.tokenizer).before)

    def run(self, session: Session) -> Result:
        """Score every window; the score is the mean negative log-likelihood in nats per token."""
        contexts, continuations = zip(*self.session_windows(session), strict=True)
        scored = session.scores(contexts, continuations)
        outcomes = [
            Outcome(
                retention=retention.label,
                sample=sample,
                group=f"{self.context_tokens} tokens",
                prompt_tokens=self.context_tokens,
                score=-output.sum / len(output.token_ids),
                details={"logprobs": [round(one, 5) for one in output.logprobs]},
            )
            for sample, outputs in enumerate(scored)
            for retention, output in zip(session.retentions, outputs, strict=True)
        ]
        return session.result(self.name, settings_of(self), outcomes)
