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
    }
    for model, message in said.items():
        for command in (["generate", "hello"], ["eval", "needle"]):
            stderr = fails(*command, "--model", model)
            assert message in stderr
            assert stderr.startswith("error: ")
            assert stderr.count("\n") == 1


def test_yaml_that_is_none_is_said_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("model: m\nmax_num_seqs: [3\n")
    stderr = fails("generate", "hello", "--config", str(config))
    assert f"config: {config}, line 3 is no YAML: " in stderr
    assert stderr.count("\n") == 1


def test_the_names_of_vllm_are_taken_where_they_mean_the_same(tmp_path: Path) -> None:
    settings = resolve(
        *("--model", "org/name", "--gpu-memory-utilization", "0.8", "--block-size", "32"),
        *("--max-num-batched-tokens", "512", "--enforce-eager", "--revision", "abc"),
        *("--quantization", "null", "--swap-space", "0", "--enable-prefix-caching"),
    )
    config = settings.config
    assert (config.model, config.memory_utilization) == ("org/name@abc", 0.8)
    assert (config.page_tokens, config.max_prefill_tokens) == (32, 512)
    assert (config.cuda_graphs, config.prefix_caching) == ("off", True)
    file = tmp_path / "engine.yaml"
    file.write_text("model: m\nblock_size: 8\nenforce_eager: false\n")
    config = resolve("--config", str(file)).config
    assert (config.page_tokens, config.cuda_graphs) == (8, "auto")
    assert resolve("--config", str(file), "--page-tokens", "4").config.page_tokens == 4
    assert "--block-size" not in runner.invoke(app, ["batch", "--help"]).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantization", "awq"], "use a checkpoint in float32, bfloat16 or float16"),
        (["--swap-space", "4"], "swap_space: there is no such setting"),
        (["--trust-remote-code"], "code from a model's repository is never run"),
        (["--distributed-executor-backend", "mp"], "known here: ray, uni; see executor"),
        (["--block-size", "8", "--page-tokens", "16"], "--block-size means --page-tokens"),
        (["--block-size", "0"], "page_tokens: input should be greater than or equal to 1"),
    ],
)
def test_other_names_of_vllm_are_refused_with_ours(arguments: list[str], said: str) -> None:
    stderr = fails("generate", "hello", "--model", "m", *arguments)
    assert said in stderr
    assert stderr.count("\n") == 1


def test_the_help_has_its_flags_under_headings() -> None:
    text = runner.invoke(app, ["batch", "--help"]).output
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [
        *("Arguments", "Options", "Model", "Memory and scheduling", "Retention"),
        *("Chats", "Processes", "Engine", "Memory used again", "Sampling"),
    ]
    assert text.index("\nRetention:") < text.index("--budget") < text.index("\nProcesses:")


def test_an_unknown_flag_is_an_error() -> None:
    stderr = fails("generate", "hello", "--model", "m", "--max-num-seq", "3")
    assert "--max-num-seq" in stderr
    assert "--max-num-seqs" in stderr  # the close match


def test_version() -> None:
    for written in ("version", "--version"):
        result = runner.invoke(app, [written])
        assert (result.exit_code, result.output.strip()) == (0, f"saqqara {__version__}")


def test_an_unknown_log_level_is_an_error() -> None:
    assert "debug, info" in fails("--log-level", "loud", "version")


# Commands, with a fake engine ---------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """The engine that commands get to talk to."""
    client = FakeClient(max_prompt_tokens=20)

    def launch(config: EngineConfig) -> FakeClient:
        client.config = config
        return client

    monkeypatch.setattr(generating, "launch", launch)
    monkeypatch.setattr(jobs, "launch_lasting", launch)
    monkeypatch.setattr(replicas, "launch_lasting", launch)
    return client


