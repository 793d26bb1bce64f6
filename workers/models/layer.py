"""One decoder layer's shard: its weights, and how torch, or torch and Triton, computes it.

Shapes: T packed tokens, E hidden size, Hq local query heads, H local kv heads, D head dim,
F local intermediate size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from saqqara.workers.mesh.mesh import Mesh

from .experts import Experts, gated
from .linear import Linear
from .norm import rms_norm
from .reading.fields import Activation
from .rotary import RotaryTable, rotate

if TYPE_CHECKING:
    from saqqara.workers.kernels.decode import PagedRows
    from saqqara.workers.kernels.rotary import Rotation


class Places(NamedTuple):
    """Where tokens stand: positions int64 [T], and for layers that want them the angles there.

    `angles` are what `RotaryTable.lookup` gives, fp32 [T, 1, D] each, by the decoder's tables.
    """

    positions_T: Tensor
    angles: tuple[tuple[Tensor, Tensor], ...] = ()

    def of(self, tokens: slice) -> "Places":
        """The places of some of the tokens."""
        angles = tuple((cos[tokens], sin[tokens]) for cos, sin in self.angles)
        return Places(self.positions_T[tokens], angles)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.positions_T.nbytes + sum(cos.nbytes + sin.nbytes for cos, sin in self.angles)


class QKV(NamedTuple):
    """Queries [T, Hq, D], keys [T, H, D] and values [T, H, D], the first two rotated."""

    q: Tensor
    k: Tensor
    v: Tensor

    def of(self, tokens: slice) -> "QKV":
        """Views of some of the tokens."""
        return QKV(self.q[tokens], self.k[tokens], self.v[tokens])


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer's shard.

    `qkv` maps E to (Hq + 2 H) D, `gate_up` E to 2 F; `output` and `down` give partial sums that
    are reduced over the tensor group. The norms behind them are there in some families only. A
    layer with `experts` has them in place of `gate_up` and `down`.
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
    gate_up: Linear | None
    down: Linear | None
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    activation: Activation = "silu"
    experts: Experts | None = None

    @property
    def mlp(self) -> tuple[Linear, Linear]:
        """Gate and up, and down, of a layer that is known to have no experts."""
        assert self.gate_up is not None
        assert self.down is not None
        return self.gate_up, self.down

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        norms = (
            *(self.attention_norm, self.attention_post_norm, self.query_norm, self.key_norm),
            *(self.mlp_norm, self.mlp_post_norm),
        )
        parts = (self.qkv, self.output, self.gate_up, self.down, self.experts)
        norm_bytes = sum(norm.nbytes for norm in norms if norm is not None)
        return norm_bytes + sum(part.num_bytes for part in parts if part is not None)


class Layer(Protocol):
    """What computes a layer around its attention."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        ...

    def project(self, hidden_TE: Tensor, places: Places, out: QKV | None = None) -> QKV:
        """Queries, keys and values of hidden states; in `out` if given."""
        ...

    def project_append(
        self, hidden_TE: Tensor, places: Places, k_tokens: Tensor, v_tokens: Tensor, refs_TH: Tensor
    ) -> Tensor:
        """Queries [T, Hq, D]; keys and values go straight to pages.

        Args:
            hidden_TE: [T, E].
            places: of the T tokens.
            k_tokens: all pages of keys, token by token, [P', D].
            v_tokens: the same of values.
            refs_TH: int64 [T, H], the rows of `k_tokens` and `v_tokens` to write.
        """
        ...

    def finish(self, hidden_TE: Tensor, attended_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states after the layer, from those before it and the attention output.

        In `out` if given, which may be `hidden_TE`.
        """
        ...

    def activation_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of the largest temporaries of `project` or `finish`, per token."""
        ...


class TorchLayer:
    """Computes a layer with torch, on any device and in any dtype.

    Args:
        weights: of the layer.
        mesh: this rank's place.
        table: which of the decoder's rotary tables is the layer's.
    """

    def __init__(self, weights: LayerWeights, mesh: Mesh, table: int = 0) -> None:
        self._weights = weights
        self._mesh = mesh
        self._table = table

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self._weights.num_bytes

    def project(self, hidden_TE: Tensor, places: Places, out: QKV | None = None) -> QKV:
        """See `Layer.project`."""
        w = self._weights
        angles = places.angles[self._table]
        qkv = w.qkv(rms_norm(hidden_TE, w.attention_norm, w.eps))
        qkv = qkv.view(-1, w.num_query_heads + 2 * w.num_kv_heads, w.head_dim)
        values = w.num_query_heads + w.num_kv_heads
        q, k, v = qkv[:, : w.num_query_heads], qkv[:, w.num_query_heads : values], qkv[:, values:]
        if w.query_norm is not None and w.key_norm is not None:
            q, k = rms_norm(q, w.query_norm, w.eps), rms_norm(k, w.key_norm, w.eps)
        rotated = QKV(rotate(q, *angles), rotate(k, *angles), v)
        if out is None:
            return rotated
        for target, source in zip(out, rotated, strict=True):
            target.copy_(source)
        return out

    def project_append(
        self, hidden_TE: Tensor, places: Places, k_tokens: Tensor, v_tokens: Tensor, refs_TH: Tensor
    ) -> Tensor:
        """See `Layer.project_append`."""
        q, k, v = self.project(hidden_TE, places)
        refs, dim = refs_TH.flatten(), k.shape[-1]
        k_tokens.index_copy_(0, refs, k.reshape(-1, dim))
        v_tokens.index_copy_(0, refs, v.reshape(-1, dim))
        return q

    def finish(self, hidden_TE: Tensor, attended_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Layer.finish`."""
        w = self._weights
        attended = attended_THD.reshape(attended_THD.shape[0], -1)
        hidden = self._add(w.output(attended), w.attention_post_norm, hidden_TE)
        normed = rms_norm(hidden, w.mlp_norm, w.eps)
        if w.experts is not None:
            return self._add(w.experts(normed), w.mlp_post_norm, hidden, out)
        gate_up, down = w.mlp
        partial = down(gated(gate_up(normed), w.activation))
        return self._add(partial, w.mlp_post_norm, hidden, out)

    def activation_bytes_per_token(self, itemsize: int) -> int:
        """See `Layer.activation_bytes_per_token`."""
        w = self._weights
        hidden = w.attention_norm.shape[0]
        project = hidden + 2 * w.qkv.weight.shape[0]  # normed + fused + rotated
        if w.experts is not None:
            return max(project, 3 * hidden + w.experts.activation_numbers) * itemsize
        finish = 3 * hidden + 2 * w.mlp[0].weight.shape[0]  # hidden, sum, normed + gate-up, act
        return max(project, finish) * itemsize

    def _add(
        self, partial: Tensor, norm: Tensor | None, residual: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The ranks' sum, normalised if there is a norm, plus what was there before."""
        if norm is None:
            return self._mesh.all_reduce(partial, residual=residual, out=out)
        normed = rms_norm(self._mesh.all_reduce(partial), norm, self._weights.eps)
        return torch.add(normed, residual, out=out)


class TritonLayer:
    """Computes a layer with torch's products, and all between them in Triton kernels.

    Two sums, norms and rotations are one launch each where torch takes several. The last sum of a
    layer on one rank is part of its product, and rounded once.

    Args:
        weights: of the layer.
        rotary: cosines and sines of all positions.
        mesh: this rank's place.
    """

    def __init__(self, weights: LayerWeights, rotary: RotaryTable, mesh: Mesh) -> None:
        from saqqara.workers.kernels import activation, norm
        from saqqara.workers.kernels import rotary as rotations

        self._norm, self._activation, self._rotations = norm, activation, rotations
        self._weights = weights
        self._rotary = rotary
        self._mesh = mesh

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self._weights.num_bytes

    def project(self, hidden_TE: Tensor, places: Places, out: QKV | None = None) -> QKV:
        """See `Layer.project`; without `out`, views of one tensor."""
        w, qkv, rotation = self._weights, self._fused(hidden_TE), self._rotation(places)
        if out is not None:
            self._rotations.rotate_to(qkv, w.num_kv_heads, rotation, *out)
            return out
        self._rotations.rotate_in_place(qkv, w.num_kv_heads, rotation)
        values = w.num_query_heads + w.num_kv_heads
        return QKV(qkv[:, : w.num_query_heads], qkv[:, w.num_query_heads : values], qkv[:, values:])

    def project_append(
        self, hidden_TE: Tensor, places: Places, k_tokens: Tensor, v_tokens: Tensor, refs_TH: Tensor
    ) -> Tensor:
        """See `Layer.project_append`; what has a negative ref is not stored."""
        return self._rotations.rotate_append(
            self._fused(hidden_TE),
            self._weights.num_kv_heads,
            self._rotation(places),
            k_tokens,
            v_tokens,
            refs_TH,
        )

    def project_append_rows(self, hidden_TE: Tensor, places: Places, rows: "PagedRows") -> Tensor:
        """Queries [T, Hq, D]; keys and values become the last tokens of their rows.

        Args:
            hidden_TE: [T, E].
            places: of the T tokens.
            rows: those of the T tokens, with slots, a negative one for a token that is not stored;
                their lengths count the tokens already.
        """
        return self._rotations.rotate_append_rows(
            self._fused(hidden_TE), self._weights.num_kv_heads, self._rotation(places), rows
        )

    def finish(self, hidden_TE: Tensor, attended_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Layer.finish`."""
        w, mesh = self._weights, self._mesh
        partial = mesh.all_reduce(w.output(attended_THD.flatten(1)))
        total = partial if out is None else out
        normed = self._norm.add_rms_norm(partial, hidden_TE, w.mlp_norm, w.eps, total)
        gate_up, down = w.mlp
        activated = self._activation.silu_mul(gate_up(normed))
        if mesh.layout.tensor_size == 1 and down.bias is None:
            return torch.addmm(total, activated, down.weight.t(), out=total)
        return total.add_(mesh.all_reduce(down(activated)))

    def activation_bytes_per_token(self, itemsize: int) -> int:
        """See `Layer.activation_bytes_per_token`."""
        w = self._weights
        hidden = w.attention_norm.shape[0]
        project = hidden + w.qkv.weight.shape[0]  # normed, fused
        finish = 2 * hidden + 3 * w.mlp[0].weight.shape[0] // 2  # sum, normed, gate-up, activated
        return max(project, finish) * itemsize

    def _fused(self, hidden_TE: Tensor) -> Tensor:
        """Queries, keys and values [T, Hq + 2 H, D], not yet rotated."""
        w = self._weights
        qkv = w.qkv(self._norm.rms_norm(hidden_TE, w.attention_norm, w.eps))
        return qkv.view(-1, w.num_query_heads + 2 * w.num_kv_heads, w.head_dim)

    def _rotation(self, places: Places) -> "Rotation":
        w, rotary = self._weights, self._rotary
        return self._rotations.Rotation(
            places.positions_T, rotary.cos, rotary.sin, w.query_norm, w.key_norm, w.eps
        )
