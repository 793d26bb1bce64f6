"""Mixture of experts: which experts a token goes through, and their products.

Every rank has a part of each expert's channels, as of a plain MLP, and all of the router, so that
ranks agree on the experts and their results are parts of one sum.

Shapes: T packed tokens, E hidden size, N experts, K experts of a token, F local channels of one.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import gelu, grouped_mm, linear, silu, softmax

from saqqara.workers.mesh.layout import intermediate_shard
from saqqara.workers.mesh.mesh import Mesh

from .linear import Linear, column_parallel, row_parallel
from .reading.fields import Activation
from .spec import ModelSpec
from .weights import WeightSource

_STRIDE_BYTES = 16  # that torch's grouped products want


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` of [..., 2 F], gates first; a new tensor [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
    return activated.mul_(up)


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that all tokens go through; `gate` [1, E] says how much of it each takes."""

    gate_up: Linear
    down: Linear
    gate: Tensor


@dataclass(frozen=True)
class Experts:
    """One layer's shard of all experts.

    Attributes:
        router: [N, E].
        gate_up: [N, 2 F, E], of each expert the gate's rows first.
        down: [N, E, F].
        per_token: K.
        normalised: whether the weights of a token's experts sum to 1.
        shared: None: there is none.
        activation: of the gates.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    per_token: int
    normalised: bool
    shared: SharedExpert | None
    activation: Activation

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        shared = self.shared
        more = 0 if shared is None else shared.gate_up.num_bytes + shared.down.num_bytes
        more += 0 if shared is None else shared.gate.nbytes
        return self.router.nbytes + self.gate_up.nbytes + self.down.nbytes + more

    @property
    def activation_numbers(self) -> int:
        """Numbers of the temporaries, per token, beside the hidden states that come in."""
        hidden, twice = self.router.shape[1], self.gate_up.shape[1]
        routed = self.per_token * (2 * hidden + 2 * twice)  # in, out, gate-up, activated
        shared = 0 if self.shared is None else 2 * self.shared.gate_up.weight.shape[0] + hidden
        return routed + shared + 2 * hidden  # sums, wide

    def __call__(self, x_TE: Tensor) -> Tensor:
        """This rank's part of the sum, [T, E], of normalised hidden states."""
        weights_TK, experts_TK = self.route(x_TE)
        # Tokens of one expert lie together, so that each is one product.
        order = experts_TK.flatten().argsort(stable=True)
        counts_N = torch.bincount(experts_TK.flatten(), minlength=len(self.router))
        sorted_out = self._multiply(x_TE[order // self.per_token], counts_N)
        out = torch.empty_like(sorted_out)
        out[order] = sorted_out
        out_TKE = out.view(*weights_TK.shape, x_TE.shape[1])
        total = torch.einsum("tke,tk->te", out_TKE.float(), weights_TK).to(x_TE.dtype)
        shared = self.shared
        if shared is None:
            return total
        mlp = shared.down(gated(shared.gate_up(x_TE), self.activation))
        return total.add_(linear(x_TE, shared.gate).sigmoid() * mlp)

    def route(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of each token's experts, fp32 [T, K], and their numbers, int64 [T, K]."""
        shares_TN = softmax(linear(x_TE, self.router), dim=-1, dtype=torch.float32)
        weights_TK, experts_TK = shares_TN.topk(self.per_token, dim=-1)
        if self.normalised:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK, experts_TK

    def _multiply(self, x: Tensor, counts_N: Tensor) -> Tensor:
        """Each expert's MLP of its own tokens; x [T K, E] by expert."""
        products = grouped_products if self._is_grouped and len(x) else separate_products
        return products(self, x, counts_N)

    @cached_property
    def _is_grouped(self) -> bool:
        """Whether torch multiplies all groups in one kernel, and the host waits for no counts."""
        widths = (self.gate_up.shape[-1], self.down.shape[-1])
        is_even = all(width * self.down.itemsize % _STRIDE_BYTES == 0 for width in widths)
        return self.gate_up.is_cuda and self.gate_up.dtype == torch.bfloat16 and is_even


def grouped_products(experts: Experts, x: Tensor, counts_N: Tensor) -> Tensor:
    """All experts' MLPs in two products of groups; x [T K, E] by expert, so many rows of each."""
    ends = counts_N.cumsum(0, dtype=torch.int32)
    inner = gated(grouped_mm(x, experts.gate_up.transpose(1, 2), offs=ends), experts.activation)
    return grouped_mm(inner, experts.down.transpose(1, 2), offs=ends)


def separate_products(experts: Experts, x: Tensor, counts_N: Tensor) -> Tensor:
    """The same, with two products for each expert that has rows."""
    out, start = torch.empty_like(x), 0
    for expert, count in enumerate(counts_N.tolist()):
        if count:
            rows = slice(start, start + count)
            inner = gated(linear(x[rows], experts.gate_up[expert]), experts.activation)
            torch.mm(inner, experts.down[expert].t(), out=out[rows])
            start += count
    return out


def load_experts(spec: ModelSpec, mesh: Mesh, source: WeightSource, layer: int) -> Experts:
    """Read one layer's experts, each rank its channels of them."""
    experts, names = spec.experts, spec.family_flags.names
    assert experts is not None

    def inner(size: int) -> range:
        return intermediate_shard(size, mesh.layout.tensor_size, mesh.tensor_rank)

    def name(part: str) -> str:
        return names.of_layer(layer, part)

    rows, numbers = inner(experts.intermediate_size), range(experts.num_experts)
    halves = [
        (name(f"{names.of_expert(n, part)}.weight"), rows)
        for n in numbers
        for part in (names.expert_gate, names.expert_up)
    ]
    downs = [name(f"{names.of_expert(n, names.expert_down)}.weight") for n in numbers]
    shared = None
    if experts.shared_intermediate_size:
        channels = inner(experts.shared_intermediate_size)
        gate_up = [(name(part), channels) for part in (names.shared_gate, names.shared_up)]
        shared = SharedExpert(
            column_parallel(source, gate_up, has_bias=False),
            row_parallel(source, name(names.shared_down), channels, False, mesh.tensor_rank),
            source.read(name(f"{names.shared_share}.weight")),
        )
    gate_up_weight = source.read_joined(halves)
    return Experts(
        router=source.read(name(f"{names.router}.weight")),
        gate_up=gate_up_weight.view(len(numbers), 2 * len(rows), spec.hidden_size),
        down=source.read_stacked(downs, rows),
        per_token=experts.per_token,
        normalised=experts.normalised,
        shared=shared,
        activation=spec.activation,
    )
