"""What is asked of a deployment: prompts and answers of one length, under one retention.

Shapes: L layers, H kv heads of the model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.growth import cycle_of, grown, trimmed_rows
from saqqara.compression.retention import Retention
from saqqara.workers.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Workload:
    """Every request has so many tokens and gets so many back."""

    prompt_tokens: int
    new_tokens: int
    retention: Retention

    @property
    def fed_tokens(self) -> int:
        """Tokens that decode steps feed: the first new one is prefill's, the last is never fed."""
        return self.new_tokens - 1

    def entering_tokens(self, spec: ModelSpec) -> tuple[int, ...]:
        """Tokens of a prompt that enter each layer."""
        return self.retention.entering_tokens(self.prompt_tokens, spec.layers)

    def attended_tokens(self, spec: ModelSpec, page_tokens: int) -> NDArray[np.float64]:
        """Tokens that a decode step reads of each row, mean over an answer, float64 [L, H].

        A step that cuts rows reads them before it does.
        """
        retention, prompt, fed = self.retention, self.prompt_tokens, self.fed_tokens
        kept_LH = retention.row_tokens(prompt, spec.layers, spec.num_kv_heads)
        trimmed = trimmed_rows(retention, prompt, spec.layers)
        if fed == 0:
            return kept_LH.astype(np.float64)
        if trimmed is not None:
            sums_L = np.zeros(spec.num_layers)
            for _ in range(fed):
                sums_L += trimmed.stored + 1
                trimmed.feed(1)
            return np.broadcast_to(sums_L[:, None] / fed, kept_LH.shape)
        before = np.arange(fed, dtype=np.int64)
        local = np.minimum(prompt + before + 1, spec.layers.window).mean()
        cycle = cycle_of(retention, prompt, page_tokens)
        if cycle is not None:
            before = grown(before, np.int64(cycle.grace), np.int64(cycle.slack))
        attended_LH = kept_LH + float((before + 1).mean())
        attended_LH[list(spec.layers.local_layers)] = local
        return attended_LH
