"""Decode-stage retention by its definition: a Llama that attends over lists, one head at a time.

Everything is done in float64 with torch operations on single vectors and lists. It shares no code
with the engine, and takes only the weights from transformers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Entry:
    """A kept token of one head, and the attention that it got so far, as a mean over the group."""

    position: int
    key: Tensor
    value: Tensor
    mass: float = 0.0


@dataclass(eq=False)
class Head:
    """What one kv head keeps, how much it kept after prefill, and what it has ever seen."""

    kept: list[Entry] = field(default_factory=list)
    recent_queries: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    target: int = 0
    num_compactions: int = 0
    all_keys: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Rule:
    """The retention in plain numbers; `counts[layer][head]` tokens are kept of a cut prompt.

    With a `trigger` there are no targets: PyramidInfer's generation stage cuts single layers.
    """

    score: str
    counts: list[list[int]]
    budget: int
    window: int
    sinks: int
    slack_tokens: int
    kernel: int = 7
    seed: int = 0
    trigger: str | None = None
    exceed: int = 0
    recent_ratio: float = 0.5


def _scramble(x: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    x = x % 2**32
    x = (x ^ x // 2**16) * 0x85EBCA6B % 2**32
    x = (x ^ x // 2**13) * 0xC2B2AE35 % 2**32
    return x ^ x // 2**16


class SlowLlama:
    """One sequence through the layers of a transformers Llama, token after token."""

    def __init__(self, model: Any, rule: Rule) -> None:
        self.config = model.config
        self.weights = {name: w.double() for name, w in model.state_dict().items()}
        self.rule = rule
        self.group = self.config.num_attention_heads // self.config.num_key_value_heads
        self.heads = [
            [Head() for _ in range(self.config.num_key_value_heads)]
            for _ in range(self.config.num_hidden_layers)
        ]
        self.after_cut: list[int] = []
        self.num_cuts = [0] * len(self.heads)

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Greedy tokens after a prompt; `after_step` is called after each fed token."""
        output = [self._prefill(prompt)]
        while len(output) < num_tokens:
            output.append(self.feed(output[-1], len(prompt) + len(output) - 1))
        return output

    def feed(self, token: int, position: int) -> int:
        """Decode one token; then compact the rows that are full. Returns the next token."""
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(len(self.heads)):
            x = self._layer(layer, x, position)
        if self.rule.trigger is not None:
            self._trim(position + 1)
            return self._next(x)
        for layer, heads in enumerate(self.heads):
            full = [h for h in heads if len(h.kept) == h.target + self.rule.slack_tokens]
            for head in full:
                head.num_compactions += 1
            self._cut(layer, full)
        return self._next(x)

    def _prefill(self, prompt: list[int]) -> int:
        x = self.weights["model.embed_tokens.weight"][0]
        for position, token in enumerate(prompt):
            x = self.weights["model.embed_tokens.weight"][token]
            for layer in range(len(self.heads)):
                x = self._layer(layer, x, position)
        self.after_cut = [len(prompt)] * len(self.heads)
        if self.rule.trigger is not None:
            return self._next(x)
        for layer, heads in enumerate(self.heads):
            is_cut = len(prompt) > self.rule.budget
            for number, head in enumerate(heads):
                head.target = self.rule.counts[layer][number] if is_cut else self.rule.budget
            self._cut(layer, heads if is_cut else [])
        return self._next(x)

    def _cut(self, layer: int, heads: list[Head]) -> None:
        """Keep the sinks, the window, and the best of the others; of equal ones the later."""
        rule = self.rule
        of_head = [self._scores(layer, self.heads[layer].index(head)) for head in heads]
        for head, scores in zip(heads, of_head, strict=True):
            n, recent = len(head.kept), rule.window
            if rule.score == "h2o":
                recent = min(int(rule.recent_ratio * head.target), head.target - rule.sinks)
            middle = list(range(rule.sinks, n - recent))
            middle.sort(key=lambda j: (scores[j], j), reverse=True)
            chosen = sorted(middle[: head.target - rule.sinks - recent])
            places = [*range(rule.sinks), *chosen, *range(n - recent, n)]
            assert len(places) == head.target
            head.kept = [head.kept[j] for j in places]

    def _trim(self, seen: int) -> None:
        """Of the tokens before the recent ones, keep those that the last query looks at."""
        rule, num_layers = self.rule, len(self.heads)
        recent = int(rule.recent_ratio * len(self.heads[0][0].kept))
        for layer, heads in enumerate(self.heads):
            stored = len(heads[0].kept)
            more = stored if rule.trigger == "stored" else seen - recent
            first = stored - 1 - recent - rule.exceed
            if more - self.after_cut[layer] < rule.exceed or first < rule.sinks:
                continue
            cosine = 0.1 + 0.9 * (math.cos(math.pi * layer / num_layers) + 1) / 2
            keep = max(int(0.9 * rule.exceed * cosine), 1)
            scores = self._last_query(layer)
            best = list(range(first, first + rule.exceed))
            best.sort(key=lambda j: (scores[j], j), reverse=True)
            gone = set(best[keep:])
            for head in heads:
                head.kept = [entry for j, entry in enumerate(head.kept) if j not in gone]
            self.after_cut[layer] = stored - rule.exceed + keep
            self.num_cuts[layer] += 1

    def _last_query(self, layer: int) -> list[float]:
        """What the last token's queries pay to each kept place, as a mean over all heads."""
        mean = [0.0] * len(self.heads[layer][0].kept)
        last = [(h, q) for h in self.heads[layer] for q in h.recent_queries[-1][1]]
        for head, query in last:
            for j, weight in enumerate(self._attention(query, [e.key for e in head.kept])):
                mean[j] += float(weight) / len(last)
        return mean

    def _scores(self, layer: int, number: int) -> list[float]:
        """The score of every kept token that lies before the window."""
        rule, head = self.rule, self.heads[layer][number]
        places = range(len(head.kept) - rule.window)
        if rule.score == "streaming":
            return [float(j) for j in places]
        if rule.score == "knorm":
            return [-float(head.kept[j].key.pow(2).sum().sqrt()) for j in places]
        if rule.score == "random":
            return [float(self._noise(layer, number, j)) for j in places]
        if rule.score == "tova":
            return self._last_query(layer)
        if rule.score == "h2o":
            return [entry.mass for entry in head.kept]
        assert rule.score == "snapkv"
        mean = [0.0] * len(head.kept)
        queries = head.recent_queries[-rule.window :]
        assert len(queries) == rule.window
        for position, group in queries:
            seen = [e.key for e in head.kept if e.position <= position]
            for query in group:
                for j, weight in enumerate(self._attention(query, seen).tolist()):
                    mean[j] += weight / (rule.window * len(group))
        reach = rule.kernel // 2
        near = [[mean[i] for i in range(j - reach, j + reach + 1) if i in places] for j in places]
        return [max(values) for values in near]

    def _noise(self, layer: int, number: int, place: int) -> int:
        key = _scramble(_scramble(_scramble(self.rule.seed // 2**32) ^ self.rule.seed) ^ layer)
        if self.heads[layer][number].num_compactions:
            key = _scramble(key ^ self.heads[layer][number].num_compactions)
        return _scramble(_scramble(number ^ key) ^ _scramble(place + 1)) // 256

    def _attention(self, query: Tensor, keys: list[Tensor]) -> Tensor:
        return torch.softmax(torch.stack(keys) @ query / math.sqrt(len(query)), dim=0)

    def _layer(self, layer: int, x: Tensor, position: int) -> Tensor:
        w = {
            name.split(f"layers.{layer}.")[1]: tensor
            for name, tensor in self.weights.items()
            if f"layers.{layer}." in name
        }
        normed = self._norm(x, w["input_layernorm.weight"])
        dim = self.config.head_dim
        q = (w["self_attn.q_proj.weight"] @ normed).view(-1, dim)
        k = (w["self_attn.k_proj.weight"] @ normed).view(-1, dim)
        v = (w["self_attn.v_proj.weight"] @ normed).view(-1, dim)
        attended = []
        for number, head in enumerate(self.heads[layer]):
            key = self._rotate(k[number], position)
            head.kept.append(Entry(position, key, v[number]))
            head.all_keys.append(key)
            mine = range(number * self.group, (number + 1) * self.group)
            queries = [self._rotate(q[i], position) for i in mine]
            head.recent_queries = [*head.recent_queries[-self.rule.window :], (position, queries)]
            keys, values = [e.key for e in head.kept], torch.stack([e.value for e in head.kept])
            for query in queries:
                weights = self._attention(query, keys)
                attended.append(weights @ values)
                for entry, weight in zip(head.kept, weights.tolist(), strict=True):
                    entry.mass += weight / self.group
        x = x + w["self_attn.o_proj.weight"] @ torch.cat(attended)
        normed = self._norm(x, w["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(w["mlp.gate_proj.weight"] @ normed)
        x += w["mlp.down_proj.weight"] @ (gate * (w["mlp.up_proj.weight"] @ normed))
        return x

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean() + self.config.rms_norm_eps) * weight

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        first, second = x[:half], x[half:]
        turned = [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ]
        return torch.cat(turned)

    def _next(self, x: Tensor) -> int:
        normed = self._norm(x, self.weights["model.norm.weight"])
        return int((self.weights["lm_head.weight"] @ normed).argmax())
