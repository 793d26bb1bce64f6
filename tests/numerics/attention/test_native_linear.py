"""The packed linear layers against the formulas, in fp64 on the same bf16 numbers.

Where the kernels may differ from a formula, the bound is derived; what they promise among
themselves (batches, threads, shards, fused or not) is exact.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from saqqara.workers.models.norm import rms_norm
from saqqara.workers.native import linear
from saqqara.workers.native.build import unavailable_reason
from saqqara.workers.native.decoder_layer import Finish, Mlp, Projection
from saqqara.workers.native.linear import Gate, PackedLinear, RMSNorm

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"no native kernels: {unavailable_reason()}"
)

# Rounding to the 8 significant bits of bf16 changes a number by at most this share of it.
BF16 = 2.0**-8

# (inputs, outputs): SmolLM2's, and ends of vectors, panels (32 columns) and blocks (2048 inputs).
SHAPES = [(576, 960), (1536, 576), (1, 1), (7, 5), (33, 17), (64, 48), (2049, 40), (4100, 33)]

# Ends of tiles (14 rows), and of the batches in which threads share columns (112 x (threads - 1)).
BATCHES = [2, 3, 8, 13, 14, 15, 16, 28, 29, 33, 64, 112, 113, 224, 225, 300]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight(columns: int, inputs: int, seed: int = 1) -> Tensor:
    return randn(columns, inputs, seed=seed).float().mul(inputs**-0.5).bfloat16()


def assert_product(y: Tensor, x: Tensor, w: Tensor, added: Tensor | float = 0.0) -> None:
    """One rounding to the dtype of y, and fp32 sums: each of K + 1 additions errs by 2^-23 of at
    most the sum of magnitudes.
    """
    exact = x.double() @ w.double().T + added
    magnitude = x.double().abs() @ w.double().abs().T + torch.as_tensor(added).abs()
    rounding = BF16 if y.dtype == torch.bfloat16 else 0.0
    bound = rounding * exact.abs() + (x.shape[1] + 1) * 2.0**-23 * magnitude
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the test's end restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 40, 120])
def test_linear_is_the_product(rows: int, inputs: int, outputs: int) -> None:
    """With and without bias and residual, in bf16 and fp32, for any size."""
    x, w = randn(rows, inputs), weight(outputs, inputs)
    bias, residual = randn(outputs, seed=2), randn(rows, outputs, seed=3)
    plain, biased = PackedLinear(w), PackedLinear(w, bias)
    assert_product(plain(x), x, w)
    assert_product(plain(x, residual=residual), x, w, residual)
    assert_product(biased(x, residual=residual), x, w, residual.double() + bias)
    assert_product(biased.logits(x), x, w, bias.double())


def test_out_may_be_the_residual() -> None:
    x, w, residual = randn(20, 96), weight(70, 96), randn(20, 70, seed=3)
    linear = PackedLinear(w)
    expected = linear(x, residual=residual)
    assert linear(x, out=residual, residual=residual) is residual
    assert torch.equal(residual, expected)


def test_no_rows() -> None:
    assert PackedLinear(weight(40, 24))(randn(0, 24)).shape == (0, 40)


def test_nothing_is_read_past_an_odd_row() -> None:
    """Weights are padded to pairs of inputs; what lies behind the last row must not be used."""
    buffer = randn(3 * 7 + 1)
    buffer[-1] = torch.nan
    w = weight(5, 7)
    x = buffer[:-1].view(3, 7)
    assert_product(PackedLinear(w)(x), x, w)


@pytest.mark.parametrize("inputs", [576, 7, 33, 2049])
@pytest.mark.parametrize("is_wide", [False, True])
def test_norm_in_front(inputs: int, is_wide: bool) -> None:
    """The norm of models/norm.py, seen through the identity.

    The mean is summed in another order, so that a scaled number next to a rounding boundary may
    fall to its other side: one unit in the last place, rarely.
    """
    scale = randn(inputs, seed=1)
    x, norm = randn(50, inputs) * 3, RMSNorm(scale.float() + 1 if is_wide else scale, 1e-5)
    identity = torch.eye(inputs).bfloat16()
    normed = PackedLinear(identity, norm=norm)(x)
    expected = rms_norm(x, norm.weight, norm.eps)
    torch.testing.assert_close(normed, expected, rtol=2 * BF16, atol=0)
    assert (normed == expected).float().mean() > 0.99
    w = weight(45, inputs)
    assert torch.equal(PackedLinear(w, norm=norm)(x), PackedLinear(w)(normed))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("gated", "has_bias"), [("silu", False), ("gelu_tanh", True)])
def test_gated(inputs: int, outputs: int, gated: Gate, has_bias: bool) -> None:
    """The gate's activation times up, rounded once.

    Either is at most 1.13 times as steep as its argument, so errors of the fp32 sums (see
    `assert_product`) reach the result times |up| or |activated|; exp adds 2^-20 of the result, and
    of GELU's exponent, up to 100, each 2^-23 that it is off.
    """
    x, w = randn(20, inputs) * 2, weight(2 * outputs, inputs)
    bias = randn(2 * outputs, seed=2) if has_bias else None
    y = PackedLinear(w, bias, gated=gated)(x)
    added = torch.zeros(()) if bias is None else bias.double()
    gate, up = (x.double() @ w.double().T + added).chunk(2, dim=-1)
    activated = silu(gate) if gated == "silu" else gelu(gate, approximate="tanh")
    exact = activated * up
    error = (inputs + 1) * 2.0**-23 * (x.double().abs() @ w.double().abs().T + added.abs())
    gate_error, up_error = error.chunk(2, dim=-1)
    bound = 1.13 * gate_error * up.abs() + up_error * activated.abs()
    bound += (BF16 + 2.0**-20 + 100 * 2.0**-23) * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("gated", ["silu", "gelu_tanh"])
def test_gate_saturates_without_overflow(gated: Gate) -> None:
    """Gates of -300, -90, 90 and 300 times an up of 2; silu(-90) is -7e-38."""
    gates = torch.tensor([-300.0, -90.0, 90.0, 300.0])
    w = torch.cat((gates, torch.full((4,), 2.0)))[:, None].bfloat16()
    y = PackedLinear(w, gated=gated)(torch.ones(1, 1).bfloat16())
    expected = torch.tensor([[0.0, 0.0, 180.0, 600.0]]).bfloat16()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-30)


def test_rows_are_those_of_the_weight() -> None:
    for inputs, outputs in SHAPES:
        w = weight(outputs, inputs)
        ids = torch.arange(3 * outputs) * 7 % outputs
        assert torch.equal(PackedLinear(w).rows(ids), w[ids])


@pytest.mark.parametrize("stranger", [-1, 33, 2**31 - 1, -(2**63)])
def test_nothing_is_read_outside_the_rows(stranger: int) -> None:
    """Neither by the method, which says so, nor by the kernel below it, which gives zeros."""
    w = torch.ones(33, 8, dtype=torch.bfloat16)
    packed, ids = PackedLinear(w), torch.tensor([0, stranger, 32])
    with pytest.raises(IndexError, match="of a weight of 33 rows"):
        packed.rows(ids)
    out = torch.empty(3, 8, dtype=torch.bfloat16)
    linear._kernel("rows")(packed._address, ids.data_ptr(), 3, out.data_ptr(), 1)
    assert torch.equal(out, torch.tensor([1.0, 0.0, 1.0]).bfloat16()[:, None].expand(3, 8))


# -- batches, threads, shards -----------------------------------------------------------------


def make_norm(size: int, seed: int, is_wide: bool = False) -> RMSNorm:
    scale = randn(size, seed=seed)
    return RMSNorm(scale.float() + 1 if is_wide else scale, 1e-5)


def make_layer(
    hidden: int = 80, inner: int = 144, seed: int = 0, *, gemma: bool = False
) -> tuple[Projection, Finish]:
    """Five query heads, two kv heads of 16, norms of queries and keys; of Gemma also others."""
    before = make_norm(hidden, 3, gemma)
    qkv = PackedLinear(weight(9 * 16, hidden, seed), randn(9 * 16, seed=2), before)
    angles = torch.arange(1000)[:, None] * 0.1 ** torch.arange(8.0)
    norms = make_norm(16, 4, gemma), make_norm(16, 5, gemma)
    mlp = Mlp(
        PackedLinear(
            weight(2 * inner, hidden, seed + 1),
            norm=make_norm(hidden, 6, gemma),
            gated="gelu_tanh" if gemma else "silu",
        ),
        PackedLinear(weight(hidden, inner, seed + 2)),
    )
    projection = Projection(qkv, 5, 2, angles.cos(), angles.sin(), *norms)
    after = (make_norm(hidden, 7, gemma), make_norm(hidden, 8, gemma)) if gemma else (None, None)
    return projection, Finish(PackedLinear(weight(hidden, 5 * 16, seed + 3)), mlp, *after)


def run_layer(layer: tuple[Projection, Finish], hidden: Tensor, positions: Tensor) -> list[Tensor]:
    """Queries, keys, values, and the output with the queries for attention's result."""
    project, finish = layer
    q, k, v = (torch.empty(len(hidden), heads, 16).bfloat16() for heads in (5, 2, 2))
    project(hidden, positions, q, k, v)
    return [q, k, v, finish(hidden, q)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("gemma", [False, True])
def test_a_row_has_the_same_bits_in_every_batch(
    num_threads: int, gemma: bool, threads: Callable[[int], None]
) -> None:
    """Also with every number of threads: the rows alone are computed by one."""
    layer, head = make_layer(gemma=gemma), PackedLinear(weight(333, 80))
    hidden = randn(max(BATCHES), 80)
    positions = torch.arange(len(hidden)) * 3 % 1000
    threads(1)
    rows = [hidden[i : i + 1] for i in range(len(hidden))]
    alone = [run_layer(layer, x, positions[i : i + 1]) for i, x in enumerate(rows)]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    logits = torch.cat([head.logits(x) for x in rows])
    threads(num_threads)
    for batch in BATCHES:
        for result, one in zip(
            run_layer(layer, hidden[:batch], positions[:batch]), expected, strict=True
        ):
            assert torch.equal(result, one[:batch]), batch
        assert torch.equal(head.logits(hidden[:batch]), logits[:batch]), batch


def test_column_shards_are_the_columns_of_the_whole() -> None:
    """Uneven ones too: 2 + 1 heads, of 960 columns."""
    x, w = randn(20, 576), weight(960, 576)
    shards = [PackedLinear(w[:640])(x), PackedLinear(w[640:])(x)]
    assert torch.equal(torch.cat(shards, dim=1), PackedLinear(w)(x))


# -- fused calls are their parts --------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 16, 130])
def test_projection_is_its_parts(rows: int) -> None:
    project, _ = make_layer()
    hidden, positions = randn(rows, 80), torch.arange(rows)
    fused, parts = (
        [torch.empty(rows, heads, 16).bfloat16() for heads in (5, 2, 2)] for _ in range(2)
    )
    project(hidden, positions, *fused)
    project.rope_append(project.qkv(hidden), positions, *parts)
    for a, b in zip(fused, parts, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 16, 130])
