"""The architectures of GGUF files that are read: their configs, and their tensors' names.

llama.cpp names the fields and tensors (its `gguf-py/gguf/constants.py`), transformers the configs
and weights. Where a model keeps something that a file does not say, llama.cpp's loader is followed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .file import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_LAYER_NAMES = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PROJECTIONS = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
# Llama 3.1 and 3.2: what llama.cpp turns into factors of frequencies, tried one after another.
_LLAMA3_SCALINGS: tuple[dict[str, Any], ...] = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62  # they scale attention by the hidden size


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of one `general.architecture` become a Hugging Face folder.

    Attributes:
        config_class: name of the config in transformers.
        model_class: name of the model in transformers.
        settings: of the file, as keywords of the config; what all architectures have is left out.
        layer_names: llama.cpp's name of a tensor within a layer -> transformers'.
        pairs_rotated: whether rows of q and k are stored for the rotation of neighbours; here the
            halves of a head are rotated.
        norm_offset: what a file's norms hold on top of the checkpoint's.
    """

    config_class: str
    model_class: str
    settings: Callable[[GgufFile, str], dict[str, Any]]
    layer_names: dict[str, str] = field(default_factory=lambda: _LAYER_NAMES)
    pairs_rotated: bool = False
    norm_offset: float = 0.0

    def weight_name(self, stored: str) -> tuple[str, str]:
        """The name in transformers of a tensor, and its kind: the part of `stored` without a layer.

        Raises:
            ValueError: no model of this architecture has such a tensor.
        """
        match stored.split("."):
            case [kind, "weight"] if kind in _OUTER_NAMES:
                return f"{_OUTER_NAMES[kind]}.weight", kind
            case ["blk", layer, kind, "weight"] if kind in self.layer_names:
                return f"model.layers.{layer}.{self.layer_names[kind]}.weight", kind
            case ["blk", layer, kind, "bias"] if kind in _PROJECTIONS:
                return f"model.layers.{layer}.{self.layer_names[kind]}.bias", kind
        raise ValueError(f"GGUF: no model of this kind has a tensor {stored!r}")


def architecture_of(file: GgufFile) -> Architecture:
    """The entry of `ARCHITECTURES` that a file belongs to.

    Raises:
        ValueError: it is of another architecture, or a mixture of experts.
    """
    name = file.field("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"GGUF: general.architecture is {name!r}; those read are {', '.join(ARCHITECTURES)}"
        )
    if experts := file.fields.get(f"{name}.expert_count"):
        raise ValueError(
            f"GGUF: {name}.expert_count is {experts}: of GGUF files, only those without experts "
            "are read; take the model's safetensors folder"
        )
    return ARCHITECTURES[name]


