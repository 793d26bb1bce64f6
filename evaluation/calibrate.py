"""How much a model needs the keys and values of each kv head: the profile of the `profile` shape.

Each row (layer, kv head) in turn keeps little of a context while all others keep it whole, and the
tokens that follow are predicted. A row's importance is what its loss does to these predictions: the
Kullback-Leibler divergence of the next-token distributions from those with all rows whole. A plain
difference of losses would need many times the text: its noise has no sign. So would the change of
the log-probability of the one token that the text has.

The tokens are of two kinds: continuations of plain text, which ask for whatever helps to predict,
and the answers to needle questions, which ask for copying from far away. Both matter to users, and
only few heads matter to either; each kind's importances are first divided by their sum.

The layer where `recommended-fast` selects what upper layers see is measured, too: each layer in
turn lets a quarter of the tokens of needle questions pass, and the answers are predicted. Layers
with sliding-window attention have no budget, so their rows are not measured, and a model that has
some cannot let tokens pass.

Retrieval heads: Wu et al., arXiv 2404.15574; budgets by head: HeadKV, arXiv 2410.19258, whose
profile counts how often a head attends most to a needle's tokens. This one measures what the
model's output loses, so heads that matter to prediction in other ways count, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.layers import Layers
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
NUM_PASSED = 4
PASSED = {
    "kind": "once",
    "keep": 0.25,
    "window": 16,
    "kernel_size": 15,
    "pooling": "avg",
    "sinks": 4,
}
MOST_LOST = 0.25
"""Nats per token of the answers that a layer may cost which lets a quarter of the tokens pass."""
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

    def run(
        self, config: EngineConfig, say: Callable[[str], object] = lambda _: None
    ) -> HeadProfile:
        """Measure every row of a model's global layers.

        Args:
            config: of the engine.
            say: told in words how far it is.

        Raises:
            ValueError: the context is too short to cut, or the text too short, or no layer of the
                model sees all tokens.
            RuntimeError: the engine failed.
        """
        if self.context_tokens < (least := LEAST_CONTEXT_TOKENS):
            raise ValueError(f"context_tokens: must be at least {least}, not {self.context_tokens}")
        spec = load_spec(config.model)
        layers, num_heads, group = spec.layers, spec.num_kv_heads, spec.group_size
        if not layers.global_layers:
            raise ValueError(
                f"model: all of its layers see a window of {layers.window} tokens, so none has a "
                "budget that a profile could spread"
            )
        rows = [(layer, head) for layer in layers.global_layers for head in range(num_heads)]
        # All cuts at once, if pages allow: they share one prefill of each context.
        num_seqs = max(config.max_num_seqs, 1 + len(rows))
        config = config.model_copy(
            update={"max_num_seqs": num_seqs, "retention": "full", "budget": None}
        )
        with Session(config, []) as session:
            cuts = [without_row(row, layers, num_heads, group, self.context_tokens) for row in rows]
            session.retentions = (Retention(), *cuts)
            questions = self._needles(session)
            say(f"{len(rows)} rows of {len(layers.global_layers)} layers that see all tokens")
            texts = importances(session, *self._texts(session), _told(say, "text"))
            needles = importances(session, *questions, _told(say, "needle"))
            layer = None
            if not layers.local_layers:
                layer = self._propagate_layer(session, questions, say)
        scores = np.zeros((len(layers), num_heads))
        scores[list(layers.global_layers)] = combine(texts, needles).reshape(-1, num_heads)
        repeated = np.repeat(scores, group, axis=1)
        return HeadProfile(tuple(tuple(float(x) for x in heads) for heads in repeated), layer)

    def _propagate_layer(
        self,
        session: Session,
        questions: tuple[list[TokenIds], list[TokenIds]],
        say: Callable[[str], object],
    ) -> int | None:
        """The lowest layer whose last queries tell where the answers stand; None: none does."""
        contexts, answers = (some[:NUM_PASSED] for some in questions)
        view = session.comparing([])
        for layer in range(1, session.spec.num_layers - 1):
            view.retentions = (Retention(), passing_at(layer))
            lost = importances(view, contexts, answers)[0]
            say(f"layer {layer} lets a quarter pass: {lost:.3f} nats per token of the answers")
            if lost < MOST_LOST:
                return layer
        return None

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


def passing_at(layer: int) -> Retention:
    """Let all tokens up to a layer, and above it a quarter, as `recommended-fast` does."""
    return Retention.parse({"propagate": {**PASSED, "layer": layer}})


def without_row(
    row: tuple[int, int], layers: Layers | int, num_heads: int, group: int, prompt_tokens: int
) -> Retention:
    """Keep a prompt of that length whole in all rows but one, which keeps its 20th part.

    Up to one token a row more: a budget is a mean over the rows of global layers.

    Args:
        row: its layer, a global one, and its kv head.
        layers: of the model.
        num_heads: its kv heads.
        group: query heads of a kv head; a profile has a score for each of them.
        prompt_tokens: length of the prompt.
    """
    layers = Layers.of(layers)
    num_rows = len(layers.global_layers) * num_heads
    kept = prompt_tokens // KEPT_PART
    table = {
        f"{layer}-{head}": [float((layer, head // group) != row)]
        for layer in range(len(layers))
        for head in range(num_heads * group)
    }
    budget = -(-((num_rows - 1) * prompt_tokens + kept) // num_rows)
    shape = {"shape": "profile", "profile": table, "head_beta": 1}
    return Retention.parse({**CUT, **shape, "budget": budget})


def importances(
    session: Session,
    contexts: Sequence[TokenIds],
    continuations: Sequence[TokenIds],
    done: Callable[[int, int], object] = lambda number, of: None,
) -> Floats:
    """What the loss of each row changes, float64 [rows], in nats per predicted token.

    The session's first setting is `full`; each other one lacks a row. `done` is told after each
    context how many there are.
    """
    total = np.zeros(len(session.retentions) - 1)
    pairs = list(zip(contexts, continuations, strict=True))
    for number, (context, continuation) in enumerate(pairs, 1):
        [outputs] = session.scores([context], [continuation], TOP_TOKENS)
        full, *cut = (output.top_logprobs for output in outputs)
        total += [sum(map(divergence, full, other)) for other in cut]
        done(number, len(pairs))
    mean: Floats = total / sum(map(len, continuations))
    return mean


def combine(texts: Floats, needles: Floats) -> Floats:
    """One importance per row out of the two kinds, damped."""
    shares = TEXT_WEIGHT * texts / texts.sum() + (1 - TEXT_WEIGHT) * needles / needles.sum()
    damped = shares**POWER
    combined: Floats = damped / damped.sum()
    return combined


def _told(say: Callable[[str], object], kind: str) -> Callable[[int, int], object]:
    """Tells how many contexts of a kind are done."""
    return lambda number, of: say(f"{kind} {number} of {of}")