def test_finish_is_its_parts(rows: int) -> None:
    """As tensor parallelism runs them, with one rank; and in place."""
    _, finish = make_layer()
    hidden, attended = randn(rows, 80), randn(rows, 5, 16, seed=9)
    middle = finish.output(attended.view(rows, 80), residual=hidden)
    mlp = finish.mlp
    assert isinstance(mlp, Mlp)
    expected = mlp.down(mlp.gate_up(middle), residual=middle)
    assert torch.equal(mlp(middle, residual=middle), expected)
    assert torch.equal(finish(hidden, attended), expected)
    assert finish(hidden, attended, out=hidden) is hidden
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("rows", [1, 16, 130])
def test_norms_stand_behind_attention_and_mlp(rows: int) -> None:
    """Each product is rounded before its norm, as with tensor parallelism, and so is the sum."""
    _, finish = make_layer(gemma=True)
    hidden, attended = randn(rows, 80), randn(rows, 5, 16, seed=9)
    after_attention, after_mlp = make_norm(80, 7, True), make_norm(80, 8, True)

    def added(product: Tensor, norm: RMSNorm, to: Tensor) -> Tensor:
        return to + rms_norm(product, norm.weight, norm.eps)

    middle = added(finish.output(attended.view(rows, 80)), after_attention, hidden)
    expected = added(finish.mlp(middle), after_mlp, middle)
    # A norm may fall to the other side of a rounding boundary (see `test_norm_in_front`), and the
    # MLP's inputs with it.
    torch.testing.assert_close(finish(hidden, attended), expected, rtol=4 * BF16, atol=8 * BF16)
    assert (finish(hidden, attended) == expected).float().mean() > 0.95
    assert finish(hidden, attended, out=hidden) is hidden
    torch.testing.assert_close(hidden, expected, rtol=4 * BF16, atol=8 * BF16)