def make_config(file: GgufFile, dtype: str) -> "PreTrainedConfig":
    """The config of a file, with `dtype` as that of its weights.

    Raises:
        ValueError: a field is missing, or it says what is not read; it names the field.
    """
    import transformers

    architecture = architecture_of(file)
    name = file.field("general.architecture")
    heads, kv_heads = _whole(file, f"{name}.attention.head_count"), _kv_heads(file, name)
    hidden = _whole(file, f"{name}.embedding_length")
    head_dim = file.fields.get(f"{name}.attention.key_length") or file.fields.get(
        f"{name}.rope.dimension_count", hidden // heads
    )
    for key, right in {
        f"{name}.attention.value_length": head_dim,
        f"{name}.rope.dimension_count": head_dim,
        f"{name}.attention.causal": True,
    }.items():
        if file.fields.get(key, right) != right:
            raise ValueError(f"GGUF: {key} is {file.fields[key]!r}; only {right!r} is read")
    settings = {
        "architectures": [architecture.model_class],
        "dtype": dtype,
        "hidden_size": hidden,
        "intermediate_size": _whole(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": _num_layers(file, name),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _whole(file, f"{name}.context_length"),
        "vocab_size": len(file.field("tokenizer.ggml.tokens")),
        # Stored as float32: 1e-05 comes back as 9.999999747378752e-06.
        "rms_norm_eps": _short(file.field(f"{name}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(file),
        "pad_token_id": file.fields.get("tokenizer.ggml.padding_token_id"),
        **architecture.settings(file, name),
    }
    config: PreTrainedConfig = getattr(transformers, architecture.config_class)(**settings)
    return config


def _short(number: float) -> float:
    """A number that was stored as float32, as it was written."""
    return float(f"{number:.6g}")


def _whole(file: GgufFile, key: str) -> int:
    value = file.field(key)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]  # per layer, all the same
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"GGUF: {key} is {value!r:.80}; only one whole number above 0 is read")
    return value


def _num_layers(file: GgufFile, name: str) -> int:
    """Every layer has tensors, so a number that is no layers' is told before they are made."""
    key = f"{name}.block_count"
    if (count := _whole(file, key)) > len(file.tensors):
        raise ValueError(f"GGUF: {key} is {count}, and there are {len(file.tensors)} tensors")
    return count


def _kv_heads(file: GgufFile, name: str) -> int:
    key = f"{name}.attention.head_count_kv"
    return _whole(file, key if key in file.fields else f"{name}.attention.head_count")


def _end_ids(file: GgufFile) -> int | list[int] | None:
    """What ends a text, and a turn where the file tells them apart."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = list(dict.fromkeys(file.fields[key] for key in keys if key in file.fields))
    return ids[0] if len(ids) == 1 else ids or None


def _rope(file: GgufFile, name: str, theta: float) -> dict[str, Any]:
    """Rotary settings: the base, and how it is scaled (`NAME.rope.scaling.*`)."""
    prefix = f"{name}.rope.scaling"
    kind = file.fields.get(f"{prefix}.type", "none")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _short(file.fields.get(f"{name}.rope.freq_base", theta)),
    }
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": _short(file.field(f"{prefix}.factor"))}
    elif kind != "none":
        raise ValueError(f"GGUF: {prefix}.type is {kind!r}; those read are none, linear, yarn")
    if kind == "yarn":
        original = file.fields.get(f"{prefix}.original_context_length")
        if original:
            rope["original_max_position_embeddings"] = original
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3_scaling(file, rope["rope_theta"])
    return rope


def _llama3_scaling(file: GgufFile, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3.1 or 3.2 that the file's factors of frequencies come from.

    A factor is 1 for wavelengths under original / high, `factor` over original / low, and between
    them 1 / ((1 - s) / factor + s) with s = (original / wavelength - low) / (high - low).
    """
    stored = file.rows(file.tensors["rope_freqs.weight"]).view("<f4")[0]
    for scaling in _LLAMA3_SCALINGS:
        original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        expected = []
        for i in range(len(stored)):
            waves = original / (2 * math.pi * theta ** (i / len(stored)))
            share = min(max((waves - low) / (high - low), 0.0), 1.0)
            expected.append(1 / ((1 - share) / factor + share))
        pairs = zip(stored, expected, strict=True)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
            return scaling
    raise ValueError(
        "GGUF: rope_freqs.weight holds factors of another scaling than Llama 3.1's and 3.2's; "
        "only theirs are read"
    )


def _llama(file: GgufFile, name: str) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(file, name, 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


def _qwen(file: GgufFile, name: str) -> dict[str, Any]:
    return {"rope_parameters": _rope(file, name, 1e6)}


def _attention_divisor(file: GgufFile, name: str, layers_by_hidden: int) -> int:
    """Attention scores are divided by its root: a head's size, or the hidden size's share."""
    if _whole(file, f"{name}.block_count") == layers_by_hidden:
        hidden = _whole(file, f"{name}.embedding_length")
        return hidden // _whole(file, f"{name}.attention.head_count")
    return int(file.field(f"{name}.attention.key_length"))


def _layer_types(num_layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th layer sees all tokens."""
    return [
        "full_attention" if layer % pattern == pattern - 1 else "sliding_attention"
        for layer in range(num_layers)
    ]


def _gemma2(file: GgufFile, name: str) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(file, name, 10000.0),
        "query_pre_attn_scalar": _attention_divisor(file, name, _GEMMA2_27B_LAYERS),
        "sliding_window": _whole(file, f"{name}.attention.sliding_window"),
        "layer_types": _layer_types(_whole(file, f"{name}.block_count"), 2),
        "attn_logit_softcapping": _short(file.fields.get(f"{name}.attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _short(file.fields.get(f"{name}.final_logit_softcapping", 30.0)),
    }


def _gemma3(file: GgufFile, name: str) -> dict[str, Any]:
    local_theta = _short(file.fields.get(f"{name}.rope.freq_base_swa", 10000.0))
    softcap = _short(file.fields.get(f"{name}.final_logit_softcapping", 0.0))
    return {
        "rope_parameters": {
            "full_attention": _rope(file, name, 1e6),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
        "query_pre_attn_scalar": _attention_divisor(file, name, _GEMMA3_27B_LAYERS),
        "sliding_window": _whole(file, f"{name}.attention.sliding_window"),
        "layer_types": _layer_types(_whole(file, f"{name}.block_count"), 6),
        "final_logit_softcapping": softcap or None,
    }


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM", _llama, pairs_rotated=True),
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM", _qwen),
    "qwen3": Architecture(
        "Qwen3Config", "Qwen3ForCausalLM", _qwen, layer_names={**_LAYER_NAMES, **_QK_NORMS}
    ),
    "gemma2": Architecture(
        "Gemma2Config", "Gemma2ForCausalLM", _gemma2, _GEMMA_LAYER_NAMES, norm_offset=1.0
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _gemma3,
        {**_GEMMA_LAYER_NAMES, **_QK_NORMS},
        norm_offset=1.0,
    ),
}
