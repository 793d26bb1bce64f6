"""A decoder layer, and the ends of the model, on the native CPU kernels (bf16).

Weights are packed once and the originals go, so memory does not double. A layer is two calls
around attention.

Shapes: T packed tokens, S sampled positions, E hidden size, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saqqara.workers.mesh.layout import VocabShard
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.native.decoder_layer import Finish, Mlp, Projection
from saqqara.workers.native.experts import NativeExperts, PackedMlp
from saqqara.workers.native.linear import PackedLinear, RMSNorm
from saqqara.workers.native.step_layers import StepLayers

from .experts import Experts
from .layer import QKV, Layer, LayerWeights, Places
from .norm import rms_norm
from .rotary import RotaryTable


class NativeLayer:
    """Computes a layer with `native.decoder_layer`; see `layer.Layer`."""

    def __init__(self, weights: LayerWeights, rotary: RotaryTable, mesh: Mesh) -> None:
        w = weights

        def norm(weight: Tensor | None) -> RMSNorm | None:
            return None if weight is None else RMSNorm(weight, w.eps)

        self._mesh = mesh
        self._shapes = [(n, w.head_dim) for n in (w.num_query_heads, w.num_kv_heads)]
        qkv = PackedLinear(w.qkv.weight, w.qkv.bias, RMSNorm(w.attention_norm, w.eps))
        self._projection = Projection(
            qkv,
            w.num_query_heads,
            w.num_kv_heads,
            rotary.cos,
            rotary.sin,
            norm(w.query_norm),
            norm(w.key_norm),
        )
        self._output = PackedLinear(w.output.weight, w.output.bias)
        self._mlp = _pack_mlp(w) if w.experts is None else _pack_experts(w, w.experts)
        self._after = (norm(w.attention_post_norm), norm(w.mlp_post_norm))
        self._finish = Finish(self._output, self._mlp, *self._after)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        parts = (self._projection.qkv, self._output, self._mlp)
        return sum(part.num_bytes for part in parts)

    @property
    def ends(self) -> tuple[Projection, Finish]:
        """What stands before attention and after it, for a call of several layers."""
        return self._projection, self._finish

    def project(self, hidden_TE: Tensor, places: Places, out: QKV | None = None) -> QKV:
        """See `Layer.project`."""
        if out is None:
            queries, keys = self._shapes
            new, rows = hidden_TE.new_empty, len(hidden_TE)
            out = QKV(new(rows, *queries), new(rows, *keys), new(rows, *keys))
        self._projection(hidden_TE, places.positions_T, *out)
        return out

    def project_append(
        self, hidden_TE: Tensor, places: Places, k_tokens: Tensor, v_tokens: Tensor, refs_TH: Tensor
    ) -> Tensor:
        """See `Layer.project_append`."""
        q = hidden_TE.new_empty(len(hidden_TE), *self._shapes[0])
        self._projection(hidden_TE, places.positions_T, q, k_tokens, v_tokens, refs_TH)
        return q

    def finish(self, hidden_TE: Tensor, attended_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Layer.finish`."""
        if self._mesh.layout.tensor_size == 1:
            return self._finish(hidden_TE, attended_THD, out)
        out = torch.empty_like(hidden_TE) if out is None else out
        attended = attended_THD.flatten(1)
        for start in range(0, len(out), self._mesh.piece_rows(out)):
            rows = slice(start, start + self._mesh.piece_rows(out))
            self._finish_piece(hidden_TE[rows], attended[rows], out[rows])
        return out

    def _finish_piece(self, hidden: Tensor, attended: Tensor, out: Tensor) -> None:
        """`finish` between the sums over ranks; the kernels write parts of sums where they go."""
        after_attention, after_mlp = self._after
        partial = self._output(attended, out=self._mesh.partial_like(out))
        self._add(partial, after_attention, hidden, out)
        partial = self._mlp(out, out=self._mesh.partial_like(out))
        self._add(partial, after_mlp, out, out)

    def _add(self, partial: Tensor, norm: RMSNorm | None, residual: Tensor, out: Tensor) -> None:
        """The ranks' sum, normalised if there is a norm, plus what was there before."""
        if norm is None:
            self._mesh.all_reduce(partial, residual=residual, out=out)
        else:
            summed = self._mesh.all_reduce(partial, out=torch.empty_like(partial))
            torch.add(rms_norm(summed, norm.weight, norm.eps), residual, out=out)

    def activation_bytes_per_token(self, itemsize: int) -> int:
        """See `Layer.activation_bytes_per_token`."""
        hidden = self._mlp.num_inputs
        finish = hidden + self._mlp.activation_numbers
        return max(self._projection.qkv.num_outputs + hidden, finish) * itemsize


def _pack_mlp(w: LayerWeights) -> Mlp:
    of_gates, down = w.mlp
    norm = RMSNorm(w.mlp_norm, w.eps)
    gate_up = PackedLinear(of_gates.weight, of_gates.bias, norm, w.activation)
    return Mlp(gate_up, PackedLinear(down.weight, down.bias))


def _pack_experts(w: LayerWeights, experts: Experts) -> NativeExperts:
    """An expert after another; the gate of the shared one becomes the router's last row."""

    def packed(gate_up: Tensor, down: Tensor) -> PackedMlp:
        return PackedMlp(PackedLinear(gate_up, gated=w.activation), PackedLinear(down))

    router, shared = experts.router, experts.shared
    mlp = None
    if shared is not None:
        mlp = packed(shared.gate_up.weight, shared.down.weight)
        router = torch.cat((router, shared.gate))
    return NativeExperts(
        RMSNorm(w.mlp_norm, w.eps),
        router,
        [packed(*pair) for pair in zip(experts.gate_up, experts.down, strict=True)],
        mlp,
        experts.per_token,
        experts.normalised,
    )


def step_layers(layers: Iterable[Layer], scale: float, softcap: float) -> StepLayers:
    """Layers, all of them native, for calls that go through several; see `StepLayers`."""
    ends = [layer.ends for layer in layers if isinstance(layer, NativeLayer)]
    return StepLayers(ends, scale, softcap)


@dataclass(frozen=True)
class NativeHead:
    """Logits of the whole vocabulary; `packed` has the model's last norm in front of it."""

    packed: PackedLinear
    shard: VocabShard
    mesh: Mesh

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.packed.num_bytes

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden [S, E] of the last layer -> logits fp32 [S, V] on every tensor rank."""
        logits = self.mesh.all_gather_last(self.packed.logits(hidden))
        return logits[..., : self.shard.vocab_size]


@dataclass(frozen=True)
class NativeEmbedding:
    """Token embedding that reads the rows of a tied, packed head."""

    packed: PackedLinear
    shard: VocabShard
    mesh: Mesh

    @property
    def num_bytes(self) -> int:
        """The weight is the head's."""
        return 0

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> hidden states [T, E], the same on all tensor ranks."""
        if self.mesh.layout.tensor_size == 1:
            return self.packed.rows(token_ids)
        local = token_ids - self.shard.start
        foreign = (local < 0) | (local >= self.shard.stop - self.shard.start)
        hidden = self.packed.rows(local.masked_fill(foreign, 0))
        return self.mesh.all_reduce(hidden.masked_fill_(foreign[:, None], 0))
