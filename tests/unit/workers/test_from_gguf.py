"""A tiny Llama written as GGUF comes back as the same model; other kinds of file are refused."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.tiny import save_tiny
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from saqqara.workers.gguf.from_gguf import LAYER_NAMES, OUTER_NAMES, convert

SPECIAL = ["<unk>", "<s>", "</s>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "ab", "12"]
MERGES = ["a b", "1 2"]
BLOCKS = {hf: stored for stored, hf in LAYER_NAMES.items()}
OUTER = {hf: stored for stored, hf in OUTER_NAMES.items()}


def stored_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in OUTER:
        return f"{OUTER[name]}.weight"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{BLOCKS[rest]}.weight"


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows i and i + head_dim/2 of each head side by side: what llama.cpp rotates."""
    half = head_dim // 2
    order = [row for i in range(half) for row in (i, i + half)]
    return torch.cat([head[order] for head in torch.split(weight, head_dim)])


def write_gguf(file: Path, model: Any, **changes: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, changes.get("architecture", "llama"))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (len(TOKENS) - len(kinds))])
    writer.add_token_merges(MERGES)
    writer.add_add_bos_token(False)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if changes.get("padding", True):
        writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".q_proj." in name or ".k_proj." in name:
            weight = interleaved(weight, config.head_dim)
        writer.add_tensor(stored_name(name), weight.numpy())
    if extra := changes.get("tensor"):
        writer.add_tensor(extra, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied"])
def test_the_model_comes_back(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path / "original")
    write_gguf(tmp_path / "model.gguf", model)
    (tmp_path / "folder").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "folder")

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert found.dtype == torch.bfloat16
    assert found.state_dict().keys() == model.state_dict().keys()
    for weight, expected in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected.to(torch.bfloat16), rtol=0, atol=0)
    assert found.config.to_dict() == {
        **model.config.to_dict(),
        "dtype": "bfloat16",
        "pad_token_id": 2,
        "initializer_range": 0.02,  # not in the file, and only for training
        "_name_or_path": str(tmp_path / "folder"),
    }

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    ids = tokenizer("ab a12</s>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "a", "1", "2", "</s>"]
    assert tokenizer.decode(ids) == "ab a12</s>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen3"}, r"general.architecture is 'qwen3'; only 'llama' is read"),
        ({"tokenizer": "llama"}, r"tokenizer.ggml.model is 'llama'; only 'gpt2' is read"),
        ({"pre": "llama-bpe"}, r"tokenizer.ggml.pre is 'llama-bpe'; only 'smollm' is read"),
        ({"padding": False}, r"it has no field 'tokenizer.ggml.padding_token_id'"),
        ({"tensor": "blk.0.ffn_gate_exps.weight"}, r"a tensor 'blk.0.ffn_gate_exps.weight'"),
        ({"tensor": "rope_freqs.weight"}, r"a tensor 'rope_freqs.weight'"),
    ],
)
def test_what_it_does_not_know_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", save_tiny("llama-gqa", tmp_path, num_layers=1), **changes)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.gguf", tmp_path)
