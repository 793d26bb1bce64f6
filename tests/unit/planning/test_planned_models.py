"""Models to plan for: known ones are those that were published, folders are the engine's."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny import CONFIGS

from saqqara.cluster.planning.models import MODEL_DIR, known_models, model_of
from saqqara.cluster.planning.planner import DTYPES
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.models.decoder import Decoder
from saqqara.workers.models.spec import load_spec
from saqqara.workers.models.weights import WeightSource, weight_shapes

BF16 = DTYPES["bfloat16"]
# All weights of the published checkpoints, norms and biases included.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-30b-a3b": 30_532_122_624,
    "phi-3-mini-4k": 3_821_079_552,
    "gemma-2-9b": 9_241_705_984,
}


@pytest.mark.parametrize("name", known_models())
def test_known_models_have_as_many_weights_as_were_published(name: str) -> None:
    model = model_of(name)
    [rank] = Footprint.of_ranks(model.spec, BF16, MeshLayout())
    # Norms that the checkpoint holds less 1 are held in fp32.
    wide = 0 if not model.spec.norm_offset else 42 * rank.norm_numbers + 3584
    assert rank.weight_bytes() == 2 * PARAMETERS[name] + 2 * wide


@pytest.mark.parametrize("layout", [(2, 1), (4, 2), (1, 8), (8, 4)], ids=str)
def test_ranks_share_the_weights_of_a_model(layout: tuple[int, int]) -> None:
    """Norms are on every tensor rank, kv heads too where there are more ranks than those."""
    model = model_of("llama-3-70b")
    [whole] = Footprint.of_ranks(model.spec, BF16, MeshLayout())
    ranks = Footprint.of_ranks(model.spec, BF16, MeshLayout(*layout))
    norms = (layout[0] - 1) * (2 * 80 + 1) * 8192 * 2
    assert sum(rank.weight_bytes() for rank in ranks) == whole.weight_bytes() + norms


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_read_as_by_the_engine(name: str, tmp_path: Path) -> None:
    """Without transformers, which loads torch; ids of special tokens are no sizes."""
    CONFIGS[name].save_pretrained(tmp_path)
    assert model_of(str(tmp_path)).spec == replace(load_spec(tmp_path), eos_token_ids=(2,))


def test_old_configs_are_read(tmp_path: Path) -> None:
    """As they were saved before `head_dim`, `rope_parameters` and `dtype` existed."""
    config = json.loads((MODEL_DIR / "llama-2-7b.json").read_text(encoding="utf-8"))
    del config["num_key_value_heads"], config["rope_theta"], config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert model_of(str(tmp_path)).spec == model_of("llama-2-7b").spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"num_local_experts": 8}, "num_local_experts=8: models of type .llama. have no experts"),
        ({"sliding_window": 1024}, "sliding_window=1024: models of type .llama. have none"),
        ({"vocab_size": -5}, "config.vocab_size must be a whole number from 1 to"),
        ({"num_hidden_layers": 2.5}, "config.num_hidden_layers must be a whole .* not 2.5"),
        ({"num_hidden_layers": 10**9}, "config.num_hidden_layers must be .* not 1000000000"),
        ({"num_hidden_layers": -1}, "config.num_hidden_layers must be"),
        ({"hidden_size": "72"}, "config.hidden_size must be a whole number .* not '72'"),
        ({"num_attention_heads": 0}, "config.num_attention_heads must be"),
        ({"num_key_value_heads": True}, "config.num_key_value_heads must be"),
        ({"head_dim": 0.5}, "config.head_dim must be"),
        ({"rms_norm_eps": "small"}, "config.rms_norm_eps must be a number from 0 on"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "config.num_local_experts must be"),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            "per_tok must be .* 8, not 9",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = json.loads((MODEL_DIR / "llama-3-8b.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        model_of(str(tmp_path))


def test_a_name_that_is_none_gets_the_closest() -> None:
    with pytest.raises(
        ValueError, match="model: 'llama3-70b' is not known; did you mean 'llama-3-70b'"
    ):
        model_of("llama3-70b")
    with pytest.raises(ValueError, match="known: gemma-2-9b, llama-2-13b, "):
        model_of("zebra")


def test_every_known_model_is_a_published_one() -> None:
    assert set(known_models()) == set(PARAMETERS)


TOPOLOGY = {  # of Llama-3-70B, all else small
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 4,
    "hidden_size": 256,
    "intermediate_size": 448,
    "vocab_size": 500,
}


class NoNumbers(WeightSource):
    """Tensors of the right shapes; sizes are all that is asked of them."""

    def close(self) -> None:
        """Nothing is open."""

    def _copy_slice(
        self, out: torch.Tensor, name: str, shape: tuple[int, ...], rows: range, cols: range
    ) -> None:
        """What stands in memory is good enough."""


@pytest.mark.parametrize(("tensor", "pipeline"), [(8, 1), (1, 4), (4, 2)])
def test_the_decoders_of_a_70b_topology_weigh_what_was_planned(
    tensor: int, pipeline: int, tmp_path: Path
) -> None:
    """Every rank's real decoder, one after the other; weights know nothing of other ranks."""
    config = json.loads((MODEL_DIR / "llama-3-70b.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **TOPOLOGY}), encoding="utf-8")
    model, layout = model_of(str(tmp_path)), MeshLayout(tensor, pipeline)
    source = NoNumbers(weight_shapes(model.spec), torch.bfloat16, "cpu")
    for rank in Footprint.of_ranks(model.spec, BF16, layout):
        place: Any = SimpleNamespace(
            layout=layout,
            tensor_rank=rank.tensor_rank,
            is_first_stage=rank.is_first_stage,
            is_last_stage=rank.is_last_stage,
        )
        decoder = Decoder(model.spec, place, rank.heads, rank.layers, source, 64)
        assert rank.weight_bytes() == decoder.weight_bytes()
        assert rank.rotary_bytes(64) == sum(table.num_bytes for table in decoder.tables)
