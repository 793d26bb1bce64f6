"""What results of a batch job depend on: the model's content, not its place, and every setting
that changes answers.

A job that is resumed under anything else is refused, and one that only runs elsewhere is not.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fake_client import FakeClient
from unit.batch.test_jobs import make_job, run

from saqqara.cluster.batch import fingerprint as fingerprinting
from saqqara.cluster.batch.fingerprint import (
    NEUTRAL_SETTINGS,
    differences,
    fingerprint,
)
from saqqara.cluster.batch.job import run_batch
from saqqara.cluster.engine.client import EngineDescription
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.profiles.fingerprint import weights_digest
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import WorkerInfo, WorkerMemory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the files of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    texts = {
        "config.json": "{}",
        "generation_config.json": '{"eos_token_id": 2}',
        "tokenizer.json": '{"a": 1}',
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    tensors = {"a": torch.zeros(300, 100), "norm": torch.ones(10), "b": torch.zeros(200, 200)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def settings_of(model: Path, **config: Any) -> dict[str, Any]:
    """The fingerprint of a job with this model."""
    engine = EngineConfig(model=str(model), **config)
    return fingerprint(engine, SamplingParams(), "of the input")


def changed(model: Path, before: dict[str, Any]) -> str:
    """What the fingerprint says has changed."""
    (found,) = differences(before, settings_of(model))
    return found


def test_a_copy_of_a_model_is_the_same_model(model: Path, tmp_path: Path) -> None:
    before = settings_of(model)
    copy = tmp_path / "elsewhere" / "other name"
    shutil.copytree(model, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert not differences(before, settings_of(copy))


def test_files_beside_the_model_do_not_count(model: Path) -> None:
    before = settings_of(model)
    (model / "README.md").write_text("hello")
    (model / "pytorch_model.bin").write_text("not read")
    assert not differences(before, settings_of(model))


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"],
)
def test_the_content_of_each_small_file_counts(model: Path, name: str) -> None:
    before = settings_of(model)
    (model / name).write_text((model / name).read_text() + " ")
    assert changed(model, before) == f"{name} of the model has changed"


@pytest.mark.parametrize(
    ("tensor", "place"), [("a", 0), ("a", -1), ("b", 0), ("b", -1), ("norm", 5)]
)
def test_a_change_of_any_tensor_counts(model: Path, tensor: str, place: int) -> None:
    before = settings_of(model)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor].view(-1)[place] += 1
    save_file(tensors, file)
    assert changed(model, before) == "weights of the model has changed"


def test_other_names_and_shapes_of_tensors_count(model: Path) -> None:
    before = weights_digest(model)
    tensors = load_file(model / "model.safetensors")
    tensors["b"] = tensors["b"].view(100, 400)
    save_file(tensors, model / "model.safetensors")
    assert weights_digest(model) != before


def test_a_huge_checkpoint_is_read_in_blocks(model: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}})
    file = model / "model.safetensors"
    with file.open("wb") as opened:  # 32 GiB, but for the header a hole
        opened.write(len(header).to_bytes(8, "little") + header.encode())
        opened.truncate(8 + len(header) + 2**35)
    before = weights_digest(model)
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"x")
    assert weights_digest(model) != before


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]"])
def test_broken_weights_are_left_to_the_engine(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert weights_digest(model)


def test_random_weights_are_told_by_their_seed(model: Path) -> None:
    before = settings_of(model, load_format="dummy")
    (model / "model.safetensors").unlink()
    assert not differences(before, settings_of(model, load_format="dummy"))
    assert differences(before, settings_of(model, load_format="dummy", seed=1))


def test_a_tokenizer_of_its_own_counts(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("1")
    before = settings_of(model, tokenizer=str(other))
    (other / "tokenizer.json").write_text("2")
    (found,) = differences(before, settings_of(model, tokenizer=str(other)))
    assert found == "tokenizer.json of the tokenizer has changed"


def test_every_setting_counts_but_those_of_speed(model: Path) -> None:
    assert EngineConfig.model_fields.keys() >= NEUTRAL_SETTINGS
    before = settings_of(model)
    for setting, value in [
        ("linear_backend", "torch"),
        ("attention_backend", "reference"),
        ("dtype", "float32"),
        ("device", "cpu"),
        ("seed", 1),
        ("max_model_len", 64),
        ("retention", "streaming"),
    ]:
        extra = {"budget": 64} if setting == "retention" else {}
        assert differences(before, settings_of(model, **{setting: value}, **extra)), setting
    neutral: dict[str, Any] = {"page_tokens": 8, "max_num_seqs": 2, "executor": "ray"}
    neutral |= {"num_threads": 1, "prefix_caching": False}
    assert not differences(before, settings_of(model, **neutral))


def test_the_size_of_pages_counts_where_rows_are_compacted_by_it(model: Path) -> None:
    retention = {"method": "snapkv", "budget": 64, "decode": {"slack_pages": 4}}
    before = settings_of(model, retention=retention)
    assert differences(before, settings_of(model, retention=retention, page_tokens=8))


def worker(linear_backend: str) -> WorkerInfo:
    """A rank that computes its linear layers like this."""
    return WorkerInfo(
        rank=0,
        pipeline_rank=0,
        tensor_rank=0,
        start_layer=0,
        stop_layer=1,
        start_head=0,
        stop_head=1,
        num_pages=1,
        page_tokens=16,
        page_bytes=1,
        device="cpu",
        dtype="bfloat16",
        attention_backend="cpu",
        attention_reason="",
        linear_backend=linear_backend,
        linear_reason="",
        dtype_reason="",
        memory=WorkerMemory(0, 0, 0, 0, 0),
        hostname="host",
        pid=1,
    )


class On(FakeClient):
    """An engine on a machine where `auto` comes to this linear backend."""

    def __init__(self, linear_backend: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.workers = (worker(linear_backend),)

    def describe(self) -> EngineDescription:
        return EngineDescription(self.config, self.workers, None, None, 0.0)


def test_a_job_is_not_resumed_where_auto_means_something_else(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(9)])
    with pytest.raises(RuntimeError):
        run_batch(job, On("native", die_after=3))
    with pytest.raises(ValueError, match="linear_backend was 'native' and is now 'torch'"):
        run_batch(job, On("torch"))
    assert run_batch(job, On("native")).complete
    assert run_batch(job, On("torch")).resumed == 9  # nothing is left to do


def test_a_job_with_another_model_in_the_same_place_is_refused(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}], config=EngineConfig(model=str(model)))
    run_batch(job, FakeClient())
    (model / "config.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match=r"config\.json of the model has changed.*--overwrite"):
        run_batch(job, FakeClient())
    anew = make_job(
        tmp_path, [{"prompt": "x"}], config=EngineConfig(model=str(model)), overwrite=True
    )
    assert run(anew)[0]["error"] is None


def test_a_hub_model_is_told_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(9)])
    with pytest.raises(EngineDeadError):
        run_batch(job, FakeClient(die_after=3, per_poll=1))  # where no hub can say which it is

    def commit(name: str) -> None:
        folder = tmp_path / "snapshots" / name
        monkeypatch.setattr(fingerprinting, "described_folder", lambda model: folder)

    commit("abc")
    with pytest.raises(EngineDeadError):
        run_batch(job, FakeClient(die_after=3, per_poll=1))
    commit("def")
    with pytest.raises(ValueError, match="commit of the model was 'abc' and is now 'def'"):
        run_batch(job, FakeClient())
    commit("abc")
    assert run_batch(job, FakeClient()).resumed == 6
