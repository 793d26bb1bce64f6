"""`saqqara simulate`: what it prints, the same for the same seed, and without torch or Ray."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from saqqara.cli import app
from saqqara.configs.schema import EngineConfig

ASK = (
    *("simulate", "--model", "llama-3-8b", "--gpu", "h100-80gb", "--gpus", "4"),
    *("--tensor-parallel-size", "1", "--pipeline-parallel-size", "1"),
    *("--prompt-tokens", "512", "--new-tokens", "12"),
)
DRAWN = ("--rate", "40", "--requests", "60", "--spread", "0.5", "--seed", "7")
ALONE = ("--processes", "1")


def run(*flags: str) -> Result:
    return CliRunner().invoke(app, [*ASK, *flags])


def simulated(*flags: str) -> dict[str, Any]:
    result = run("--json", *flags)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_the_same_seed_gives_the_same_numbers_in_any_number_of_processes() -> None:
    faults = ("--rank-mtbf-hours", "0.0002", "--restart-seconds", "1")
    one = simulated(*DRAWN, *faults, "--processes", "1")
    assert one == simulated(*DRAWN, *faults, "--processes", "2")
    other = simulated(*DRAWN[:-1], "8", *faults, *ALONE)
    assert (one["faults"], one["runs"]) != (other["faults"], other["runs"])
    [told] = one["runs"]
    assert told["requests"] == told["finished"] == 60
    assert told["recoveries"] > 0
    assert told["new_tokens"] > 400
    assert one["layout"] == {"tensor": 1, "pipeline": 1, "replicas": 4}


def test_two_retentions_are_compared_on_the_same_requests_and_faults() -> None:
    data = simulated(
        *DRAWN, *ALONE, "--retention", "snapkv", "--budget", "25%", "--against", "full"
    )
    kept, full = data["runs"]
    assert [kept["retention"], full["retention"]] == ["snapkv@25%", "full"]
    assert kept["prompt_tokens"] == full["prompt_tokens"]
    assert kept["max_num_seqs"] > full["max_num_seqs"]
    assert kept["pages_used"] < full["pages_used"]


def test_the_table_says_what_was_measured_and_of_what() -> None:
    result = run(*DRAWN, *ALONE, "--node-mtbf-hours", "0.0002", "--gpu-hour-price", "2")
    assert result.exit_code == 0, result.output
    for text in ("llama-3-8b on 4 x h100-80gb, 40 requests/s", "TTFT s, p50 / p90 / p99"):
        assert text in result.stdout
    for text in ("goodput, requests/s", "recoveries", "$ per million", "1 x 1 x 4", "assumed"):
        assert text in result.stdout
    assert "refused" not in result.stdout


def test_arrivals_and_faults_come_from_files(tmp_path: Path) -> None:
    arrivals, faults = tmp_path / "trace.jsonl", tmp_path / "faults.jsonl"
    rows = [{"seconds": n / 10, "prompt_tokens": 300 + n, "new_tokens": 40} for n in range(20)]
    arrivals.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    faults.write_text('{"seconds": 1, "node": 0, "back_after_seconds": 9}', encoding="utf-8")
    flags = ("--arrivals", str(arrivals), "--faults", str(faults), "--restart-seconds", "11")
    ask = [*ASK[: ASK.index("--prompt-tokens")], *flags, *ALONE, "--json"]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 0, result.output
    [told] = json.loads(result.stdout)["runs"]
    assert told["new_tokens"] == 800
    assert told["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert told["recoveries"] == 4  # of every replica on the node
    assert told["latency_seconds"]["p99"] > 20


def test_bursts_wait_longer_than_a_steady_stream() -> None:
    steady, bursts = simulated(*DRAWN, *ALONE), simulated(*DRAWN, *ALONE, "--arrivals", "bursts")
    assert bursts["runs"][0]["ttft_seconds"]["p50"] > 2 * steady["runs"][0]["ttft_seconds"]["p50"]


def test_the_plot_is_written(tmp_path: Path) -> None:
    file = tmp_path / "images" / "plot.png"
    result = run(*DRAWN, *ALONE, "--rank-mtbf-hours", "0.001", "--plot", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "error: rate: say how many requests come in a second; these GPUs get through about"),
        (("--rate", "1", "--arrivals", "poison"), "arrivals: 'poison' is neither a way nor a file"),
        (("--rate", "1", "--burst-size", "3"), "burst_size: only with --arrivals bursts"),
        (("--rate", "1", "--gpu", "h100"), "gpu: 'h100' is not known"),
        (("--rate", "1", "--nodes", "3"), "gpus: 4 cannot be spread"),
        (("--rate", "1", "--prompt-tokens", "8192"), "more than max_model_len=8192"),
        (("--rate", "1", "--retention", "snapkv"), "budget: 'snapkv' needs one"),
        (("--rate", "1", "--against", "snapkv"), "against: budget: 'snapkv' needs one"),
        (("--rate", "1", "--against", "snapky"), "against: method: unknown 'snapky'"),
        (("--rate", "1", "--kv-memory-gib", "0.001"), "gpus: no layout can serve: a sequence"),
        (("--rate", "inf"), "'--rate'"),
        (("--rate", "1", "--restart-seconds", "inf"), "'--restart-seconds'"),
        (("--rate", "1", "--slo-ttft", "nan"), "'--slo-ttft'"),
        (("--rate", "1", "--rank-mtbf-hours", "1e-9"), "'--rank-mtbf-hours'"),
        (
            ("--rate", "1e-6", "--rank-mtbf-hours", "0.01"),
            "rank_mtbf_hours: one death in 0.01 hours is",
        ),
        (("--arrivals", ""), "arrivals: '' is neither a way nor a file"),
        (("--rate", "1", "--faults", "gone.jsonl"), "faults: cannot read gone.jsonl"),
        (("--rate", "1", "--plot", "plot.txt"), "plot: plot.txt must end in .png, .svg, .pdf"),
        (("--rate", "1", "--tensor-parallel-size", "3"), "gpus: no layout of this shape uses all"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(flags: tuple[str, ...], message: str) -> None:
    result = run(*flags)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_lengths_and_rates_are_not_given_beside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"seconds": 0, "prompt_tokens": 9, "new_tokens": 2}', encoding="utf-8")
    result = run("--arrivals", str(file))
    assert result.exit_code == 2
    assert "prompt_tokens: not with a file of arrivals" in result.stderr


def test_the_engine_has_these_defaults() -> None:
    help_text = CliRunner().invoke(app, ["simulate", "--help"]).stdout
    fields = EngineConfig.model_fields
    for name in ("max_extend_tokens", "max_prefill_tokens", "page_tokens"):
        [line] = [part for part in help_text.split("--") if part.startswith(name.replace("_", "-"))]
        assert f"default: {fields[name].default};" in " ".join(line.split())


def test_a_simulation_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from saqqara.cli import app\n"
        f"app({[*ASK, *DRAWN, *ALONE]}, standalone_mode=False)\n"
        "print(*{'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
