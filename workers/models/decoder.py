"""The one decoder: Llama-class layers of one rank, computed chunk by chunk over packed tokens.

Nothing here knows about pages, batches or plans; `workers/worker.py` walks the layers.

Shapes: T packed tokens, N sequences, S sampled positions, E hidden size, Hq local query heads,
H local kv heads, D head dim, F local intermediate size, V padded vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import silu

from saqqara.workers.layers.embedding import LMHead, VocabEmbedding, read_vocab_rows
from saqqara.workers.layers.linear import Linear, column_parallel, row_parallel
from saqqara.workers.layers.norm import rms_norm
from saqqara.workers.layers.rotary import RotaryTable, rotate
from saqqara.workers.mesh import HeadShard, Mesh, intermediate_shard, vocab_shard

from .spec import ModelSpec
from .weights import WeightSource


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer's shard and what they compute.

    `qkv` maps E to (Hq + 2 H) D, `gate_up` E to 2 F; `output` and `down` give partial sums that
    are reduced over the tensor group.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    attention_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    def project(
        self, hidden_TE: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, Hq, D], rotated keys and values [T, H, D] of hidden states.

        `angles` are the cosines and sines of the tokens' positions, [T, 1, D/2] each.
        """
        qkv = self.qkv(rms_norm(hidden_TE, self.attention_norm, self.eps))
        qkv = qkv.view(-1, self.num_query_heads + 2 * self.num_kv_heads, self.head_dim)
        values = self.num_query_heads + self.num_kv_heads
        q, k, v = (
            qkv[:, : self.num_query_heads],
            qkv[:, self.num_query_heads : values],
            qkv[:, values:],
        )
        if self.query_norm is not None and self.key_norm is not None:
            q = rms_norm(q, self.query_norm, self.eps)
            k = rms_norm(k, self.key_norm, self.eps)
        return rotate(q, *angles), rotate(k, *angles), v

    def finish(self, hidden_TE: Tensor, attended_THD: Tensor, mesh: Mesh) -> Tensor:
        """Hidden states after the layer, from those before it and the attention output."""
        attended = attended_THD.reshape(attended_THD.shape[0], -1)
        hidden = hidden_TE + mesh.all_reduce(self.output(attended))
        gate, up = self.gate_up(rms_norm(hidden, self.mlp_norm, self.eps)).chunk(2, dim=-1)
        return hidden + mesh.all_reduce(self.down(silu(gate).mul_(up)))

    def activation_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of the largest temporaries of `project` or `finish`, per token of a chunk."""
        hidden = self.attention_norm.shape[0]
        project = hidden + 2 * self.qkv.weight.shape[0]  # normed + fused + rotated
        finish = 3 * hidden + 2 * self.gate_up.weight.shape[0]  # hidden, sum, normed + gate-up, act
        return max(project, finish) * itemsize


class Decoder:
    """Layers `[start_layer, stop_layer)` on one rank, with embedding and head at the ends.

    Attributes:
        layers: this rank's layers, `layers[i]` being layer `start_layer + i` of the model.
        embedding: on the first stage, token ids [T] -> hidden [T, E].
        head: on the last stage, hidden [S, E] -> logits fp32 [S, vocab_size].
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        heads: HeadShard,
        layer_range: range,
        source: WeightSource,
        max_position: int,
    ) -> None:
        self.spec = spec
        self.mesh = mesh
        self.start_layer = layer_range.start
        self.stop_layer = layer_range.stop
        self.rotary = RotaryTable(spec.rope, spec.head_dim, max_position, source.device)
        self.layers = tuple(_load_layer(spec, mesh, heads, source, n) for n in layer_range)
        names = spec.family_flags.names
        vocab = vocab_shard(spec.vocab_size, mesh.layout.tensor_size, mesh.tensor_rank)
        self.embedding: VocabEmbedding | None = None
        self.head: LMHead | None = None
        self.final_norm: Tensor | None = None
        embedding_weight: Tensor | None = None
        if mesh.is_first_stage or (mesh.is_last_stage and spec.tie_embeddings):
            embedding_weight = read_vocab_rows(source, names.embedding, vocab)
        if mesh.is_first_stage:
            assert embedding_weight is not None
            self.embedding = VocabEmbedding(embedding_weight, vocab, mesh)
        if mesh.is_last_stage:
            tied = embedding_weight if spec.tie_embeddings else None
            head_weight = read_vocab_rows(source, names.head, vocab) if tied is None else tied
            self.head = LMHead(head_weight, vocab, mesh)
            self.final_norm = source.read(names.final_norm)

    def logits(self, hidden_SE: Tensor) -> Tensor:
        """Logits, fp32 [S, vocab_size], of the last layer's hidden states (last stage only)."""
        assert self.head is not None
        assert self.final_norm is not None
        return self.head(rms_norm(hidden_SE, self.final_norm, self.spec.rms_norm_eps))

    def weight_bytes(self) -> int:
        """Bytes of all weights on this rank; a tied embedding counts once."""
        tensors: list[Tensor] = []
        for layer in self.layers:
            tensors += [layer.attention_norm, layer.mlp_norm]
            tensors += [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                tensors += [t for t in (linear.weight, linear.bias) if t is not None]
        tensors += [part.weight for part in (self.embedding, self.head) if part is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def _load_layer(
    spec: ModelSpec, mesh: Mesh, heads: HeadShard, source: WeightSource, layer: int
) -> DecoderLayer:
    names, dim = spec.family_flags.names, spec.head_dim
    query = range(heads.query.start * dim, heads.query.stop * dim)
    kv = range(heads.kv.start * dim, heads.kv.stop * dim)
    inner = intermediate_shard(spec.intermediate_size, mesh.layout.tensor_size, mesh.tensor_rank)

    def name(part: str) -> str:
        return names.of_layer(layer, part)

    def by_columns(*parts: tuple[str, range], has_bias: bool) -> Linear:
        return column_parallel(source, [(name(part), rows) for part, rows in parts], has_bias)

    def by_rows(part: str, columns: range, has_bias: bool) -> Linear:
        return row_parallel(source, name(part), columns, has_bias, mesh.tensor_rank)

    return DecoderLayer(
        num_query_heads=len(heads.query),
        num_kv_heads=len(heads.kv),
        head_dim=dim,
        eps=spec.rms_norm_eps,
        attention_norm=source.read(name(names.attention_norm)),
        qkv=by_columns(
            (names.query, query), (names.key, kv), (names.value, kv), has_bias=spec.qkv_bias
        ),
        query_norm=source.read(name(names.query_norm)) if spec.qk_norm else None,
        key_norm=source.read(name(names.key_norm)) if spec.qk_norm else None,
        output=by_rows(names.output, query, spec.output_bias),
        mlp_norm=source.read(name(names.mlp_norm)),
        gate_up=by_columns((names.gate, inner), (names.up, inner), has_bias=spec.mlp_bias),
        down=by_rows(names.down, inner, spec.mlp_bias),
    )


def chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Slices that cut `num_tokens` into pieces of at most `chunk_tokens`."""
    starts = range(0, num_tokens, chunk_tokens)
    return [slice(start, min(start + chunk_tokens, num_tokens)) for start in starts]