def batch(folder: Path, *arguments: str) -> Result:
    """Run `saqqara batch` over a file with two prompts and a bad line."""
    lines = ['{"prompt": "one", "custom_id": "a"}', "bad", '{"prompt": "two"}']
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    files = [str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    return runner.invoke(app, ["batch", *files, "--model", "m", *arguments])


def test_batch_over_many_files_makes_a_folder(engine: FakeClient, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "one"}\nbad\n')
    command = ["batch", str(tmp_path / "*.jsonl"), "--model", "m", "--max-inflight", "3"]
    command += ["--output", str(tmp_path / "out"), "--gpu-hour-price", "2"]
    result = runner.invoke(app, [*command, "--fail-on-errors"])
    assert result.exit_code == 3
    assert "cost per million tokens" in result.stdout
    summary = json.loads((tmp_path / "out/_summary.json").read_text())
    assert (summary["rows"], summary["answered"], summary["errors"]) == (4, 2, 2)
    assert engine.closed
    again = runner.invoke(app, command)
    assert (again.exit_code, again.stdout) == (
        0,
        f"all 4 rows are there, 2 of them errors: {tmp_path}/out\n",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "out.jsonl", "--replicas", "2"], "looks like a file"),
        (["--output", "out", "--output-format", "csv"], "must be 'jsonl' or 'parquet', not 'csv'"),
        (["--output", "out/", "--compare", "in.jsonl"], "compare: only results of one file"),
        (["other*.jsonl", "--output", "out"], "no file matches 'other*.jsonl'"),
        (["", "--output", "out"], "input: the name is empty"),
        (["--output", ""], "output: the name is empty"),
        (["--output", "out", "--model", ""], "--model is empty"),
        (["--output", "out", "--retention", ""], "--retention is empty"),
        (["--output", "out", "--block-size", ""], "--block-size is empty"),
        (["--output", "out", "--sampling-seed", ""], "--sampling-seed is empty"),
        (["--output", "out", "--top-p", ""], "--top-p is empty"),
        (["--output", "out", "--config", ""], "--config is empty"),
        (["--output", "out", "--served-model-name", ""], "served-model-name: the name is empty"),
        (["--output", "out/", "--prompt-column", ""], "prompt-column: the name is empty"),
        (["--output", "out", "--summary", ""], "'--summary': the name is empty"),
        (["--output", "out", "--compare", ""], "'--compare': the name is empty"),
        (["--output", "out", "--summary", "in.jsonl/x"], "in.jsonl is no folder that can be"),
        (["--output", "out/", "--summary", "in.jsonl/x"], "in.jsonl is no folder that can be"),
        (["--output", "out", "--log-dir", "in.jsonl"], "log_dir: in.jsonl is a file; it must be"),
        (["--output", "out", "--gpu-hour-price", "inf"], "price': Input should be less than"),
        (
            ["--output", "out", "--max-in-flight", "1" + "0" * 20],
            "should be less than or equal to 1000000",
        ),
        (
            ["--output", "out", "--max-tokens", "9", "--max-model-len", "9"],
            "max_tokens=9 leaves no room for a prompt in max_model_len=9; it can be at most 8",
        ),
    ],
)
def test_a_wrong_batch_command_is_one_line(
    engine: FakeClient, work_dir: Path, arguments: list[str], said: str
) -> None:
    stderr = fails("batch", "in.jsonl", "--model", "m", *arguments)
    assert said in stderr
    assert os.listdir(work_dir) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loop", "--output", "out"], "error: input: cannot read loop: it is a loop of links"),
        (["loop/a", "--output", "out"], "error: input: cannot read loop/a: it is a loop of links"),
        (["loop", "in.jsonl", "--output", "out"], "loop: it is a loop of links"),
        (["in.jsonl", "--output", "loop"], "output: cannot write loop: it is a loop of links"),
        (["in.jsonl", "--output", "loop/a"], "output: cannot write loop/a: it is a loop of links"),
        (["in.jsonl", "in.jsonl", "--output", "loop"], "a loop of links, to nothing"),
        (["in.jsonl", "in.jsonl", "--output", "loop/a"], "it is a loop of links"),
    ],
)
def test_a_loop_of_links_is_said_to_be_one(
    engine: FakeClient, work_dir: Path, arguments: list[str], said: str
) -> None:
    (work_dir / "loop").symlink_to("pool")
    (work_dir / "pool").symlink_to("loop")
    assert said in fails("batch", *arguments, "--model", "m")
    assert sorted(os.listdir(work_dir)) == ["in.jsonl", "loop", "pool"]