# -- rotary embedding and pages ---------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half rotation in fp64; x [T, H, D], cos and sin [T, D/2]."""
    a, b = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


@pytest.mark.parametrize("head_dim", [2, 6, 32, 40, 64, 96, 128])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rope(head_dim: int, has_norm: bool) -> None:
    """Rotation in fp32 and one rounding; a normed input may differ from the formula's by one unit
    in the last place (see `test_norm_in_front`).
    """
    heads, rows = (3, 2, 2), 11
    w = weight(7 * head_dim, 24)
    angles = torch.arange(100)[:, None] * 0.3 ** torch.arange(head_dim / 2)
    norms = (make_norm(head_dim, 4), make_norm(head_dim, 5)) if has_norm else (None, None)
    norm = RMSNorm(torch.ones(24).bfloat16(), 1e-5)
    project = Projection(PackedLinear(w, norm=norm), 3, 2, angles.cos(), angles.sin(), *norms)
    qkv, positions = randn(rows, 7 * head_dim), torch.arange(rows) * 9
    got = [torch.empty(rows, count, head_dim).bfloat16() for count in heads]
    project.rope_append(qkv, positions, *got)
    q, k, v = torch.split(qkv.view(rows, 7, head_dim), list(heads), dim=1)
    for result, x, scale in zip(got[:2], (q, k), norms, strict=True):
        normed = x if scale is None else rms_norm(x, scale.weight, norm.eps)
        cos, sin = angles.cos()[positions], angles.sin()[positions]
        magnitude = rotated(normed.abs(), cos.abs(), -sin.abs()).abs()
        magnitude += rotated(normed.abs(), cos.abs(), sin.abs()).abs()
        exact = rotated(normed, cos, sin)
        bound = BF16 * exact.abs() + (2 * BF16 if has_norm else 2.0**-22) * magnitude
        assert ((result.double() - exact).abs() <= bound).all()
    assert torch.equal(got[2], v)


def test_append_writes_its_rows_of_the_pages_and_no_others() -> None:
    project, _ = make_layer()
    rows, page_tokens = 21, 64
    hidden, positions = randn(rows, 80), torch.arange(rows) * 5
    q, k, v = (torch.empty(rows, heads, 16).bfloat16() for heads in (5, 2, 2))
    project(hidden, positions, q, k, v)
    places = torch.randperm(page_tokens, generator=torch.Generator().manual_seed(0))
    refs = places[: 2 * rows].view(rows, 2)
    k_tokens, v_tokens = randn(page_tokens, 16, seed=1), randn(page_tokens, 16, seed=2)
    expected_k = k_tokens.index_copy(0, refs.view(-1), k.view(-1, 16))
    expected_v = v_tokens.index_copy(0, refs.view(-1), v.view(-1, 16))
    q_again = torch.empty_like(q)
    project(hidden, positions, q_again, k_tokens, v_tokens, refs)
    assert torch.equal(q_again, q)
    assert torch.equal(k_tokens, expected_k)
    assert torch.equal(v_tokens, expected_v)
