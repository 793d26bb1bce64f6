"""Layers against the modules of transformers, on the same numbers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from saqqara.workers.mesh.layout import vocab_shard
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.models.embedding import LMHead, VocabEmbedding, read_vocab_rows
from saqqara.workers.models.linear import Linear, column_parallel, row_parallel
from saqqara.workers.models.norm import read_norm, rms_norm
from saqqara.workers.models.rotary import RotaryTable, inverse_frequencies, rotate
from saqqara.workers.models.spec import ModelSpec
from saqqara.workers.models.weights import DummyWeights, WeightSource

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [LlamaRMSNorm, Qwen3RMSNorm])
@torch.no_grad()
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype, module: Any) -> None:
    """fp32 within 1e-6 (the squares are summed in another order); half within one rounding."""
    x = (randn(7, 3, 64) * 5).to(dtype)
    oracle = module(64, eps=1e-5).to(dtype)
    oracle.weight.copy_(randn(64, seed=1))
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    before = x.clone()
    torch.testing.assert_close(
        rms_norm(x, oracle.weight, 1e-5), oracle(x), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_gemma_norm_multiplies_in_fp32(dtype: torch.dtype) -> None:
    """Its checkpoints hold weights - 1; a product that is cast first is another in half of all."""
    x = (randn(7, 3, 64) * 5).to(dtype)
    oracle = Gemma3RMSNorm(64, eps=1e-5).to(dtype)
    oracle.weight.copy_(randn(64, seed=1))
    source = OneTensor({"norm": (64,)}, dtype, "cpu")
    source.tensor = oracle.weight
    weight = read_norm(source, "norm", 1.0)
    assert weight.dtype == torch.float32
    got, expected = rms_norm(x, weight, 1e-5), oracle(x)
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    else:  # but for the order in which squares are summed, which rounds one in many otherwise
        assert (got != expected).float().mean() < 0.01


class OneTensor(WeightSource):
    """A checkpoint of one tensor."""

    tensor: torch.Tensor

    def close(self) -> None:
        """Nothing is open."""

    def _copy_slice(
        self, out: torch.Tensor, name: str, shape: tuple[int, ...], rows: range, cols: range
    ) -> None:
        out.copy_(self.tensor)


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {  # Llama 3.1
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-small": {  # Llama 3.2
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn-scaled": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "short_factor": 1.5,
        "long_factor": 3.5,
    },
}
# Lengths within and beyond those that the model was first trained with.
_ONE_LENGTH = [(name, 16384) for name in ROPES if name not in ("dynamic", "longrope")]
_LENGTHS = [("dynamic", 16384), ("dynamic", 30000), ("longrope", 4096), ("longrope", 16384)]


@pytest.mark.parametrize(("name", "length"), _ONE_LENGTH + _LENGTHS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotary_is_that_of_transformers(name: str, length: int, head_dim: int) -> None:
    """Frequencies, and rotated queries and keys at far and unordered positions.

    Where frequencies depend on a text's length, the engine's longest is what counts.
    """
    settings = dict(ROPES[name])
    for key in {"short_factor", "long_factor"} & settings.keys():
        settings[key] = [settings[key] + n / 7 for n in range(head_dim // 2)]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=16384,
        rope_parameters=settings,
    )
    oracle = LlamaRotaryEmbedding(config)
    rope = ModelSpec.from_hf(config).rope
    positions = torch.tensor([0, 1, 2, length // 3, length - 1, 7, 7])
    q, k = randn(7, 4, head_dim), randn(7, 2, head_dim, seed=1)
    table = RotaryTable(rope, head_dim, length)
    looked_up = table.lookup(positions)
    # Transformers wants [batch, heads, tokens, D].
    cos, sin = oracle(q, positions[None])
    torch.testing.assert_close(
        inverse_frequencies(rope, head_dim, length), oracle.inv_freq, rtol=3e-7, atol=0
    )
    # A base that is computed in fp32 there moves a frequency by a rounding, far angles by more.
    tolerance = 5e-5 if (name, length) == ("dynamic", 30000) else 1e-6
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for x, oracle_rotated in zip((q, k), expected, strict=True):
        rotated = rotate(x, *looked_up)
        assert rotated.is_contiguous()
        torch.testing.assert_close(
            rotated, oracle_rotated[0].transpose(0, 1), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_of_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Transformers rounds cos, sin and each product; we compute in fp32 and round the result."""
    rope = ModelSpec.from_hf(LlamaConfig()).rope
    table = RotaryTable(rope, 32, 128)
    positions = torch.arange(128)
    q = randn(128, 3, 32).to(dtype)
    wide, narrow = (rotate(x, *table.lookup(positions)) for x in (q.float(), q))
    assert narrow.dtype == dtype
    assert torch.equal(narrow, wide.to(dtype))


def test_rotation_of_views_is_that_of_their_copies() -> None:
    """The decoder rotates slices of the fused q/k/v output."""
    table = RotaryTable(ModelSpec.from_hf(LlamaConfig()).rope, 16, 64)
    fused = randn(9, 5, 16)
    positions = torch.arange(9)
    q, k, _ = torch.split(fused, [3, 1, 1], dim=1)
    for view in (q, k):
        looked_up = table.lookup(positions)
        assert torch.equal(rotate(view, *looked_up), rotate(view.clone(), *looked_up))


SHAPES: dict[str, tuple[int, ...]] = {
    "q.weight": (12, 8),
    "q.bias": (12,),
    "k.weight": (4, 8),
    "k.bias": (4,),
    "o.weight": (8, 12),
    "o.bias": (8,),
    "embed": (11, 8),
}


def test_a_merged_layer_is_its_parts_side_by_side() -> None:
    source = DummyWeights(SHAPES)
    merged = column_parallel(source, [("q", range(3, 9)), ("k", range(4))], has_bias=True)
    q = Linear(source.read("q.weight"), source.read("q.bias"))
    k = Linear(source.read("k.weight"), source.read("k.bias"))
    x = randn(5, 8)
    torch.testing.assert_close(merged(x), torch.cat((q(x)[:, 3:9], k(x)), dim=-1))
    assert merged.num_bytes == 10 * 8 * 4 + 10 * 4


def test_partial_sums_of_a_row_parallel_layer_have_the_bias_once() -> None:
    source = DummyWeights(SHAPES)
    x = randn(5, 12)
    whole = Linear(source.read("o.weight"), source.read("o.bias"))(x)
    parts = [range(7), range(7, 12)]
    total = sum(
        row_parallel(source, "o", part, has_bias=True, tensor_rank=rank)(
            x[:, part.start : part.stop]
        )
        for rank, part in enumerate(parts)
    )
    torch.testing.assert_close(total, whole)


def test_embedding_and_head_on_one_rank() -> None:
    source, mesh = DummyWeights(SHAPES), Mesh()
    shard = vocab_shard(11, 1, 0)
    weight = read_vocab_rows(source, "embed", shard)
    hidden = VocabEmbedding(weight, shard, mesh)(torch.tensor([10, 0, 3]))
    assert torch.equal(hidden, weight[[10, 0, 3]])
    logits = LMHead(weight.bfloat16(), shard, mesh)(hidden.bfloat16())
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 11)
