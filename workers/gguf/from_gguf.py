"""From a GGUF file to a plain safetensors folder: Llama with a byte-level BPE vocabulary.

`gguf` alone reads it: transformers' own reader wants accelerate, parses the file three times and
ignores the name of the pre-tokenizer. Anything that this does not know is refused by name.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

# llama.cpp's names of tensors, and transformers'.
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
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


def convert(file: Path, folder: Path) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer of `file` into `folder`.

    Raises:
        ValueError: the file holds another kind of model, tensor or tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(file)
    config = _config(reader)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(reader).save_pretrained(folder)


def _field(reader: "GGUFReader", name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"GGUF: it has no field {name!r}")
    return field.contents()


def _expect(reader: "GGUFReader", name: str, expected: object) -> None:
    found = _field(reader, name)
    if found != expected:
        raise ValueError(f"GGUF: {name} is {found!r}; only {expected!r} is read")


def _config(reader: "GGUFReader") -> "LlamaConfig":
    from transformers import LlamaConfig

    _expect(reader, "general.architecture", "llama")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=_field(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        vocab_size=_field(reader, "llama.vocab_size"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _field(reader, "llama.rope.freq_base"),
        },
        # Stored as float32: 1e-05 comes back as 9.999999747378752e-06.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def _weights(reader: "GGUFReader", config: "LlamaConfig") -> dict[str, "torch.Tensor"]:
    """Every tensor, dequantised, as [out, in] or [size], under the name transformers has for it."""
    import numpy as np
    import torch
    from gguf import dequantize

    # q and k are stored for rotation of neighbours; here the halves of a head are rotated.
    rotated_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        name, kind = _weight_name(tensor.name)
        values = np.array(dequantize(tensor.data, tensor.tensor_type))
        if kind in rotated_heads:
            pairs = values.reshape(rotated_heads[kind], -1, 2, values.shape[1])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
    return weights


def _weight_name(stored: str) -> tuple[str, str]:
    """The name of a tensor in transformers, and its kind: the part of `stored` without a layer."""
    match stored.split("."):
        case [kind, "weight"] if kind in OUTER_NAMES:
            return f"{OUTER_NAMES[kind]}.weight", kind
        case ["blk", layer, kind, "weight"] if kind in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight", kind
    raise ValueError(f"GGUF: no model of this kind has a tensor {stored!r}")


def _tokenizer(reader: "GGUFReader") -> "PreTrainedTokenizerFast":
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _expect(reader, "tokenizer.ggml.model", "gpt2")
    _expect(reader, "tokenizer.ggml.pre", "smollm")
    _expect(reader, "tokenizer.ggml.add_bos_token", False)
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # "smollm": digits one by one, before the byte-level rule.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, "llama.context_length"),
    )
