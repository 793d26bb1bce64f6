"""A transformers model that drops what a method's definition says, as the oracle of any family.

The model is transformers' own; only its attention is replaced, by loops over plain matrices that
mask by position: causal, the window of a layer that has one, and, for tokens after the prompt, what
the definition (`definitions.py`) dropped of the prompt. Layers with a window keep what it holds.

Shapes: n tokens, Hq query heads, H kv heads, D head dim.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from .slow_llama import Cuts, Definition, Entry, Stored


@dataclass(frozen=True)
class _Capped(Stored):
    """Stored tokens whose scores were capped before the softmax."""

    cap: float = 0.0

    def attention(self, query_head: int, back: int) -> list[float]:
        if not self.cap:
            return super().attention(query_head, back)
        position, queries = self.queries[-back]
        row = self.rows[query_head // self.group]
        keys = torch.stack([entry.key for entry in row if entry.position <= position])
        query = queries[query_head]
        scores = self.cap * torch.tanh(keys @ query / math.sqrt(len(query)) / self.cap)
        weights: list[float] = scores.softmax(0).tolist()
        return weights + [0.0] * (len(row) - len(weights))


@dataclass
class Dropping:
    """What `rules` keep of the first `prompt_tokens` tokens, layer by layer.

    Attributes:
        windows: of the layers, by number, as the first pass meets them; 0: none.
        kept: by layer and kv head, the places of the prompt that stay.
        cuts: how near selections were.
    """

    rules: Definition
    prompt_tokens: int
    windows: dict[int, int] = field(default_factory=dict)
    kept: dict[int, list[list[int]]] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=Cuts)
    drops: bool = False

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers calls it: [1, heads, n, D] to [1, n, Hq, D]."""
        q, k, v = (x[0].double() for x in (query, key, value))
        layer, group = module.layer_idx, len(q) // len(k)
        self.windows[layer] = sliding_window or 0
        places = torch.arange(q.shape[1])
        back = places[:, None] - places
        seen = (back >= 0) & (back < (sliding_window or len(places)))
        seen_H = seen.expand(len(k), -1, -1).clone()
        if self.drops and not sliding_window:
            # Definitions divide scores by the root of D; what else scales them is in the queries.
            scaled = q * scaling * math.sqrt(q.shape[-1])
            for head, stays in enumerate(self._kept(layer, scaled, k, v, softcap or 0.0)):
                dropped = [j for j in range(self.prompt_tokens) if j not in stays]
                seen_H[head, self.prompt_tokens :, dropped] = False
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen_H.repeat_interleave(group, 0), -math.inf)
        out = scores.softmax(-1) @ v.repeat_interleave(group, 0)
        return out.transpose(0, 1)[None].to(query.dtype), None

    def _kept(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cap: float) -> list[list[int]]:
        """Places of the prompt that stay in each kv head."""
        everywhere = [number for number, window in sorted(self.windows.items()) if not window]
        counts = self.rules.counts(self.prompt_tokens, len(everywhere), len(k))
        if counts is None:
            return [list(range(self.prompt_tokens)) for _ in k]
        rows = [
            [Entry(j, k[head, j], v[head, j]) for j in range(self.prompt_tokens)]
            for head in range(len(k))
        ]
        last = range(self.prompt_tokens - self.rules.window, self.prompt_tokens)
        number = everywhere.index(layer)
        stored = _Capped(number, rows, [(j, q[:, j]) for j in last], cap=cap)
        self.kept[layer] = self.rules.cut(stored, counts[number], self.cuts)
        return self.kept[layer]


@torch.inference_mode()
def logits_under(
    model: Any, rules: Definition, prompt: list[int], tokens: list[int]
) -> tuple[Tensor, Dropping]:
    """Logits, fp32 [len(tokens), V], of each of these tokens after a prompt that was cut."""
    dropping = Dropping(rules, len(prompt))
    AttentionInterface.register("dropping", dropping.attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = "dropping"
    try:
        fed = torch.tensor([prompt + tokens[:-1]])
        for dropping.drops in (False, True):  # the first pass learns which layers have a window
            logits = model(fed, logits_to_keep=len(tokens), use_cache=False).logits[0]
    finally:
        model.config._attn_implementation = before
    return logits.float(), dropping
