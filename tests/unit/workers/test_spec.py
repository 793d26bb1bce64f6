"""ModelSpec from Hugging Face configs: what is read, and what is refused by name."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from saqqara.workers.models.reading.families import FAMILIES
from saqqara.workers.models.reading.rope_spec import UNROTATED, RopeSpec
from saqqara.workers.models.spec import ExpertSpec, ModelSpec, load_spec
from saqqara.workers.models.weights import weight_shapes

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny(kind: Callable[..., Any] = LlamaConfig, **settings: Any) -> Any:
    return kind(**{**TINY, **settings})


def test_a_spec_says_what_the_config_says() -> None:
    spec = ModelSpec.from_hf(tiny(rms_norm_eps=1e-5, eos_token_id=7, tie_word_embeddings=True))
    assert spec == ModelSpec(
        family="llama",
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_layers=3,
        num_query_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
        rms_norm_eps=1e-5,
        rope=RopeSpec(theta=10000.0),
        tie_embeddings=True,
        eos_token_ids=(7,),
    )
    assert hash(spec) == hash(
        ModelSpec.from_hf(tiny(rms_norm_eps=1e-5, eos_token_id=7, tie_word_embeddings=True))
    )
    assert spec.group_size == 3
    assert spec.kv_bytes_per_row_token(torch.bfloat16) == 2 * 8 * 2
    assert spec.kv_bytes_per_token(torch.float32) == 3 * 2 * 2 * 8 * 4


UNTIED = {"head_dim": 8, "tie_word_embeddings": False}
SEVEN = {
    "num_experts": 7,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "decoder_sparse_step": 2,
}
FLAGS = {
    "llama": (tiny(), (False, False, False, False)),
    "llama-bias": (tiny(attention_bias=True), (True, True, False, False)),
    "llama-mlp-bias": (tiny(mlp_bias=True), (False, False, True, False)),
    "mistral": (tiny(MistralConfig, sliding_window=None), (False, False, False, False)),
    "mixtral": (tiny(MixtralConfig, num_local_experts=3), (False, False, False, False)),
    "qwen2_moe": (tiny(Qwen2MoeConfig, **SEVEN), (True, False, False, False)),
    "qwen3_moe": (tiny(Qwen3MoeConfig, head_dim=8, **SEVEN), (False, False, False, True)),
    "phi3": (tiny(Phi3Config, pad_token_id=0), (False, False, False, False)),
    "smollm3": (tiny(SmolLM3Config, pad_token_id=0, **UNTIED), (False, False, False, False)),
    "qwen2": (tiny(Qwen2Config), (True, False, False, False)),
    "qwen3": (tiny(Qwen3Config), (False, False, False, True)),
    "gemma2": (tiny(Gemma2Config, **UNTIED), (False, False, False, False)),
    "gemma3_text": (tiny(Gemma3TextConfig, **UNTIED), (False, False, False, True)),
    "qwen3-bias": (tiny(Qwen3Config, attention_bias=True), (True, True, False, True)),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_and_weights_match_the_transformers_model(name: str) -> None:
    """The tensors that `weight_shapes` expects are exactly those of the model built by HF."""
    from transformers import AutoModelForCausalLM

    config, flags = FLAGS[name]
    spec = ModelSpec.from_hf(config)
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm) == flags
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(w.shape) for key, w in model.state_dict().items()}
    if spec.experts is None:
        assert weight_shapes(spec) == shapes
    else:  # which transformers joins when it loads them; how they are named, loading them shows
        assert sum(map(math.prod, weight_shapes(spec).values())) == model.num_parameters()
        assert {n for n in weight_shapes(spec) if "moe" not in n and "mlp" not in n} <= {*shapes}


def test_every_family_is_tested() -> None:
    assert {config.model_type for config, _ in FLAGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "config",
    [
        tiny(tie_word_embeddings=True),
        tiny(),
        tiny(MixtralConfig),
        tiny(Qwen2MoeConfig, **SEVEN, qkv_bias=False),
    ],
    ids=["tied", "untied", "experts", "shared"],
)
def test_parameter_counts_match_the_transformers_model(config: Any) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    norms = (2 * 3 + 1) * 48
    spec = ModelSpec.from_hf(config)
    assert spec.num_parameters + norms == model.num_parameters()
    assert spec.head_layers == pytest.approx(spec.head_parameters / spec.layer_parameters)


def test_a_token_goes_through_some_of_the_experts() -> None:
    spec = ModelSpec.from_hf(tiny(Qwen2MoeConfig, **SEVEN))
    assert spec.experts == ExpertSpec(7, 2, 40, 5632, normalised=False, layers=(1,))
    unused = 5 * 3 * 40 * 48
    assert [spec.parameters_of(n) - spec.parameters_of(n, used=True) for n in range(3)] == [
        *(0, unused, 0)
    ]
    used = sum(spec.parameters_of(n, used=True) for n in range(3))
    assert spec.layer_parameters == used // 3


def test_head_dim_may_differ_from_hidden_size_over_heads() -> None:
    assert ModelSpec.from_hf(tiny(Qwen3Config, head_dim=16)).head_dim == 16
    assert ModelSpec.from_hf(tiny(Qwen2Config)).head_dim == 8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        ({"rope_theta": 3e4}, RopeSpec(theta=3e4)),
        (
            {"rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeSpec(theta=3e4, kind="linear", factor=2.0),
        ),
        (
            {"rope_parameters": LLAMA3},
            RopeSpec(
                theta=5e5, kind="llama3", factor=8.0, high_freq_factor=4.0, original_max_position=64
            ),
        ),
    ],
)
def test_rope_is_read_in_both_notations(settings: dict[str, Any], expected: RopeSpec) -> None:
    assert ModelSpec.from_hf(tiny(**settings)).rope == expected


class _OldConfig:
    """A config object of transformers 4: `rope_scaling` and `rope_theta` as attributes."""

    model_type = "llama"
    hidden_act = "silu"
    rms_norm_eps = 1e-6
    rope_theta = 1e6
    rope_scaling = {"type": "linear", "factor": 4.0}  # noqa: RUF012
    tie_word_embeddings = False
    eos_token_id = 2

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update({**TINY, **settings})


def test_rope_of_older_config_objects() -> None:
    rope = ModelSpec.from_hf(_OldConfig()).rope
    assert rope == RopeSpec(theta=1e6, kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(_OldConfig, rope_scaling={"type": "proportional"}),
         r"rope_scaling\['rope_type'\]='proportional'.*supported: default, linear, dynamic, yarn"),
        (lambda: tiny(_OldConfig, rope_scaling={"type": "yarn", "factor": -2}),
         r"rope_scaling\['factor'\] must be above 0, not -2"),
        (lambda: tiny(_OldConfig, rope_scaling={"type": "linear"}), r"\['factor'\] is missing"),
        (lambda: tiny(_OldConfig, rope_scaling={"type": "su", "short_factor": [1.0] * 3}),
         r"rope_scaling\['short_factor'\] must be 4 numbers above 0"),
        (lambda: tiny(_OldConfig, model_type="smollm3", no_rope_layers=[1, 1]),
         "config.no_rope_layers has 2 entries for 3 layers"),
        (lambda: tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                       "partial_rotary_factor": 0.5}),
         "partial_rotary_factor=0.5"),
        (lambda: tiny(sliding_window=64), "config.sliding_window=64: .*'llama' have none"),
        (lambda: tiny(MistralConfig, layer_types=["full_attention"] * 3), "config.layer_types"),
        (lambda: tiny(hidden_act="gelu"), "config.hidden_act='gelu'.*silu, gelu_pytorch_tanh"),
        (lambda: tiny(Gemma2Config, use_bidirectional_attention=True),
         "config.use_bidirectional_attention=True is not supported; only False"),
        (lambda: tiny(Gemma3TextConfig, attn_logit_softcapping=50.0),
         "config.attn_logit_softcapping=50.0 is not supported; only None"),
        (lambda: Gemma3Config(), "model_type='gemma3' is not supported .with images.*gemma3_"),
        (lambda: tiny(quantization_config={"quant_method": "awq"}), "config.quantization_config"),
        (lambda: tiny(num_key_value_heads=4), "config.num_key_value_heads=4"),
        (lambda: tiny(MixtralConfig, num_experts_per_tok=9), "num_experts_per_tok must be .* 8,"),
        (lambda: tiny(Qwen2MoeConfig, moe_intermediate_size=0), "config.moe_intermediate_size"),
        (lambda: GPT2Config(), "config.model_type='gpt2'"),
        (lambda: tiny(_OldConfig, model_type=["llama"]), "config.model_type=.'llama'. is not"),
        (lambda: tiny(_OldConfig, rope_scaling={"type": ["yarn"]}), "='?.'yarn'. is not"),
        (lambda: tiny(rope_parameters={"rope_type": "default", "rope_theta": 1.0}),
         r"rope_parameters\['rope_theta'\] must be above 1, not 1.0"),
        (lambda: tiny(MistralConfig, sliding_window=0), "config.sliding_window must be .* not 0"),
        (lambda: tiny(Qwen2Config, use_sliding_window=True, sliding_window=-4),
         "config.sliding_window must be .* not -4"),
        (lambda: tiny(Qwen2MoeConfig, num_experts=0), "config.num_experts must be .* not 0"),
        (lambda: tiny(dtype="int8"), "config.dtype='int8' is not supported; one of float32, bfl"),
        (lambda: tiny(_OldConfig, rope_scaling={"type": "su", "factor": 4.0},
                      original_max_position_embeddings=1),
         "config.original_max_position_embeddings must be above 1"),
        (lambda: tiny(num_local_experts=8), "num_local_experts=8: models of type .llama. have"),
        (lambda: tiny(Qwen2Config, layer_types=["full_attention"] * 2 + ["linear_attention"]),
         "config.layer_types"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_hf(make())


def test_a_window_that_is_never_reached_or_switched_off_is_fine() -> None:
    ModelSpec.from_hf(tiny(MistralConfig, sliding_window=512))
    ModelSpec.from_hf(tiny(Qwen2Config, use_sliding_window=False, sliding_window=64))


SEEING_64 = {"head_dim": 8, "sliding_window": 64}


def windows_of(kind: Callable[..., PreTrainedConfig], **settings: Any) -> tuple[int, ...]:
    return ModelSpec.from_hf(tiny(kind, **{**SEEING_64, **settings})).windows


def test_windows_are_those_of_the_layers_that_have_them() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows_of(MistralConfig) == (64, 64, 64)
    assert windows_of(Qwen2Config, use_sliding_window=True, max_window_layers=2) == (0, 0, 64)
    assert windows_of(Qwen2Config, use_sliding_window=True, layer_types=kinds) == (0, 64, 0)
    assert windows_of(Gemma2Config) == (64, 0, 64)
    assert windows_of(Gemma3TextConfig, sliding_window_pattern=2) == (64, 0, 64)
    assert windows_of(Gemma3TextConfig, layer_types=kinds) == (0, 64, 0)
    assert windows_of(Gemma2Config, sliding_window=512) == ()
    # Where layers with a window rotate otherwise, they stay apart.
    assert windows_of(Gemma3TextConfig, sliding_window=512, layer_types=kinds) == (0, 512, 0)


def test_gemma_says_how_it_differs() -> None:
    spec = ModelSpec.from_hf(
        tiny(Gemma3TextConfig, head_dim=8, query_pre_attn_scalar=16, sliding_window=64,
             rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=3)
    )  # fmt: skip
    assert (spec.activation, spec.norm_offset, spec.post_norms) == ("gelu_tanh", 1.0, True)
    assert spec.embedding_scale == 48**0.5
    assert spec.attention_scale == 0.25
    assert [spec.rope_of(layer).theta for layer in range(3)] == [1e4, 1e4, 1e6]
    caps = ModelSpec.from_hf(tiny(Gemma2Config, head_dim=8))
    assert (caps.attention_softcap, caps.logit_softcap) == (50.0, 30.0)
    assert caps.local_rope is None


def test_layers_without_rope_are_those_that_are_marked() -> None:
    spec = ModelSpec.from_hf(tiny(SmolLM3Config, pad_token_id=0, no_rope_layers=[1, 0, 1]))
    assert [spec.rope_of(layer) for layer in range(3)] == [spec.rope, UNROTATED, spec.rope]
    old = ModelSpec.from_hf(tiny(_OldConfig, model_type="smollm3", no_rope_layer_interval=3))
    assert old.unrotated_layers == (2,)
    windows = {"use_sliding_window": True, "sliding_window": 64}
    old = ModelSpec.from_hf(tiny(_OldConfig, model_type="smollm3", num_hidden_layers=5, **windows))
    assert old.windows == (0, 0, 0, 64, 0)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({}, 512),
        ({"type": "dynamic", "factor": 2.0}, 1024),
        ({"type": "linear", "factor": 4.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 512),
    ],
    ids=str,
)
def test_rotary_settings_say_how_long_texts_may_be(rope: dict[str, Any], longest: int) -> None:
    """Configs with `yarn` hold the longer length, or that of the first training."""
    spec = ModelSpec.from_hf(tiny(_OldConfig, rope_scaling=rope))
    assert (spec.max_position, spec.longest) == (512, longest)


def test_load_spec_prefers_the_end_tokens_of_the_generation_config(tmp_path: Path) -> None:
    tiny(eos_token_id=7).save_pretrained(tmp_path)
    assert load_spec(tmp_path).eos_token_ids == (7,)
    generation = tmp_path / "generation_config.json"
    for written, expected in ((9, (9,)), ([9, 11], (9, 11)), (None, (7,))):
        generation.write_text(json.dumps({"eos_token_id": written}))
        assert load_spec(str(tmp_path)).eos_token_ids == expected


def test_load_spec_reads_the_checkpoint_dtype(tmp_path: Path) -> None:
    config = tiny()
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    assert load_spec(tmp_path).dtype == "bfloat16"
    assert ModelSpec.from_hf(tiny()).dtype == "float32"


def test_load_spec_names_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_spec(tmp_path)
    with pytest.raises(ValueError, match="there is no folder '/does/not/exist'"):
        load_spec("/does/not/exist")
    with pytest.raises(ValueError, match="no folder"):
        load_spec(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read the config"):
        load_spec(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load_spec(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ValueError, match=r"config\.hidden_size must be"):
        load_spec(tmp_path)
    for config in ('{"model_type": "no-such-model"}', '{"model_type": "gpt2"}', "{}"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=rf"supported: {', '.join(sorted(FAMILIES))}$"):
            load_spec(tmp_path)
    tiny().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"cannot read .*generation_config\.json"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("llama", {"num_attention_heads": 0}, "config.num_attention_heads must be .* not 0$"),
        ("llama", {"hidden_size": "wide"}, "config.hidden_size must be .* not 'wide'$"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "config.sliding_window_pattern must be"),
        ("smollm3", {"no_rope_layer_interval": 0}, "config.no_rope_layer_interval must be"),
        ("llama", {"rope_parameters": [1]}, "config.rope_parameters must be an object"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3, "sliding_attention": {}}},
         "config.rope_parameters.'full_attention'. must be an object"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0,
                                    "original_max_position_embeddings": 0}},
         "config.original_max_position_embeddings must be"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "8"}},
         "config.rope_scaling.'beta_fast'. must be a number above 0, not '8'"),
        ("qwen3", {"layer_types": 7}, "config.layer_types must be a list"),
        ("mistral", {"sliding_window": "12"}, "sliding_window.* expected int"),
        ("llama", {"dtype": "banana"}, "AttributeError: .*'banana'"),
    ],
)  # fmt: skip
def test_a_config_that_lies_is_refused_in_one_line(
    model_type: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"model_type": model_type, **TINY, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        load_spec(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_config_never_runs_code_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="model_type='evil' is not supported"):
        load_spec(tmp_path)
