"""The weights of one rank's part of a model, counted."""

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

    @property
    def num_channels(self) -> int:
        """Its MLP channels."""
        size, tensor_size = self.spec.intermediate_size, self.layout.tensor_size
        return len(intermediate_shard(size, tensor_size, self.tensor_rank))

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
    def mlp_numbers(self) -> int:
        """Weights of one layer's MLP: gate, up, down."""
        spec, inner = self.spec, self.num_channels
        biases = 2 * inner if spec.mlp_bias else 0
        if spec.mlp_bias and self.tensor_rank == 0:
            biases += spec.hidden_size
        return 3 * inner * spec.hidden_size + biases

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
        layer = self.attention_numbers + self.mlp_numbers
        num_bytes = (len(self.layers) * layer + self.end_numbers) * self.dtype.itemsize
        if self.spec.norm_offset:  # such norms are held in fp32
            norms = len(self.layers) * self.norm_numbers
            norms += self.spec.hidden_size if self.is_last_stage else 0
            num_bytes += norms * (_FLOAT_BYTES - self.dtype.itemsize)
        return num_bytes
