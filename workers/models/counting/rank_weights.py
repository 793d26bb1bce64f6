"""The weights of one rank's part of a model, counted."""

import math
from dataclasses import dataclass

from saqqara.workers.mesh.layout import HeadShard, MeshLayout, intermediate_shard, vocab_shard
from saqqara.workers.models.spec import ItemSize, ModelSpec

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class RankWeights:
    """One rank's part.

    Attributes:
        spec: sizes of the whole model.
        dtype: of weights, keys and values.
        layout: of the replica.
        rank: this one's place in it.
        layers: numbers of its layers.
        heads: its query and kv heads.
    """

    spec: ModelSpec
    dtype: ItemSize
    layout: MeshLayout
    rank: int
    layers: range
    heads: HeadShard

    @property
    def tensor_rank(self) -> int:
        """Its place within its stage."""
        return self.layout.tensor_rank(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """Whether it has the embedding."""
        return self.layout.pipeline_rank(self.rank) == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it has the head."""
        return self.layout.pipeline_rank(self.rank) == self.layout.pipeline_size - 1

    def _channels(self, size: int) -> int:
        """Its channels of an MLP of that size."""
        return len(intermediate_shard(size, self.layout.tensor_size, self.tensor_rank))

    @property
    def num_channels(self) -> int:
        """Its MLP channels that a token goes through, in the layer with the most."""
        experts = self.spec.experts
        if experts is None:
            return self._channels(self.spec.intermediate_size)
        shared = experts.shared_intermediate_size
        routed = experts.per_token * self._channels(experts.intermediate_size)
        mixed = routed + (self._channels(shared) if shared else 0)
        has_plain = any(not self.spec.has_experts(layer) for layer in self.layers)
        return max(mixed, self._channels(self.spec.intermediate_size)) if has_plain else mixed

    @property
    def norm_numbers(self) -> int:
        """Weights of one layer's norms."""
        spec = self.spec
        of_hidden = 4 if spec.post_norms else 2
        return of_hidden * spec.hidden_size + (2 * spec.head_dim if spec.qk_norm else 0)

    @property
    def attention_numbers(self) -> int:
        """Weights of one layer around its MLP: q, k, v, output and all norms."""
        spec, width = self.spec, self.spec.head_dim
        queries, rows = len(self.heads.query), len(self.heads.query) + 2 * len(self.heads.kv)
        biases = rows * width if spec.qkv_bias else 0
        if spec.output_bias and self.tensor_rank == 0:  # so that the sum over ranks has it once
            biases += spec.hidden_size
        return (rows + queries) * width * spec.hidden_size + self.norm_numbers + biases

    @property
    def plain_mlp_numbers(self) -> int:
        """Weights of a layer's plain MLP: gate, up, down."""
        spec, inner = self.spec, self._channels(self.spec.intermediate_size)
        biases = 2 * inner if spec.mlp_bias else 0
        if spec.mlp_bias and self.tensor_rank == 0:
            biases += spec.hidden_size
        return 3 * inner * spec.hidden_size + biases

    def mlp_numbers(self, layer: int, num_experts: float | None = None) -> float:
        """Weights of a layer's MLP, or of so many of its experts and what all tokens go through.

        `num_experts` None: all. It changes nothing where the layer's MLP is a plain one.
        """
        spec, experts = self.spec, self.spec.experts
        if experts is None or layer not in experts.layers:
            return self.plain_mlp_numbers
        count = experts.num_experts if num_experts is None else num_experts
        channels = count * self._channels(experts.intermediate_size)
        others = experts.num_experts  # the router
        if experts.shared_intermediate_size:
            channels += self._channels(experts.shared_intermediate_size)
            others += 1  # what weighs the shared expert
        return (3 * channels + others) * spec.hidden_size

    def mean_mlp_numbers(self, num_tokens: float | None = None) -> float:
        """Weights of an MLP that so many tokens go through between them; the mean of its layers.

        Each token's experts are as if drawn at random. None: those that one token multiplies with.
        """
        experts, layers = self.spec.experts, self.layers
        if experts is None:
            return self.plain_mlp_numbers
        hit: float = experts.per_token
        if num_tokens is not None:
            missed = math.pow(1 - experts.per_token / experts.num_experts, num_tokens)
            hit = experts.num_experts * (1 - missed)
        return sum(self.mlp_numbers(layer, hit) for layer in layers) / max(len(layers), 1)

    @property
    def head_numbers(self) -> int:
        """Weights of its part of the head (the embedding's is as large), padding included."""
        spec = self.spec
        shard = vocab_shard(spec.vocab_size, self.layout.tensor_size, self.tensor_rank)
        return shard.size * spec.hidden_size

    @property
    def end_numbers(self) -> int:
        """Weights of embedding, final norm and head, where it has them; a tied one counts once."""
        num_ends = int(self.is_first_stage) + int(self.is_last_stage)
        if self.spec.tie_embeddings:
            num_ends = min(num_ends, 1)
        norm = self.spec.hidden_size if self.is_last_stage else 0
        return num_ends * self.head_numbers + norm

    def weight_bytes(self) -> int:
        """Bytes of all weights as torch holds them."""
        mlps = int(sum(self.mlp_numbers(layer) for layer in self.layers))
        around = len(self.layers) * self.attention_numbers
        num_bytes = (around + mlps + self.end_numbers) * self.dtype.itemsize
        if self.spec.norm_offset:  # such norms are held in fp32
            norms = len(self.layers) * self.norm_numbers
            norms += self.spec.hidden_size if self.is_last_stage else 0
            num_bytes += norms * (_FLOAT_BYTES - self.dtype.itemsize)
        return num_bytes


def check_channels(spec: ModelSpec, tensor_size: int) -> None:
    """Raise a ValueError unless every MLP has channels for so many ranks."""
    sizes, experts = [spec.intermediate_size], spec.experts
    if experts is not None:
        shared = experts.shared_intermediate_size
        sizes = [experts.intermediate_size, *([shared] if shared else [])]
        sizes += [spec.intermediate_size] if len(experts.layers) < spec.num_layers else []
    for size in sizes:
        intermediate_shard(size, tensor_size, 0)
