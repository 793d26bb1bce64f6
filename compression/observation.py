"""What a retention method may look at: one sequence at the end of one layer's prefill.

At a compaction while decoding it is some rows of one layer (see `selecting.select_stored`): each
row stands for a kv head, the stored tokens for the prompt.

Shapes: n prompt tokens, w window queries, H local kv heads, Hq local query heads, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .layers import Layers


@dataclass(slots=True, eq=False)
class Observation:
    """Keys, values and trailing queries of one sequence in one layer, and how to attend over them.

    Attributes:
        layer: layer number in the whole model, from 0.
        layers: of the whole model; a number of them: all are global. Only these are observed.
        prompt_tokens: n, the prompt's length, or how many of its tokens entered the layer.
        keys: [n, H, D], rotated at their positions.
        values: [n, H, D].
        queries: [w, Hq, D], the last w queries, or None when the method observes none.
        scale: factor on the dot products of the softmax.
        heads: global ids of the H local kv heads (of each row, at a compaction).
        num_heads: kv heads of the whole model.
        group_size: query heads per kv head in the whole model (a rank that shares its kv heads
            with others holds fewer).
        mass_fn: (queries [w, Hq, D], keys [n, H, D]) -> [H, n] fp32, the sum over the queries and
            over the local query heads of each kv head of causal softmax attention.
        reduce_fn: sums partial [H, n] over the ranks that replicate these kv heads; None when no
            other rank holds them.
        gather_heads_fn: joins the [H, m] of all ranks to [num_heads, m], each head once, in their
            order and bit for bit the same on every rank; None when this rank holds all heads.
        dropped_tokens: tokens of the prompt that did not enter the layer (`propagate`).
        compaction: 0 at prefill, then the number of this compaction of the sequence, from 1.
        masses: [H, n] fp32, the attention that each key got from all queries so far, summed over
            them and the local query heads; None where it is not at hand.
    """

    layer: int
    layers: Layers | int
    prompt_tokens: int
    keys: Tensor
    values: Tensor
    queries: Tensor | None
    scale: float
    heads: Sequence[int]
    num_heads: int
    group_size: int
    mass_fn: Callable[[Tensor, Tensor], Tensor]
    reduce_fn: Callable[[Tensor], Tensor] | None = None
    gather_heads_fn: Callable[[Tensor], Tensor] | None = None
    dropped_tokens: int = 0
    compaction: int = 0
    masses: Tensor | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.layer < len(Layers.of(self.layers))
        assert self.keys.shape[:2] == (self.prompt_tokens, len(self.heads))

    @property
    def original_tokens(self) -> int:
        """The length of the whole prompt, which budgets are counted from."""
        return self.prompt_tokens + self.dropped_tokens

    def window_mass(self) -> Tensor:
        """Attention on each key, [H, n] fp32: mean over the window queries and the whole group."""
        queries = self._queries()
        return self._mass(queries) / (queries.shape[0] * self.group_size)

    def total_mass(self) -> Tensor:
        """Attention on each key, [H, n] fp32: sum over all queries, mean over the whole group."""
        if self.masses is not None:
            return self._reduced(self.masses.clone()) / self.group_size
        queries = self._queries()
        assert queries.shape[0] == self.prompt_tokens, "the sum is over all queries"
        return self._mass(queries) / self.group_size

    def all_heads(self, x: Tensor) -> Tensor:
        """[num_heads, m]: the `x` [H, m] of all ranks, the same bits on every rank."""
        if self.gather_heads_fn is not None:
            return self.gather_heads_fn(x)
        assert len(self.heads) == self.num_heads, "other ranks hold heads, but cannot be asked"
        return x

    def _queries(self) -> Tensor:
        assert self.queries is not None, "the score observes queries, but the worker kept none"
        return self.queries

    def _mass(self, queries: Tensor) -> Tensor:
        """Attention on each key, summed over the queries and the whole group."""
        return self._reduced(self.mass_fn(queries, self.keys))

    def _reduced(self, mass: Tensor) -> Tensor:
        return mass if self.reduce_fn is None else self.reduce_fn(mass)
