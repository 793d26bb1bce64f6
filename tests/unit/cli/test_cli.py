"""The command line: where settings come from, and how mistakes are reported."""

import bz2
import gzip
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support.fake_client import FakeClient
from support.tiny import CONFIGS
from typer.testing import CliRunner, Result

from saqqara import __version__
from saqqara.cli import app
from saqqara.cluster.batch import job as jobs
from saqqara.cluster.batch.parts import replica as replicas
from saqqara.cluster.cli import generate as generating
from saqqara.cluster.cli.options import Settings, with_settings
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig
from saqqara.configs.yaml_files import CONFIG_DIR

runner = CliRunner()
CLUSTER_PRESETS = sorted(path.stem for path in (CONFIG_DIR / "cluster").glob("*.yaml"))


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an empty `in.jsonl`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("")
    return tmp_path


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sets up logging; tests after it should not notice."""
    root, ours = logging.getLogger(), logging.getLogger("saqqara")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def resolve(*arguments: str, sampling: bool = True) -> Settings:
    """The settings that a command with these arguments gets."""
    seen: list[Settings] = []

    @with_settings(sampling=sampling)
    def command(*, settings: Settings) -> None:
        """A command."""
        seen.append(settings)

    small = typer.Typer()
    small.command()(command)
    result = runner.invoke(small, arguments)
    assert result.exit_code == 0, result.stderr
    return seen[0]


def fails(*arguments: str, app: typer.Typer = app) -> str:
    """Stderr of a command that must end with exit code 2 and no traceback.

    Without the log's lines: on a busy machine it may say that something is still waited for.
    """
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if " INFO saqqara." not in line)


def test_the_command_line_overrides_yaml_which_overrides_defaults(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": "from-yaml",
                "max_num_seqs": 7,
                "retention": {"method": "pyramidkv", "window": 16},
                "budget": "25%",
                "sampling": {"max_tokens": 99, "stop": ["a", "b"]},
            }
        )
    )
    settings = resolve("--config", str(config), "--max-num-seqs", "9", "--max-tokens", "5")
    assert settings.config.model == "from-yaml"
    assert settings.config.max_num_seqs == 9
    assert settings.config.page_tokens == EngineConfig(model="x").page_tokens
    assert settings.config.retention == {"method": "pyramidkv", "window": 16}
    assert settings.config.budget == "25%"
    assert settings.sampling == SamplingParams(max_tokens=5, stop=("a", "b"))


def test_every_setting_has_a_flag() -> None:
    help_text = runner.invoke(app, ["batch", "--help"]).output
    for name in EngineConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in help_text
    for name in SamplingParams.model_fields:
        assert f"--{'sampling-' if name == 'seed' else ''}{name.replace('_', '-')}" in help_text
    help_text = runner.invoke(app, ["bench", "throughput", "--help"]).output
    assert "--max-num-seqs" in help_text
    assert "--temperature" not in help_text


def test_flags_mean_what_yaml_would() -> None:
    settings = resolve(
        *("--model", "123", "--no-warmup", "--check-integrity", "--kv-memory-gib", "0.5"),
        *("--retention", "{method: snapkv, window: 8}", "--budget", "64"),
        *("--executor", "ray", "--pipeline-parallel-size", "2", "--layer-split", "16,14"),
        *("--seed", "3", "--sampling-seed", "4", "--stop", "x", "--stop", "y: z"),
        *("--stop-token-ids", "5,6", "--ignore-eos", "--max-tokens", "null"),
    )
    config, sampling = settings.config, settings.sampling
    assert config.model == "123"
    assert (config.warmup, config.check_integrity, config.kv_memory_gib) == (False, True, 0.5)
    assert (config.retention, config.budget) == ({"method": "snapkv", "window": 8}, 64)
    assert config.layer_split == (16, 14)
    assert (config.seed, sampling.seed) == (3, 4)
    assert sampling.stop == ("x", "y: z")
    assert sampling.stop_token_ids == (5, 6)
    assert (sampling.ignore_eos, sampling.max_tokens) == (True, None)


@pytest.mark.parametrize("preset", CLUSTER_PRESETS)
def test_presets_hold_settings_that_exist(preset: str) -> None:
    assert resolve("--config", preset, "--model", "m").config.model == "m"


def test_the_presets_of_the_readme() -> None:
    config = resolve("--config", "ray-pp2", "--model", "m").config
    assert (config.executor, config.pipeline_parallel_size) == ("ray", 2)
    config = resolve("--config", "ray-tp2", "--model", "m").config
    assert (config.executor, config.tensor_parallel_size) == ("ray", 2)
    assert resolve("--config", "local", "--model", "m").config.executor == "local"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_num_seq": 3}, "unknown key 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"sampling": {"temprature": 1}}, "unknown key 'temprature'; did you mean 'temperature'?"),
        ({"sampling": 3}, "sampling must be a mapping"),
        (
            {"max_tokens": 9},
            "max_tokens is a sampling setting, not the engine's; in a file it stands",
        ),
        ({"zzz": 9}, "unknown key 'zzz'; known: "),
        ({"retention": "snapkv", "budget": 0.25}, "a share is written with a percent sign: '25%'"),
        ({"max_num_seqs": 0}, "max_num_seqs: input should be greater than or equal to 1 (got 0)"),
        ([1], "must hold a mapping"),
    ],
)
def test_a_wrong_config_file_is_one_line(tmp_path: Path, settings: Any, said: str) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(yaml.safe_dump(settings))
    stderr = fails("generate", "hello", "--model", "m", "--config", str(config))
    assert said in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model is required"),
        (["--model", "m", "--config", "nope"], "no file or preset 'nope'"),
        (["--model", "m", "--dtype", "float99"], "dtype: input should be 'auto', 'float32'"),
        (["--model", "m", "--temperature", "hot"], "temperature: "),
        (["--model", "m", "--tensor-parallel-size", "2"], "needs executor='ray'"),
        (["--model", "m", "--layer-split", "3,4"], "layer_split has 2 entries"),
        (["--model", "m", "--config", "ray-pp3"], "did you mean 'ray-pp2'?"),
        (["--model", "m", "--config", "/no/such.yaml"], "there is no file '/no/such.yaml'"),
        (["--model", "m", "--config", "/"], "config: / is a folder"),
        (["--model", "m", "--device", "gpu"], "(got 'gpu'; did you mean 'cuda'?)"),
        (["--model", "m", "--dtype", "bf16"], "did you mean 'bfloat16'?"),
        (["--model", "m", "--tokenizer", "/no/such"], "tokenizer: there is no folder '/no/such'"),
        (["--model", "m", "--dtype", "flaot32"], "did you mean 'float32'?"),
        (["--model", "m", "--retention", "snapk"], "unknown 'snapk'; did you mean 'snapkv'?"),
        (["--model", "m", "--retention", "h20-pyramid"], "did you mean 'h2o-pyramid'?"),
        (["--model", "m", "--retention", "{method: snapkv"], "is no YAML or JSON"),
        (["--model", "m", "--retention", "quest"], "unknown 'quest'; known: ada-pyramidkv, "),
        (["--model", "m", "--retention", "snapkv"], "such as '25%'"),
        (["--model", "m", "--retention", "snapkv", "--budget", "0.25"], "percent sign: '25%'"),
        (["--model", "m", "--budget", "25%"], "choose a method beside it, such as recommended-"),
        (["--modle", "m"], "there is no flag --modle; did you mean --model?"),
        (["--model", "m", "--frobnicate", "3"], "there is no flag --frobnicate (all flags: "),
        (["--model"], "requires an argument"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments: list[str], said: str) -> None:
    stderr = fails("generate", "hello", *arguments)
    assert said in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generat", "hello"], "there is no command 'generat'; did you mean 'generate'?"),
        (["eval", "needel"], "there is no command 'needel'; did you mean 'needle'?"),
        (["xyz"], "there is no command 'xyz'; known: generate, batch, serve, "),
        (["batch", "--model", "m"], "missing argument 'INPUT...' (all flags: "),
        (["eval", "needle", "--model", "m", "--methods", "snapkw"], "did you mean 'snapkv'?"),
        (["eval", "needle", "--model", "m", "--retention", "snapkv@0.25"], "percent sign: '25%'"),
        (["serve", "server.yaml"], "there is no file 'server.yaml'"),
        (["serve", "--model", "/no/such/folder"], "model: there is no folder '/no/such/folder'"),
        (["serve", "org/model"], "there is no file 'org/model' (a model is given as --model)"),
    ],
)
def test_a_wrong_command_is_one_line(command: list[str], said: str) -> None:
    stderr = fails(*command)
    assert said in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    tokenizer = tmp_path / "no-tokenizer"
    CONFIGS["llama-gqa"].save_pretrained(tokenizer)
    (tmp_path / "no-config").mkdir()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    file = str(tokenizer / "config.json")
    said = {
        "/no/such/folder": "model: there is no folder '/no/such/folder'",
        "nobody/nothing": "hf download nobody/nothing --local-dir FOLDER",
        file: f"model: {file} is a file, and not a GGUF file; it needs one",
        str(tmp_path / "no-config"): "has no config.json",
        str(tokenizer): "has no tokenizer (tokenizer.json)",
        str(tmp_path / "gpt2"): "'gpt2' is not supported; supported: gemma2, gemma3_text, llama, ",
