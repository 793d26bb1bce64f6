"""The one decoder: Llama-class layers of one rank, with embedding and head where it has them.

Nothing here knows about pages, batches or plans; `workers/passes/` walks the layers. How a layer
is computed is `layer.py` (torch) or `native_layer.py` (our CPU kernels).

Shapes: T packed tokens, S sampled positions, E hidden size, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from saqqara.workers.mesh.layout import HeadShard, VocabShard, intermediate_shard, vocab_shard
from saqqara.workers.mesh.mesh import Mesh

from .embedding import LMHead, ScaledEmbedding, VocabEmbedding, read_vocab_rows
from .experts import load_experts
from .layer import Layer, LayerWeights, Places, TorchLayer, TritonLayer
from .linear import Linear, column_parallel, in_order, reordered, row_parallel
from .norm import read_norm, rms_norm
from .rotary import RotaryTable, channel_order
from .spec import ModelSpec
from .weights import Rows, WeightSource, attention_rows, mlp_rows


class End(Protocol):
    """The embedding (token ids to hidden states) or the head (hidden states to logits).

    The head takes normalised hidden states, a native one those of the last layer.
    """

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight; 0 where it is another end's."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Int64 [T] -> [T, E], or [S, E] -> fp32 [S, V]."""
        ...


class Decoder:
    """Layers `[start_layer, stop_layer)` on one rank, with embedding and head at the ends.

    Attributes:
        layers: this rank's layers, `layers[i]` being layer `start_layer + i` of the model.
        tables: rotary tables of all kinds that these layers need.
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
        linear_backend: str = "torch",
    ) -> None:
        self.spec = spec
        self.mesh = mesh
        self.start_layer = layer_range.start
        self.stop_layer = layer_range.stop
        ropes = [spec.rope_of(layer) for layer in layer_range]
        self._ropes = tuple(dict.fromkeys(ropes))
        self.tables = tuple(
            RotaryTable(rope, spec.head_dim, max_position, source.device) for rope in self._ropes
        )
        self._native = linear_backend == "native"
        self._triton = linear_backend == "triton"
        self._rms_norm = rms_norm
        if self._triton:
            from saqqara.workers.kernels import norm

            self._rms_norm = norm.rms_norm
        self.layers = tuple(
            self._compute(_load_layer(spec, mesh, heads, source, layer), self._ropes.index(rope))
            for layer, rope in zip(layer_range, ropes, strict=True)
        )
        self.final_norm: Tensor | None = None
        if mesh.is_last_stage:
            name = spec.family_flags.names.final_norm
            self.final_norm = read_norm(source, name, spec.norm_offset)
        self.head, embedding = self._load_ends(source)
        if embedding is not None and spec.embedding_scale != 1:
            embedding = ScaledEmbedding.of(embedding, spec.embedding_scale, source.dtype)
        self.embedding = embedding

    def _compute(self, weights: LayerWeights, table: int) -> Layer:
        if self._native:
            from .native_layer import NativeLayer

            return NativeLayer(weights, self.tables[table], self.mesh)
        if self._triton:
            return TritonLayer(weights, self.tables[table], self.mesh)
        return TorchLayer(weights, self.mesh, table)

    def _load_ends(self, source: WeightSource) -> tuple[End | None, End | None]:
        """Head and embedding, where this rank has them; a tied weight is read once."""
        spec, mesh, names = self.spec, self.mesh, self.spec.family_flags.names
        vocab = vocab_shard(spec.vocab_size, mesh.layout.tensor_size, mesh.tensor_rank)
        head: End | None = None
        if mesh.is_last_stage:
            name = names.embedding if spec.tie_embeddings else names.head
            head, tied = self._make_head(read_vocab_rows(source, name, vocab), vocab)
            if mesh.is_first_stage and spec.tie_embeddings:
                return head, tied
        if not mesh.is_first_stage:
            return head, None
        weight = read_vocab_rows(source, names.embedding, vocab)
        return head, VocabEmbedding(weight, vocab, mesh)

    def _make_head(self, weight: Tensor, vocab: VocabShard) -> tuple[End, End]:
        """The head, and an embedding that shares its weight."""
        if self._native:
            from saqqara.workers.native.linear import PackedLinear, RMSNorm

            from .native_layer import NativeEmbedding, NativeHead

            assert self.final_norm is not None
            packed = PackedLinear(weight, norm=RMSNorm(self.final_norm, self.spec.rms_norm_eps))
            return (
                NativeHead(packed, vocab, self.mesh),
                NativeEmbedding(packed, vocab, self.mesh),
            )
        head = LMHead(weight, vocab, self.mesh)
        return head, VocabEmbedding(weight, vocab, self.mesh, tied=True)

    def places(self, positions_T: Tensor) -> Places:
        """Positions int64 [T], with what the layers need to rotate queries and keys there."""
        looks_up = self._native or self._triton
        if looks_up:
            return Places(positions_T)
        return Places(positions_T, tuple(table.lookup(positions_T) for table in self.tables))

    def logits(self, hidden_SE: Tensor) -> Tensor:
        """Logits, fp32 [S, V], of the last layer's hidden states (last stage only)."""
        assert self.head is not None
        assert self.final_norm is not None
        if not self._native:  # whose head normalises in the same call
            hidden_SE = self._rms_norm(hidden_SE, self.final_norm, self.spec.rms_norm_eps)
        logits_SV = self.head(hidden_SE)
        if cap := self.spec.logit_softcap:
            return logits_SV.div(cap).tanh_().mul_(cap)
        return logits_SV

    def weight_bytes(self) -> int:
        """Bytes of all weights on this rank."""
        norm = 0 if self.final_norm is None else self.final_norm.nbytes
        parts = (*self.layers, self.embedding, self.head)
        return norm + sum(part.num_bytes for part in parts if part is not None)


