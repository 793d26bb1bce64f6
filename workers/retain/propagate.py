"""Which tokens of a prefill group go on to the next layer, the same on every tensor rank.

Shapes: m tokens of one prompt that entered the layer, t last ones of them with queries, r recent
ones, c the m - r others, Hq local query heads, H local kv heads, K kv heads of the whole model, D
head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saqqara.compression.propagate import Propagate
from saqqara.compression.scoring import query_weights, token_scores
from saqqara.compression.selecting import surviving_tokens
from saqqara.workers.models.layer import QKV
from saqqara.workers.part import Part


@dataclass(frozen=True)
class PropagatingPrompt:
    """One prompt in a layer: what it selects by.

    Attributes:
        propagate: None for a prompt that passes everything on.
        prompt_tokens: length of the whole prompt.
        num_kept: tokens that go on, at most the m that entered.
        qkv: keys and values of the tokens that entered, [m, H, D] each, and queries of the last of
            them, [t, Hq, D]: of those that are computed, at least the recent ones.
        lse: what prefill returned of these queries, [t, Hq] fp32; None if it did not.
    """

    propagate: Propagate | None
    prompt_tokens: int
    num_kept: int
    qkv: QKV
    lse: Tensor | None

    @property
    def num_entered(self) -> int:
        """Tokens that entered the layer, m."""
        return len(self.qkv.k)

    @property
    def selects(self) -> bool:
        """Whether some tokens do not go on."""
        return self.num_kept < self.num_entered

    @property
    def num_recent(self) -> int:
        """Last tokens, which go on and whose queries score the others, r."""
        assert self.propagate is not None
        return self.propagate.recent_tokens(self.prompt_tokens)

    @property
    def num_context(self) -> int:
        """Tokens before the recent ones, from which it selects, c."""
        return self.num_entered - self.num_recent


def surviving_places(part: Part, prompts: Sequence[PropagatingPrompt]) -> list[Tensor | None]:
    """Places, int64 [kept], of each prompt's survivors among the tokens that entered, in order.

    None where all go on. Scores cross the tensor group once, keys and values never do.
    """
    selecting = [prompt for prompt in prompts if prompt.selects]
    if not selecting:
        return [None] * len(prompts)
    masses_Hc = torch.cat([_mass(part, prompt) for prompt in selecting], dim=1)
    masses_Kc = part.gather_heads(masses_Hc, are_parts=True)
    chosen = iter(torch.split(masses_Kc, [prompt.num_context for prompt in selecting], dim=1))
    return [
        _select(prompt, next(chosen), part.spec.group_size) if prompt.selects else None
        for prompt in prompts
    ]


def _mass(part: Part, prompt: PropagatingPrompt) -> Tensor:
    """Attention of the recent queries on the context's keys, [H, c] fp32, on this rank's heads."""
    assert prompt.propagate is not None
    recent, num_queries = prompt.num_recent, len(prompt.qkv.q)
    assert recent <= num_queries, f"{recent} queries are needed, {num_queries} are there"
    last = slice(num_queries - recent, num_queries)
    return part.backend.mass(
        prompt.qkv.q[last],
        prompt.qkv.k,
        part.scale,
        query_weights(prompt.propagate, recent, part.device),
        lse=None if prompt.lse is None else prompt.lse[last],
        num_columns=prompt.num_context,
    )


def _select(prompt: PropagatingPrompt, masses_Kc: Tensor, group_size: int) -> Tensor:
    """Places, int64 [kept], of one prompt's survivors among the tokens that entered."""
    propagate, recent = prompt.propagate, prompt.num_recent
    assert propagate is not None
    scores = token_scores(propagate, masses_Kc, recent, group_size)
    return surviving_tokens(scores, prompt.num_kept, recent, propagate.sinks)
