"""A Llama over lists, in float64, that keeps and drops what a method's definition says.

It shares no code with the engine and takes only the weights from a transformers model. What is
kept, and which tokens go on to the next layer, is up to the `Definition` (`definitions.py`).

Shapes: m tokens on their way, E hidden size, Hq query heads, H kv heads, D head dim.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

NEAR_CUT = 1e-5  # relative distance to the cut within which fp32 may decide either way


@dataclass(eq=False)
class Entry:
    """A token that a kv head keeps; `mass` is the attention that it ever got, the group's mean."""

    position: int
    key: Tensor
    value: Tensor
    mass: float = 0.0


@dataclass(frozen=True)
class Stored:
    """What a definition may look at when the rows of one layer are cut.

    `rows` holds the tokens of each kv head in the order of the text; `queries` the position and the
    query vectors [Hq, D] of the last tokens, oldest first. `compaction` is 0 at prefill. `seen_by`
    has what each query of the layer attended to when it was computed, oldest first: the mean of all
    heads by the position of the token.
    """

    layer: int
    rows: list[list[Entry]]
    queries: list[tuple[int, Tensor]]
    compaction: int = 0
    seen_by: list[dict[int, float]] = field(default_factory=list)

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return len(self.queries[-1][1]) // len(self.rows)

    def attention(self, query_head: int, back: int) -> list[float]:
        """Weights of the query `back` places from the end (from 1) on the tokens of its row."""
        position, queries = self.queries[-back]
        row = self.rows[query_head // self.group]
        seen = [entry.key for entry in row if entry.position <= position]
        weights: list[float] = attend(queries[query_head], torch.stack(seen)).tolist()
        return weights + [0.0] * (len(row) - len(seen))


@dataclass
class Cuts:
    """How near selections came to going the other way, as a share of the value at the cut."""

    closest: float = math.inf

    def between(self, last: float, first_out: float) -> None:
        """Equal values (pooling makes them) do not count: these are decided by position."""
        if math.isfinite(last) and last != first_out:
            self.closest = min(self.closest, abs(last - first_out) / abs(last))


class Definition(Protocol):
    """A method in its own words."""

    @property
    def window(self) -> int:
        """Last queries that are remembered."""
        ...

    def counts(self, num_tokens: int, num_layers: int, num_heads: int) -> list[list[int]] | None:
        """Tokens that [layer][head] keeps, on average where heads compete; None: all."""
        ...

    def grown_target(self, num_tokens: int) -> int:
        """Tokens that a row of a prompt that was kept whole is cut back to."""
        ...

    def cut(self, stored: Stored, keep: list[int], cuts: Cuts) -> list[list[int]]:
        """Places that stay in each row."""
        ...

    def pass_on(
        self, layer: int, attention: Tensor, num_tokens: int, num_layers: int, cuts: Cuts
    ) -> list[int]:
        """Which of m tokens that entered a layer leave it, given [Hq, m, m] attention weights."""
        ...

    def trim(
        self, stored: Stored, seen: int, lowest: int, mark: int, num_layers: int, cuts: Cuts
    ) -> tuple[list[int], int] | None:
        """Places that stay in all rows of a layer after a decode step, and its next mark.

        None where it does not fire. `seen` counts all tokens, `lowest` what layer 0 stores before
        it is trimmed, `mark` is what this layer stored after prefill or what it was last given.
        """
        ...


def attend(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax weights of one query [D] on keys [m, D]."""
    return torch.softmax(keys @ query / math.sqrt(len(query)), dim=0)


class Weights:
    """The weights of a transformers Llama in float64, by layer."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        all_weights = {name: w.double() for name, w in model.state_dict().items()}
        self.embed = all_weights["model.embed_tokens.weight"]
        self.norm = all_weights["model.norm.weight"]
        self.head = all_weights["lm_head.weight"]
        self.layers = [
            {
                name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): w
                for name, w in all_weights.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            for layer in range(self.config.num_hidden_layers)
        ]

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension."""
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def rotated(self, x: Tensor, positions: list[int]) -> Tensor:
        """Rotary embedding of [m, heads, D]."""
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        turns = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.tensor(positions, dtype=torch.float64)[:, None, None] * turns
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ],
            dim=-1,
        )


@dataclass
class SlowLlama:
    """One sequence: its prompt layer by layer, then token after token.

    Args:
        weights: of the model.
        definition: what is kept.
        slack_tokens: by how much rows outgrow their target before they are cut; None: for ever.
    """

    weights: Weights
    definition: Definition
    slack_tokens: int | None = None
    rows: list[list[list[Entry]]] = field(default_factory=list)  # [layer][head]
    cuts: Cuts = field(default_factory=Cuts)
    num_compactions: int = 0

    def __post_init__(self) -> None:
        self._targets: list[list[int]] = []
        self._marks: list[int] = []  # of each layer, from when it was last trimmed
        self.num_trims: list[int] = []  # by layer
        self._queries: list[list[tuple[int, Tensor]]] = []
        self._seen_by: list[list[dict[int, float]]] = []  # [layer][query]

    def greedy(
        self, prompt: list[int], num_tokens: int, after: Callable[[int], None] | None = None
    ) -> tuple[list[int], Tensor]:
        """Tokens, and the logits [num_tokens, V] that they were chosen from.

        `after` is called with the number of fed tokens, from 0 after the prefill.
        """
        logits = [self.prefill(prompt)]
        for step in range(num_tokens):
            if after is not None:
                after(step)
            if step < num_tokens - 1:
                logits.append(self.decode(int(logits[-1].argmax()), len(prompt) + step))
        return [int(row.argmax()) for row in logits], torch.stack(logits)

    def prefill(self, prompt: list[int]) -> Tensor:
        """Logits [V] after the prompt."""
        config, hidden = self.weights.config, self.weights.embed[prompt]
        num_layers, num_heads = config.num_hidden_layers, config.num_key_value_heads
        counts = self.definition.counts(len(prompt), num_layers, num_heads)
        positions = list(range(len(prompt)))
        for layer in range(num_layers):
            q, k, v = self._project(layer, hidden, positions)
            attention = torch.zeros(q.shape[1], len(q), len(q), dtype=torch.float64)
            for head in range(q.shape[1]):
                for i in range(len(q)):
                    mine = attend(q[i, head], k[: i + 1, head * num_heads // q.shape[1]])
                    attention[head, i, : i + 1] = mine
            self._store(layer, positions, q, k, v, attention)
            self._cut_prompt(layer, counts, len(prompt))
            mixed = self._mix([attention[head] for head in range(q.shape[1])], v)
            goes_on = self.definition.pass_on(layer, attention, len(prompt), num_layers, self.cuts)
            # Only what goes on is finished: nobody ever looks at the rest.
            hidden = self._finish(layer, hidden[goes_on], mixed[goes_on])
            positions = [positions[j] for j in goes_on]
        assert positions[-1] == len(prompt) - 1
        return self._logits(hidden[-1])

    def turn(self, tokens: list[int], start: int) -> Tensor:
        """Logits [V] after more of a text behind what is kept, of which rows are cut again.

        What rows then have is what they are cut back to from there on.
        """
        config, hidden = self.weights.config, self.weights.embed[tokens]
        num_layers, num_heads = config.num_hidden_layers, config.num_key_value_heads
        counts = self.definition.counts(start + len(tokens), num_layers, num_heads)
        positions = list(range(start, start + len(tokens)))
        self.num_compactions = 0
        for layer, rows in enumerate(self.rows):
            q, k, v = self._project(layer, hidden, positions)
            for j, position in enumerate(positions):
                for number, row in enumerate(rows):
                    row.append(Entry(position, k[j, number], v[j, number]))
            mixed = []
            for j, position in enumerate(positions):
                of_token = []
                for head in range(q.shape[1]):
                    seen = [
                        e for e in rows[head * num_heads // q.shape[1]] if e.position <= position
                    ]
                    weights = attend(q[j, head], torch.stack([e.key for e in seen]))
                    of_token.append(weights @ torch.stack([e.value for e in seen]))
                mixed.append(torch.cat(of_token))
            earlier, fresh = self._queries[layer], [(p, q[j]) for j, p in enumerate(positions)]
            self._queries[layer] = fresh  # a cut here looks at these only
            target = self.definition.grown_target(start + len(tokens))
            self._targets[layer] = [target] * num_heads
            if counts is not None:
                self._cut(layer, counts[layer])
                self._targets[layer] = [len(row) for row in rows]
            self._queries[layer] = [*earlier, *fresh]
            hidden = self._finish(layer, hidden, torch.stack(mixed))
        return self._logits(hidden[-1])

    def decode(self, token: int, position: int) -> Tensor:
        """Logits [V] after one more token; then rows that are full are cut."""
        hidden = self.weights.embed[[token]]
        for layer, rows in enumerate(self.rows):
            q, k, v = self._project(layer, hidden, [position])
            self._queries[layer].append((position, q[0]))
            group = q.shape[1] // len(rows)
            mixed = []
            seen_by: dict[int, float] = defaultdict(float)
            self._seen_by[layer].append(seen_by)
            for number, row in enumerate(rows):
                row.append(Entry(position, k[0, number], v[0, number]))
                keys = torch.stack([entry.key for entry in row])
                values = torch.stack([entry.value for entry in row])
                for head in range(number * group, (number + 1) * group):
                    weights = attend(q[0, head], keys)
                    mixed.append(weights @ values)
                    for entry, weight in zip(row, weights.tolist(), strict=True):
                        entry.mass += weight / group
                        seen_by[entry.position] += weight / q.shape[1]
            hidden = self._finish(layer, hidden, torch.cat(mixed)[None])
        self._cut_full_rows()
        self._trim_layers(position + 1)
        return self._logits(hidden[-1])

    def _store(
        self, layer: int, positions: list[int], q: Tensor, k: Tensor, v: Tensor, attention: Tensor
    ) -> None:
        group = q.shape[1] // k.shape[1]
        # The sum over all queries, the mean over the query heads of each kv head.
        mass = attention.sum(1).view(k.shape[1], group, len(q)).mean(1)
        self.rows.append(
            [
                [
                    Entry(p, k[j, head], v[j, head], float(mass[head, j]))
                    for j, p in enumerate(positions)
                ]
                for head in range(k.shape[1])
            ]
        )
        self._queries.append([(p, q[j]) for j, p in enumerate(positions)])
        mean = attention.mean(0).tolist()
        self._seen_by.append([dict(zip(positions, row, strict=True)) for row in mean])

    def _cut_prompt(self, layer: int, counts: list[list[int]] | None, num_tokens: int) -> None:
        rows = self.rows[layer]
        self._marks.append(len(rows[0]))
        self.num_trims.append(0)
        if counts is not None:
            keep = [min(count, len(row)) for count, row in zip(counts[layer], rows, strict=True)]
            if keep != [len(row) for row in rows]:
                self._cut(layer, keep)
            self._targets.append([len(row) for row in rows])
        else:
            self._targets.append([self.definition.grown_target(num_tokens)] * len(rows))

    def _cut_full_rows(self) -> None:
        """All rows of a sequence grow by one per token, so all are full in the same step."""
        if self.slack_tokens is None:
            return
        grown = {
            len(row) - target
            for rows, targets in zip(self.rows, self._targets, strict=True)
            for row, target in zip(rows, targets, strict=True)
        }
        assert len(grown) == 1
        if grown != {self.slack_tokens}:
            return
        self.num_compactions += 1
        for layer, targets in enumerate(self._targets):
            self._cut(layer, targets)

    def _trim_layers(self, seen: int) -> None:
        lowest = len(self.rows[0][0])
        for layer, rows in enumerate(self.rows):
            stored = Stored(layer, rows, list(self._queries[layer]), seen_by=self._seen_by[layer])
            trimmed = self.definition.trim(
                stored, seen, lowest, self._marks[layer], len(self.rows), self.cuts
            )
            if trimmed is not None:
                places, self._marks[layer] = trimmed
                assert places == sorted(set(places))
                self.num_trims[layer] += len(places) < len(rows[0])
                for row in rows:
                    row[:] = [row[j] for j in places]

    def _cut(self, layer: int, keep: list[int]) -> None:
        rows = self.rows[layer]
        # A new list: the definition must not see the queries of tokens to come.
        stored = Stored(layer, rows, list(self._queries[layer]), self.num_compactions)
        for row, places in zip(rows, self.definition.cut(stored, keep, self.cuts), strict=True):
            assert places == sorted(set(places))
            row[:] = [row[j] for j in places]
        del self._queries[layer][: -self.definition.window or None]

    def _project(
        self, layer: int, hidden: Tensor, positions: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = self.weights.layers[layer]
        normed = self.weights.normed(hidden, w["input_layernorm"])
        q, k, v = (
            (normed @ w[f"self_attn.{name}_proj"].T).view(len(hidden), -1, self._head_dim)
            for name in "qkv"
        )
        return self.weights.rotated(q, positions), self.weights.rotated(k, positions), v

    def _mix(self, attention: list[Tensor], v: Tensor) -> Tensor:
        group = len(attention) // v.shape[1]
        return torch.cat([a @ v[:, head // group] for head, a in enumerate(attention)], dim=-1)

    def _finish(self, layer: int, hidden: Tensor, mixed: Tensor) -> Tensor:
        w = self.weights.layers[layer]
        hidden = hidden + mixed @ w["self_attn.o_proj"].T
        normed = self.weights.normed(hidden, w["post_attention_layernorm"])
        gate = torch.nn.functional.silu(normed @ w["mlp.gate_proj"].T)
        finished: Tensor = hidden + (gate * (normed @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
        return finished

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.weights.normed(hidden, self.weights.norm) @ self.weights.head.T
        return logits

    @property
    def _head_dim(self) -> int:
        dim: int = self.weights.config.head_dim
        return dim
