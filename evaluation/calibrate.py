"""How much a model needs the keys and values of each kv head: the profile of the `profile` shape.

Each row (layer, kv head) in turn keeps little of a context while all others keep it whole, and the
tokens that follow are predicted. A row's importance is what its loss does to these predictions: the
Kullback-Leibler divergence of the next-token distributions from those with all rows whole. A plain
difference of losses would need many times the text: its noise has no sign. So would the change of
the log-probability of the one token that the text has.

The tokens are of two kinds: continuations of plain text, which ask for whatever helps to predict,
and the answers to needle questions, which ask for copying from far away. Both matter to users, and
only few heads matter to either; each kind's importances are first divided by their sum.

Retrieval heads: Wu et al., arXiv 2404.15574; budgets by head: HeadKV, arXiv 2410.19258, whose
profile counts how often a head attends most to a needle's tokens. This one measures what the
model's output loses, so heads that matter to prediction in other ways count, too.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.profiles.head_profile import HeadProfile
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.prompts.haystack import Split
from saqqara.evaluation.prompts.prompt_maker import PromptMaker
from saqqara.evaluation.tasks.divergence import TOP_TOKENS, divergence
from saqqara.evaluation.tasks.needle import needle_question
from saqqara.evaluation.tasks.perplexity import PerplexityTask
from saqqara.workers.models.spec import load_spec

from .session import Session, TokenIds

Floats = NDArray[np.float64]

KEPT_PART = 20  # the row that is cut keeps the 20th part of the context
CUT = {"score": "snapkv", "window": 16, "sinks": 4, "kernel_size": 15, "pooling": "avg"}
"""How it is cut: as the `recommended` preset does."""
LEAST_CONTEXT_TOKENS = KEPT_PART * (16 + 4 + 1)  # a cut row has to hold more than window and sinks
TEXT_WEIGHT = 0.8
POWER = 0.85
"""Importances fall over three orders of magnitude; a power below one leaves the middle a part."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is measured.

    Attributes:
        context_tokens: of each context that goes through retention.
        continuation_tokens: of each plain text, scored.
        num_samples: contexts of each kind.
        seed: of the needles.
        haystack: folder with texts, or None for the topics of `pydoc`.
        split: the half of the text.
    """

    context_tokens: int = 2048
    continuation_tokens: int = 64
    num_samples: int = 8
    seed: int = 0
    haystack: Path | None = None
    split: Split = "tune"

    def run(self, config: EngineConfig) -> HeadProfile:
        """Measure every row of a model.

        Raises:
            ValueError: the context is too short to cut, or the text too short.
            RuntimeError: the engine failed.
        """
        if self.context_tokens < (least := LEAST_CONTEXT_TOKENS):
            raise ValueError(f"context_tokens: must be at least {least}, not {self.context_tokens}")
        spec = load_spec(config.model)
        # All cuts at once, if pages allow: they share one prefill of each context.
        num_settings = 1 + spec.num_layers * spec.num_kv_heads
        num_seqs = max(config.max_num_seqs, num_settings)
        with Session(config.model_copy(update={"max_num_seqs": num_seqs}), []) as session:
            num_layers, num_heads = spec.num_layers, spec.num_kv_heads
            group = spec.num_query_heads // num_heads
            cuts = [
                without_row(row, num_layers, num_heads, group, self.context_tokens)
                for row in range(num_layers * num_heads)
            ]
            session.retentions = (Retention(), *cuts)
            texts = importances(session, *self._texts(session))
            needles = importances(session, *self._needles(session))
            rows = combine(texts, needles).reshape(num_layers, num_heads)
        return HeadProfile(tuple(tuple(float(x) for x in np.repeat(r, group)) for r in rows))

    def _texts(self, session: Session) -> tuple[list[TokenIds], list[TokenIds]]:
        """Contexts and continuations of plain text."""
        task = PerplexityTask(
            context_tokens=self.context_tokens,
            continuation_tokens=self.continuation_tokens,
            num_samples=self.num_samples,
            haystack=self.haystack,
            split=self.split,
        )
        windows = task.session_windows(session)
        return [context for context, _ in windows], [tokens for _, tokens in windows]

    def _needles(self, session: Session) -> tuple[list[TokenIds], list[TokenIds]]:
        """Needle questions of the same length, and their answers."""
        maker = PromptMaker.load(session.tokenizer, self.haystack, self.split)
        generator = np.random.default_rng(self.seed)
        depths = (np.arange(self.num_samples) + 0.5) / self.num_samples
        questions = [
            needle_question(maker, self.context_tokens, float(depth), generator) for depth in depths
        ]
        answers = [maker.encode(f" {question.references[0]}") for question in questions]
        return [question.token_ids for question in questions], list(answers)


def without_row(
    row: int, num_layers: int, num_heads: int, group: int, prompt_tokens: int
) -> Retention:
    """Keep a prompt of that length whole in all rows but one, which keeps its 20th part.

    Up to one token a row more: a budget is a mean over rows.

    Args:
        row: layer * num_heads + kv head.
        num_layers: of the model.
        num_heads: its kv heads.
        group: query heads of a kv head; a profile has a score for each of them.
        prompt_tokens: length of the prompt.
    """
    num_rows = num_layers * num_heads
    kept = prompt_tokens // KEPT_PART
    table = {
        f"{layer}-{head}": [float(layer * num_heads + head // group != row)]
        for layer in range(num_layers)
        for head in range(num_heads * group)
    }
    budget = -(-((num_rows - 1) * prompt_tokens + kept) // num_rows)
    shape = {"shape": "profile", "profile": table, "head_beta": 1}
    return Retention.parse({**CUT, **shape, "budget": budget})


def importances(
    session: Session, contexts: Sequence[TokenIds], continuations: Sequence[TokenIds]
) -> Floats:
    """What the loss of each row changes, float64 [rows], in nats per predicted token.

    The session's first setting is `full`; each other one lacks a row.
    """
    total = np.zeros(len(session.retentions) - 1)
    for outputs in session.scores(contexts, continuations, TOP_TOKENS):
        full, *cut = (output.top_logprobs for output in outputs)
        total += [sum(map(divergence, full, other)) for other in cut]
    mean: Floats = total / sum(map(len, continuations))
    return mean


def combine(texts: Floats, needles: Floats) -> Floats:
    """One importance per row out of the two kinds, damped."""
    shares = TEXT_WEIGHT * texts / texts.sum() + (1 - TEXT_WEIGHT) * needles / needles.sum()
    damped = shares**POWER
    combined: Floats = damped / damped.sum()
    return combined


def write_profile(profile: HeadProfile, file: Path) -> None:
    """Write a profile as `HeadProfile.read` takes it, one head a line."""
    lines = [f'"{key}": [{scores[0]:.6f}]' for key, scores in profile.to_dict().items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    HeadProfile.read(json.loads(text))
    file.write_text(text, encoding="utf-8")