@pytest.mark.parametrize("output", ["out.jsonl", "new/deep/out.jsonl", "new/deep/out/"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}".encode("utf-16"), "is UTF-16 or UTF-32"),
        (gzip.compress(b"{}\n" * 9, mtime=0)[:-5], "is broken gzip"),
        (
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            "is gzip within gzip; it must be JSON lines",
        ),
        (
            gzip.compress(bz2.compress(b"{}"), mtime=0),
            "is bzip2 within gzip; it must be JSON lines",
        ),
        (bz2.compress(b"{}"), "is bzip2; it must be JSON lines"),
        (b"PK\x03\x04....", "is a zip archive; it must be JSON lines"),
    ],
    ids=["utf-16", "cut", "gzip-in-gzip", "bzip2-in-gzip", "bzip2", "zip"],
)
def test_a_refused_input_leaves_no_output(
    engine: FakeClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    said: str,
    output: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(content)
    assert said in fails("batch", "in.jsonl", "--output", output, "--model", "m")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_refused_input_leaves_an_output_that_was_there(
    engine: FakeClient, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"BZh")
    (tmp_path / "out.jsonl").touch()
    fails(
        "batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--model", "m"
    )
    assert (tmp_path / "out.jsonl").exists()


def test_sampling_is_checked_by_the_model_that_is_on_this_machine(
    engine: FakeClient, tmp_path: Path
) -> None:
    CONFIGS["llama-gqa"].save_pretrained(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text("")
    arguments = [str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    arguments += ["--model", str(tmp_path / "model"), "--load-format", "dummy", "--max-tokens"]
    assert "leaves no room for a prompt in max_model_len=512" in fails("batch", *arguments, "512")
    unknown = fails("batch", *arguments, "9", "--allowed-token-ids", "99999999")
    assert "allowed_token_ids: 99999999 is no token of the model; they are 0 to 198" in unknown
    assert runner.invoke(app, ["batch", *arguments, "511"]).exit_code == 0


def test_a_single_token_id_is_a_list_of_one() -> None:
    settings = resolve("--model", "m", "--allowed-token-ids", "7", "--stop-token-ids", "2,3")
    assert settings.sampling.allowed_token_ids == (7,)
    assert settings.sampling.stop_token_ids == (2, 3)
    assert resolve("--model", "m", "--allowed-token-ids", "[7, 8]").sampling.allowed_token_ids == (
        7,
        8,
    )


def test_generate_prints_the_answers_in_order(engine: FakeClient) -> None:
    arguments = ["one", "two", "three", "--model", "m", "--max-tokens", "3"]
    result = runner.invoke(app, ["generate", *arguments])
    assert (result.exit_code, result.stdout) == (0, "eno\nowt\neer\n")
    assert engine.closed
    assert not any(request.stream for request in engine.submitted)


def test_generate_reads_standard_input_and_streams(engine: FakeClient) -> None:
    result = runner.invoke(app, ["generate", "--model", "m", "--chat"], input="hi")
    assert (result.exit_code, result.stdout) == (0, "ih\n")
    assert engine.submitted[0].stream
    assert engine.submitted[0].messages == ({"role": "user", "content": "hi"},)


def test_generate_says_which_prompt_is_wrong(engine: FakeClient) -> None:
    stderr = fails("generate", "ok", "x" * 30, "--model", "m")
    assert stderr == "error: prompt 2: prompt has 30 tokens; at most 20 fit\n"
    assert engine.closed


def test_batch_writes_results_summary_and_table(engine: FakeClient, tmp_path: Path) -> None:
    result = batch(tmp_path, "--max-tokens", "2", "--retention", "snapkv", "--budget", "25%")
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert (summary["answered"], summary["errors"], summary["budget"]) == (2, 1, "25%")
    assert "tokens/s out" in result.stdout
    assert "snapkv 25%" in result.stdout
    assert "1.0 of 4.0 MiB (25.0%)" in result.stdout
    assert engine.config.retention == "snapkv"
    assert engine.closed


def test_batch_compares_with_another_run(engine: FakeClient, tmp_path: Path) -> None:
    assert batch(tmp_path, "--return-token-ids").exit_code == 0
    (tmp_path / "out.jsonl").rename(tmp_path / "first.jsonl")
    result = batch(tmp_path, "--max-tokens", "2", "--compare", str(tmp_path / "first.jsonl"))
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["agreement"]["identical_share"] == 0.0
    assert summary["agreement"]["common_prefix_share"] == pytest.approx(2 / 3)
    assert "0 of 2" in result.stdout


def test_results_to_compare_with_have_one_of_a_line(engine: FakeClient, tmp_path: Path) -> None:
    assert batch(tmp_path, "--return-token-ids").exit_code == 0
    first = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "first.jsonl").write_text(first + first.splitlines()[-1] + "\n")
    result = batch(tmp_path, "--max-tokens", "2", "--compare", str(tmp_path / "first.jsonl"))
    assert result.exit_code == 2
    assert "first.jsonl, line 4 is a second result of input line" in result.stderr


def test_batch_that_cannot_resume_says_why(engine: FakeClient, tmp_path: Path) -> None:
    assert batch(tmp_path).exit_code == 0
    result = batch(tmp_path, "--max-tokens", "2")
    assert result.exit_code == 2
    assert "sampling.max_tokens was 16 and is now 2" in result.stderr
    assert batch(tmp_path, "--max-tokens", "2", "--overwrite").exit_code == 0


def test_an_engine_that_dies_fails_the_batch(engine: FakeClient, tmp_path: Path) -> None:
    engine.die_after = 1
    engine.per_poll = 1
    result = batch(tmp_path)
    assert result.exit_code == 1
    assert "error: rank 1 died; its log: /nowhere/rank-1.log" in result.stderr
    assert engine.closed
    engine.die_after = None
    assert batch(tmp_path).exit_code == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