def _load_layer(
    spec: ModelSpec, mesh: Mesh, heads: HeadShard, source: WeightSource, layer: int
) -> LayerWeights:
    names, dim = spec.family_flags.names, spec.head_dim
    query = range(heads.query.start * dim, heads.query.stop * dim)
    kv = range(heads.kv.start * dim, heads.kv.stop * dim)

    def name(part: str) -> str:
        return names.of_layer(layer, part)

    def norm(part: str) -> Tensor:
        return read_norm(source, name(part), spec.norm_offset)

    def by_columns(*parts: tuple[Rows, range], has_bias: bool) -> Linear:
        held = [part.of(rows) for part, rows in parts]
        return column_parallel(source, [(name(part), rows) for part, rows in held], has_bias)

    def by_rows(part: str, columns: range, has_bias: bool) -> Linear:
        return row_parallel(source, name(part), columns, has_bias, mesh.tensor_rank)

    def of_heads(part: str) -> Tensor | None:
        return in_order(norm(part), order) if spec.qk_norm else None

    gate_up = down = experts = None
    if spec.has_experts(layer):
        experts = load_experts(spec, mesh, source, layer)
    else:
        inner = intermediate_shard(
            spec.intermediate_size, mesh.layout.tensor_size, mesh.tensor_rank
        )
        gate_up = by_columns(*((part, inner) for part in mlp_rows(spec)), has_bias=spec.mlp_bias)
        down = by_rows(names.down, inner, spec.mlp_bias)
    order = channel_order(spec.rope_of(layer), dim)
    rows = zip(attention_rows(spec), (query, kv, kv), strict=True)
    return LayerWeights(
        num_query_heads=len(heads.query),
        num_kv_heads=len(heads.kv),
        head_dim=dim,
        eps=spec.rms_norm_eps,
        attention_norm=norm(names.attention_norm),
        qkv=reordered(
            by_columns(*rows, has_bias=spec.qkv_bias), len(heads.query) + len(heads.kv), order
        ),
        query_norm=of_heads(names.query_norm),
        key_norm=of_heads(names.key_norm),
        output=by_rows(names.output, query, spec.output_bias),
        mlp_norm=norm(names.mlp_norm),
        gate_up=gate_up,
        down=down,
        attention_post_norm=norm(names.attention_post_norm) if spec.post_norms else None,
        mlp_post_norm=norm(names.mlp_post_norm) if spec.post_norms else None,
        activation=spec.activation,
        experts=experts,
    )


def chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Slices that cut `num_tokens` into pieces of at most `chunk_tokens`."""
    starts = range(0, num_tokens, chunk_tokens)
    return [slice(start, min(start + chunk_tokens, num_tokens)) for start in starts]
