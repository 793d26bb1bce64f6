"""A tiny model written as GGUF comes back as the same model; what is not read is refused."""

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.gguf_files import CONFIGS, make_model, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from saqqara.workers.gguf.from_gguf import convert

TOKENS = torch.arange(3, 43)[None]


def converted(tmp_path: Path, model: Any, **changes: Any) -> Path:
    write_gguf(tmp_path / "model.gguf", model, **changes)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(tmp_path / "model.gguf", folder)
    return folder


@pytest.mark.parametrize("name", [*CONFIGS])
def test_the_model_comes_back(name: str, tmp_path: Path) -> None:
    """Float32 files become float32 folders, so every logit is the same, window and scaling too."""
    model = make_model(name)
    folder = converted(tmp_path, model)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is type(model)
    assert found.dtype == torch.float32
    assert found.config.rope_parameters == model.config.rope_parameters
    assert found.generation_config.eos_token_id == 2
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for key, weight in found.state_dict().items():
        # Gemma's norms were stored as 1 + w, rounded to float32.
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=2e-7 if "norm" in key else 0)
    with torch.no_grad():
        logits = found(TOKENS).logits
        torch.testing.assert_close(logits, model(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3"])
def test_quantised_weights_come_back_as_bfloat16(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    kind = gguf.GGMLQuantizationType.Q8_0
    fields = {"tokenizer.ggml.eot_token_id": 5}
    found = AutoModelForCausalLM.from_pretrained(
        converted(tmp_path, model, quantised=kind, fields=fields)
    )
    assert found.dtype == torch.bfloat16
    assert found.generation_config.eos_token_id == [2, 5]  # of a text, and of a turn
    expected = model.state_dict()
    for key, weight in found.state_dict().items():
        exact = "norm" in key or key.endswith("bias")
        largest = float(expected[key].abs().max())
        torch.testing.assert_close(
            weight.float(), expected[key], rtol=0, atol=0 if exact else largest / 100
        )


@pytest.mark.parametrize("lossless", [True, False])
def test_norms_stay_float32_where_bfloat16_would_lose_something(
    lossless: bool, tmp_path: Path
) -> None:
    model = make_model("gemma3", torch.bfloat16 if lossless else torch.float32)
    folder = converted(tmp_path, model, quantised=gguf.GGMLQuantizationType.BF16)
    header = (folder / "model.safetensors").read_bytes()[:20_000].decode("latin-1")
    assert ('"F32"' not in header) == lossless


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "'mamba'; those read are llama, qwen2, qwen3, gemma2, gemma3"),
        ({"fields": {"llama.expert_count": 8}}, "llama.expert_count is 8: of GGUF files"),
        ({"fields": {"llama.block_count": None}}, "it has no field 'llama.block_count'"),
        ({"fields": {"llama.block_count": 3}}, "imply .* as the shape of .*layers.2.*; .* nothing"),
        ({"fields": {"llama.block_count": 1 << 31}}, "block_count is 2147483648, and there are 21"),
        ({"fields": {"llama.attention.head_count_kv": 0}}, "only one whole number above 0 is read"),
        ({"merges": ["a ß"]}, "its fields make no model or tokenizer"),
        ({"fields": {"llama.attention.value_length": 8}}, "value_length is 8; only 16 is read"),
        ({"fields": {"llama.rope.scaling.type": "longrope"}}, "'longrope'; those read are none"),
        ({"fields": {"split.count": 3}}, "is one of 3 pieces; join them first"),
        ({"tensor": "blk.0.ssm_a.weight"}, "a tensor 'blk.0.ssm_a.weight'"),
        ({"tensor": "rope_freqs.weight"}, "factors of another scaling than Llama 3.1's"),
        ({"tokenizer": "t5"}, "tokenizer.ggml.model is 't5'; those read are gpt2, llama"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; those read are gpt-2, smollm"),
        ({"tokenizer": "llama", "own": {"Ġa b"}}, "no field 'tokenizer.ggml.scores'"),
        ({"fields": {"tokenizer.ggml.bos_token_id": 999}}, "bos_token_id is 999; there are 262"),
    ],
)
def test_what_it_does_not_know_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, make_model("llama"), **changes)
    assert not [*(tmp_path / "folder").iterdir()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 something else", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "is of version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "is in big-endian order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "ends within its header"),
        (
            b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 0, 1 << 60),  # a list of bytes
            "ends within its header",
        ),
    ],
)
def test_another_file_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.gguf", tmp_path)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, make_model("llama"))
    whole, name = bytearray(file.read_bytes()), b"blk.1.ffn_down.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8 + 4  # behind dimensions and type: the offset
    (offset,) = struct.unpack_from("<Q", whole, at)
    struct.pack_into("<Q", whole, at, offset - 32)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_down\.weight' of .* overlap"):
        convert(file, tmp_path)


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, make_model("llama"))
    whole = file.read_bytes()
    for size in (10, 100, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"ends within its header|it is cut off"):
            convert(file, tmp_path)


def test_words_are_put_together_by_merges(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path, make_model("llama")))
    ids = tokenizer("ab ab12</s>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "ab", "1", "2", "</s>"]
    assert tokenizer.decode(ids) == "ab ab12</s>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_put_together_by_scores(prefix: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"fields": {"tokenizer.ggml.add_space_prefix": prefix}}
    if prefix:
        changes["own"] = {"\n\n"}
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path, make_model("gemma3"), **changes))
    before = "▁" if prefix else ""
    for text, pieces in {
        "ab": [before + "ab"],
        "ab  c": [before + "ab", "▁▁", "c"],
        " abc": [*([before] if prefix else []), "▁ab", "c"],  # `▁ab` has a better score than `abc`
        "ab\n\n\nabc": [before + "ab", "\n\n", *([before] if prefix else []), "\n", "abc"],
        "ab é": [before + "ab", "▁", "<0xC3>", "<0xA9>"],
    }.items():
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *pieces], text
        if text.count("\n") == 0 or not prefix:
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
