"""Tiny random models, written as GGUF by gguf's own writer in the way of llama.cpp's converter."""

from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

CONTROL = ["<unk>", "<s>", "</s>"]
BYTE_LEVEL = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "12", "Ġa"]
MERGES = ["a b", "1 2", "Ġ a"]
_WORDS = ["a", "b", "c", "▁", "ab", "▁a", "▁ab", "abc", "bc", "bcbc", "▁▁", "\n", "\n\n"]
PIECES = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
_SIZES: dict[str, Any] = {
    "vocab_size": len(BYTE_LEVEL),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {
    **_SIZES,
    "vocab_size": len(PIECES),
    "tie_word_embeddings": True,
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES),
    "llama-tied": LlamaConfig(**{**_SIZES, "tie_word_embeddings": True}),
    "llama-bias": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama-yarn": LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-3.1": LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2": Qwen2Config(**{k: v for k, v in _SIZES.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**_SIZES),
    "gemma2": Gemma2Config(**_GEMMA),
    "gemma3": Gemma3TextConfig(**{**_GEMMA, "num_hidden_layers": 6}),
}
# What llama.cpp calls the parts of a layer, written down apart from what reads them.
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def make_model(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random model of `CONFIGS` in float32 whose numbers `dtype` holds exactly."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            parameter.copy_(parameter.to(dtype))
    return model


def write_gguf(file: Path, model: Any, **changes: Any) -> None:
    """Write a model of `make_model`; `changes` depart from what is right.

    They are `architecture`, `tokenizer`, `pre`, `fields` (key -> number or text, None: leave it
    out), `own` (pieces that are the user's), `merges` (of the byte level), `tensor` (name of one
    more) and `quantised` (type of all matrices).
    """
    config = model.config
    kind = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    architecture = changes.get("architecture", kind)
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {**_fields(config, architecture), **changes.get("fields", {})}.items():
        if value is not None:
            _add_field(writer, key, value)
    _add_vocabulary(writer, config, changes)
    quantised = changes.get("quantised")
    for name, weight in _stored(model, kind).items():
        if quantised is None or weight.dim() == 1:
            writer.add_tensor(name, weight.numpy())
        else:
            numbers = gguf.quantize(weight.numpy(), quantised)
            writer.add_tensor(name, numbers, raw_dtype=quantised)
    if extra := changes.get("tensor"):
        writer.add_tensor(extra, torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)


def _fields(config: Any, name: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    fields = {
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    if "gemma" in name:
        fields["tokenizer.ggml.add_space_prefix"] = False
        fields[f"{name}.attention.sliding_window"] = config.sliding_window
    if name == "gemma2":
        fields[f"{name}.attn_logit_softcapping"] = config.attn_logit_softcapping
        fields[f"{name}.final_logit_softcapping"] = config.final_logit_softcapping
    if rope.get("rope_type") == "yarn":
        fields[f"{name}.rope.scaling.type"] = "yarn"
        fields[f"{name}.rope.scaling.factor"] = rope["factor"]
        original = rope["original_max_position_embeddings"]
        fields[f"{name}.rope.scaling.original_context_length"] = original
    return fields


def _add_vocabulary(writer: gguf.GGUFWriter, config: Any, changes: dict[str, Any]) -> None:
    pieces = config.vocab_size == len(PIECES)
    writer.add_tokenizer_model(changes.get("tokenizer", "llama" if pieces else "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "default" if pieces else "smollm"))
    tokens = PIECES if pieces else BYTE_LEVEL
    own = changes.get("own", {"▁▁", "\n\n"})
    writer.add_token_list([token.replace("▁", " ") if token in own else token for token in tokens])
    writer.add_token_types([_kind(token, own) for token in tokens])
    if pieces:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_token_merges(changes.get("merges", MERGES))


def _kind(token: str, own: set[str]) -> gguf.TokenType:
    if token in CONTROL:
        return gguf.TokenType.CONTROL
    if token in own:
        return gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if token.startswith("<0x") else gguf.TokenType.NORMAL


def _stored(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """Tensors as llama.cpp's converter stores them."""
    config = model.config
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {**_PARTS, **_GEMMA_PARTS} if kind.startswith("gemma") else _PARTS
    stored = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, end = name.rpartition(".")
        if kind == "llama" and module.endswith(("q_proj", "k_proj")):
            weight = interleaved(weight, config.head_dim)
        if kind.startswith("gemma") and module.endswith("norm"):
            weight = weight + 1
        if module in outer:
            stored[f"{outer[module]}.{end}"] = weight
        else:
            layer, _, part = module.removeprefix("model.layers.").partition(".")
            stored[f"blk.{layer}.{parts[part]}.{end}"] = weight
    if config.rope_parameters.get("rope_type") == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 1, 2 / config.head_dim))
        stored["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq
    return stored


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows i and i + head_dim/2 of each head side by side: what llama.cpp rotates."""
    half = head_dim // 2
    order = [row for i in range(half) for row in (i, i + half)]
    return torch.cat([head[order] for head in torch.split(weight, head_dim)])
