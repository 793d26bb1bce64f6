"""A mixture of experts against the definition, and however it is cut and multiplied."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.coverage import spec_of

from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.models.experts import (
    Experts,
    grouped_products,
    load_experts,
    separate_products,
)
from saqqara.workers.models.weights import DummyWeights, weight_shapes

NAMES = ("mixtral", "qwen2-moe", "qwen3-moe")


def experts_of(name: str, rank: int = 0, size: int = 1, dtype: Any = torch.float32) -> Experts:
    """Those of layer 1 (or 2, where 1 has none) on a rank of so many; larger than dummies are."""
    spec = spec_of(name)
    assert spec.experts is not None
    mesh: Any = SimpleNamespace(layout=MeshLayout(tensor_size=size), tensor_rank=rank)
    source = DummyWeights(weight_shapes(spec), dtype)
    found = load_experts(spec, mesh, source, spec.experts.layers[-1])
    for weight in (found.router, found.gate_up, found.down):
        weight.mul_(20)
    return found


def hidden(name: str, tokens: int = 23) -> torch.Tensor:
    size = spec_of(name).hidden_size
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_each_token_goes_through_its_best_experts(name: str) -> None:
    """Token by token, in float64."""
    experts, x_TE = experts_of(name), hidden(name)
    expected = []
    for x in x_TE.double():
        shares = (experts.router.double() @ x).softmax(0)
        best = sorted(range(len(shares)), key=lambda n: -shares[n])[: experts.per_token]
        total = sum(shares[n] for n in best) if experts.normalised else 1.0
        out = torch.zeros_like(x)
        for n in best:
            gate, up = (experts.gate_up[n].double() @ x).chunk(2)
            silu = gate / (1 + (-gate).exp())
            out += shares[n] / total * (experts.down[n].double() @ (silu * up))
        if (shared := experts.shared) is not None:
            gate, up = (shared.gate_up.weight.double() @ x).chunk(2)
            mlp = shared.down.weight.double() @ (gate / (1 + (-gate).exp()) * up)
            out += mlp / (1 + (-(shared.gate.double() @ x)).exp())
        expected.append(out.float())
    torch.testing.assert_close(experts(x_TE), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert experts(x_TE[:0]).shape == (0, x_TE.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_ranks_have_parts_of_one_sum(name: str) -> None:
    """40 channels on 3 ranks are no equal parts; the router is the same on all."""
    whole, x_TE = experts_of(name), hidden(name)
    parts = [experts_of(name, rank, 3) for rank in range(3)]
    assert sum(part.down.shape[-1] for part in parts) == whole.down.shape[-1]
    total = sum(part(x_TE) for part in parts)
    torch.testing.assert_close(total, whole(x_TE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_groups_are_those_of_each_expert(dtype: torch.dtype) -> None:
    """Also where an expert has no token, the first and the last among them."""
    experts = experts_of("qwen3-moe", dtype=dtype)
    for counts in ([5, 0, 3, 1, 0, 4, 2], [0, 0, 9, 0, 6, 0, 0]):
        x = hidden("qwen3-moe", 15).to(dtype)
        grouped, separate = (
            products(experts, x, torch.tensor(counts))
            for products in (grouped_products, separate_products)
        )
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(grouped, separate, rtol=tolerance, atol=tolerance)
