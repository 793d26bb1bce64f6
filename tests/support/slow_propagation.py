"""A decoder that drops hidden states, written as loops over a transformers model's weights.

It shares nothing with the engine: own masks, own softmax, own selection, fp64 where it selects.

Shapes: m tokens on their way, E hidden size, Hq query heads, D head dim.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

NEAR_CUT = 1e-5  # relative distance to the cut within which fp32 may decide either way


@dataclass
class Layer:
    """Keys and values [m, kv heads, D] that a layer stores, and the positions they are from."""

    keys: Tensor
    values: Tensor
    positions: list[int]


@dataclass
class SlowModel:
    """Walks a transformers Llama layer by layer for one prompt; then decodes from what is stored.

    Args:
        model: the transformers model.
        settings: of the propagation, as in `Propagate.to_dict`.
        closest: smallest relative distance to a cut of any selection, to tell ties.
    """

    model: Any
    settings: dict[str, Any]
    layers: list[Layer] = field(default_factory=list)
    closest: float = math.inf

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> Tensor:
        """Logits [V] after the prompt."""
        hidden = self.model.model.embed_tokens(torch.tensor(prompt))
        positions = list(range(len(prompt)))
        for number, layer in enumerate(self.model.model.layers):
            q, k, v = self._project(layer, hidden, positions)
            self.layers.append(Layer(k, v, list(positions)))
            attention = self._attention(q, k)
            chosen = self._choose(number, attention, len(prompt))
            mixed = self._mix(attention, v)
            # Only what goes on is finished: nobody ever looks at the rest.
            hidden = self._finish(layer, hidden[chosen], mixed[chosen])
            positions = [positions[j] for j in chosen]
        assert positions[-1] == len(prompt) - 1
        return self._logits(hidden[-1])

    @torch.inference_mode()
    def decode(self, token: int, position: int) -> Tensor:
        """Logits [V] after one more token, over what each layer stores."""
        hidden = self.model.model.embed_tokens(torch.tensor([token]))
        for stored, layer in zip(self.layers, self.model.model.layers, strict=True):
            q, k, v = self._project(layer, hidden, [position])
            stored.keys = torch.cat([stored.keys, k])
            stored.values = torch.cat([stored.values, v])
            stored.positions.append(position)
            attention = self._attention(q, stored.keys)
            hidden = self._finish(layer, hidden, self._mix(attention, stored.values))
        return self._logits(hidden[-1])

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
        """Tokens, and the logits [num_tokens, V] that they were chosen from."""
        logits = [self.prefill(prompt)]
        for step in range(num_tokens - 1):
            logits.append(self.decode(int(logits[-1].argmax()), len(prompt) + step))
        return [int(row.argmax()) for row in logits], torch.stack(logits)

    def _project(
        self, layer: Any, hidden: Tensor, positions: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention, dim = layer.self_attn, self.model.config.head_dim
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            project(normed).view(len(hidden), -1, dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = self.model.model.rotary_emb(hidden, torch.tensor([positions]))
        q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1), v

    def _attention(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax weights [Hq, queries, keys]; the last query sees all keys."""
        group, dim = q.shape[1] // k.shape[1], q.shape[2]
        first = len(k) - len(q)
        weights = torch.zeros(q.shape[1], len(q), len(k))
        for head in range(q.shape[1]):
            for i in range(len(q)):
                scores = k[: first + i + 1, head // group] @ q[i, head] / math.sqrt(dim)
                weights[head, i, : first + i + 1] = torch.softmax(scores, dim=0)
        return weights

    def _mix(self, attention: Tensor, v: Tensor) -> Tensor:
        group = attention.shape[0] // v.shape[1]
        mixed = [attention[head] @ v[:, head // group] for head in range(attention.shape[0])]
        return torch.cat(mixed, dim=-1)

    def _finish(self, layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(mixed)
        finished: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return finished

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits.float()

    # Selection ------------------------------------------------------------------------------------

    def _choose(self, layer: int, attention: Tensor, n: int) -> list[int]:
        """Which of the tokens that entered go on, by their place among them."""
        if self.settings["kind"] == "once":
            return self._choose_once(layer, attention, n)
        return self._choose_pyramidinfer(layer, attention, n)

    def _choose_pyramidinfer(self, layer: int, attention: Tensor, n: int) -> list[int]:
        s, num_layers, m = self.settings, len(self.model.model.layers), attention.shape[2]
        r = int(s["recent_ratio"] * n)
        context = m - 1 - r
        rho = s["rho"] + (1 - s["rho"]) * (math.cos(math.pi * layer / num_layers) + 1) / 2
        keep = int(rho * context)
        if layer % s["interval"] != 0 or keep <= s["min_context"]:
            return list(range(m))
        scores = []
        for j in range(context):
            total = 0.0
            for i in range(1 + r):
                weight = 1.0 if r == 0 else 1 + (s["distance_weight"] - 1) * i / r
                for head in range(attention.shape[0]):
                    total += weight * float(attention[head, m - 1 - r + i, j])
            scores.append(total / (attention.shape[0] * (1 + r)))
        return self._best(scores, keep, s["sinks"]) + list(range(context, m))

    def _choose_once(self, layer: int, attention: Tensor, n: int) -> list[int]:
        s, m, w = self.settings, attention.shape[2], self.settings["window"]
        keep = max(int(s["keep"] * n), w + s["sinks"])
        if layer != s["layer"] or keep >= m:
            return list(range(m))
        kv_heads = self.model.config.num_key_value_heads
        group = attention.shape[0] // kv_heads
        scores = [0.0] * (m - w)
        for kv_head in range(kv_heads):
            raw = [
                sum(
                    float(attention[kv_head * group + g, i, j])
                    for g in range(group)
                    for i in range(m - w, m)
                )
                / (group * w)
                for j in range(m - w)
            ]
            reach = s["kernel_size"] // 2
            for j in range(m - w):
                near = raw[max(0, j - reach) : j + reach + 1]
                pooled = max(near) if s["pooling"] == "max" else sum(near) / s["kernel_size"]
                scores[j] += pooled / kv_heads
        return self._best(scores, keep - w, s["sinks"]) + list(range(m - w, m))

    def _best(self, scores: list[float], keep: int, sinks: int) -> list[int]:
        """The sinks and the best others; of equal scores the later token."""
        forced = [math.inf if j < sinks else score for j, score in enumerate(scores)]
        order = sorted(range(len(forced)), key=lambda j: (forced[j], j), reverse=True)
        if sinks < keep < len(order):
            last, first_out = forced[order[keep - 1]], forced[order[keep]]
            if last != first_out:  # equal scores (pooling makes them) are decided by position
                self.closest = min(self.closest, (last - first_out) / last)
        return sorted(order[:keep])
