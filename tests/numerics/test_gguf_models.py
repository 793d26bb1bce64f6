"""A GGUF file goes wherever a model does, and answers as the model that it was made of."""

import logging
from pathlib import Path

import pytest
import torch
from support.gguf_files import make_model, write_gguf
from typer.testing import CliRunner

from saqqara import LLM, SamplingParams
from saqqara.cli import app
from saqqara.workers.models.source import local_folder

PROMPT = [1, *range(5, 40)]  # longer than the window of 24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAQQARA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/models/gguf"


@pytest.mark.parametrize("name", ["llama-3.1", "qwen3", "gemma3"])
def test_its_answers_are_those_of_the_model_before_it_was_written(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(name)
    file = tmp_path / "model.gguf"
    write_gguf(file, model)
    with caplog.at_level(logging.INFO, "saqqara.workers.gguf.cached"):
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        with LLM(str(file), dtype="float32", max_model_len=64, kv_memory_gib=0.01) as llm:
            (answer,) = llm.generate([PROMPT], sampling)
    assert [line for line in caplog.messages if "dequantised 100% of" in line]
    expected = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=8, min_new_tokens=8
    )
    assert list(answer.outputs[0].token_ids) == expected[0, len(PROMPT) :].tolist()


def test_a_file_is_converted_once_for_each_content(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "my [model].gguf"
    write_gguf(file, make_model("llama"))
    folder = local_folder(file)
    assert folder is not None
    made = (folder / "model.safetensors").stat()
    assert local_folder(str(file)) == folder
    assert (folder / "model.safetensors").stat() == made
    assert folder.parent == cache

    write_gguf(file, make_model("llama-tied"))
    other = local_folder(file)
    assert other is not None
    assert other.name.rpartition("-")[0] == folder.name.rpartition("-")[0] == "my__model_"
    assert other != folder


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, make_model("llama"), architecture="mamba")
    other = tmp_path / "weights.bin"
    other.write_bytes(b"weights")
    for given, message in {
        file: "error: model: GGUF: general.architecture is 'mamba'; those read are llama, ",
        other: f"error: model: {other} is a file, and not a GGUF file; it needs one, or the folder",
    }.items():
        done = CliRunner().invoke(app, ["generate", "hello", "--model", str(given)])
        assert done.exit_code == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not cache.exists()
