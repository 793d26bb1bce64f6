"""Which packed rows of a prefill group go on to the next layer, the same on every tensor rank.

Shapes: T packed tokens, m tokens of one prompt that entered the layer, r recent ones of them, c the
m - r others, Hq local query heads, H local kv heads, K kv heads of the whole model, D head dim.
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
    """One prompt in a layer: what it selects by, and where its tokens lie.

    Attributes:
        propagate: None for a prompt that passes everything on.
        prompt_tokens: length of the whole prompt.
        num_kept: tokens that go on, at most the m that entered.
        first_row: packed row of its first token.
        qkv: of the tokens that entered: [m, Hq, D], [m, H, D], [m, H, D].
        lse: what prefill returned of their queries, [m, Hq] fp32; None if it did not.
    """

    propagate: Propagate | None
    prompt_tokens: int
    num_kept: int
    first_row: int
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


def surviving_rows(part: Part, prompts: Sequence[PropagatingPrompt]) -> Tensor:
    """Packed rows, int64 [T'], of all prompts' tokens that go on, in order.

    Scores cross the tensor group once; keys and values never do.
    """
    selecting = [prompt for prompt in prompts if prompt.selects]
    masses_Hc = torch.cat([_mass(part, prompt) for prompt in selecting], dim=1)
    masses_Kc = part.gather_heads(masses_Hc, are_parts=True)
    chosen = iter(torch.split(masses_Kc, [prompt.num_context for prompt in selecting], dim=1))
    rows = [
        _select(prompt, next(chosen), part.spec.group_size)
        if prompt.selects
        else torch.arange(prompt.num_entered, device=part.device)
        for prompt in prompts
    ]
    return torch.cat([p.first_row + r for p, r in zip(prompts, rows, strict=True)])


def _mass(part: Part, prompt: PropagatingPrompt) -> Tensor:
    """Attention of the recent queries on the context's keys, [H, c] fp32, on this rank's heads."""
    assert prompt.propagate is not None
    context = prompt.num_context
    weights = query_weights(prompt.propagate, prompt.num_recent, part.device)
    return part.backend.mass(
        prompt.qkv.q[context:],
        prompt.qkv.k,
        part.scale,
        weights,
        lse=None if prompt.lse is None else prompt.lse[context:],
        num_columns=context,
    )


def _select(prompt: PropagatingPrompt, masses_Kc: Tensor, group_size: int) -> Tensor:
    """Places, int64 [kept], of one prompt's survivors among the tokens that entered."""
    propagate, recent = prompt.propagate, prompt.num_recent
    assert propagate is not None
    scores = token_scores(propagate, masses_Kc, recent, group_size)
    return surviving_tokens(scores, prompt.num_kept, recent, propagate.sinks)
