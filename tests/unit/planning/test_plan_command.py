"""`saqqara plan`: what it prints, and that it needs neither torch nor Ray."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.planned import question
from typer.testing import CliRunner, Result

from saqqara.cli import app
from saqqara.cluster.cli.plan import _ENGINE_DEFAULTS
from saqqara.cluster.planning.planner import FULL, plan
from saqqara.cluster.planning.plots import BUDGETS, curve
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.footprint import GIB

DOC = Path(__file__).parents[3] / "docs" / "planning.md"
ASK = ("--model", "llama-3-70b", "--gpu", "h100-80gb", "--gpus", "8")


def run(*flags: str) -> Result:
    return CliRunner().invoke(app, ["plan", *ASK, *flags])


def planned(*flags: str) -> dict[str, Any]:
    result = run("--json", *flags)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.output)
    return data


def test_the_json_is_the_plan() -> None:
    data = planned("--prompt-tokens", "4096", "--new-tokens", "512")
    best, expected = data["layouts"][0], plan(question())[0]
    assert expected.kept is not None
    assert (best["tensor"], best["pipeline"], best["replicas"]) == (
        expected.tensor,
        expected.pipeline,
        expected.replicas,
    )
    assert best["kept"]["sequences"] == expected.kept.sequences
    assert [r["weight_bytes"] for r in best["ranks"]] == [r.weight_bytes for r in expected.ranks]
    assert (data["retention"], data["calibrated"]) == (FULL.label, False)


def test_the_table_shows_every_layout_and_what_a_gpu_holds() -> None:
    result = run("--retention", "pyramidkv", "--budget", "25%", "--gpu-hour-price", "2.5")
    assert result.exit_code == 0, result.output
    for text in ("4 x 2 x 1", "1 x 1 x 8 cannot serve: weights (131.4 GiB", "$ per million"):
        assert text in result.output
    for text in ("weights", "KV pool", "activations", "tables", "GiB on each GPU of a replica"):
        assert text in result.output
    assert "assumed factors" in result.output
    command = "--max-num-seqs 1481 --num-replicas 1 --retention pyramidkv --budget 25%"
    assert command in result.output


def test_what_is_used_again_is_counted() -> None:
    """Of the pool by default; of the nodes' own memory 4 GiB for each of their GPUs."""
    best = planned()["layouts"][0]
    pool = sum(rank["pool_bytes"] for rank in best["ranks"])
    assert best["reuse"] == {
        "prefix_bytes": pool // 2,
        "conversation_bytes": pool // 4,
        "host_bytes_per_node": 32 * 2**30,
    }
    flags = ("--prefix-cache-gib", "2", "--conversation-gib", "9999")
    best = planned(*flags, "--host-kv-gib", "6", "--nodes", "2")["layouts"][0]
    pool = sum(rank["pool_bytes"] for rank in best["ranks"])
    assert best["reuse"] == {
        "prefix_bytes": 2 * 2**30,
        "conversation_bytes": pool + 6 * 2**30,
        "host_bytes_per_node": 3 * best["replicas"] * 2**30,
    }
    result = run("--host-kv-gib", "6", "--prefix-cache-gib", "2")
    assert "--prefix-cache-gib 2.0 --host-kv-gib 6.0" in result.output
    assert "prefixes may take 2.00 GiB of a replica's pool" in result.output


def test_flags_reach_the_plan() -> None:
    data = planned(
        *("--tensor-parallel-size", "4", "--pipeline-parallel-size", "2", "--layer-split", "39,41"),
        *("--max-num-seqs", "17", "--page-tokens", "8", "--max-model-len", "5000"),
        *("--kv-memory-gib", "40", "--requests", "34", "--budget", "512"),
        *("--retention", "{method: snapkv, window: 16}"),
    )
    [only] = data["layouts"]
    assert [r["layers"] for r in only["ranks"]] == [[0, 39]] * 4 + [[39, 80]] * 4
    assert (only["kept"]["sequences"], data["engine"]["page_tokens"]) == (17, 8)
    assert sum(r["pool_bytes"] for r in only["ranks"]) <= 40 * 2**30
    assert only["job_seconds"] > 0
    assert data["retention"] == Retention.parse({"method": "snapkv", "window": 16}, 512).label


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "host.yaml"
    host = {"kind": "cpu", "memory_gib": 64, "bandwidth": 5.0e10, "flops": 9.0e11}
    values = yaml.safe_dump(host) + "link_bandwidth: 5e9\nlink_seconds: 0\n"  # 5e9: a text in YAML
    file.write_text(values, encoding="utf-8")
    result = CliRunner().invoke(
        app, ["plan", "--model", "llama-3-8b", "--gpu", str(file), "--kv-memory-gib", "4"]
    )
    assert result.exit_code == 0, result.output
    assert "llama-3-8b on 1 x host" in result.output


def test_a_pipe_is_no_description_of_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.yaml"
    os.mkfifo(file)
    result = run("--gpu", str(file))
    assert (result.exit_code, result.stderr) == (2, f"error: gpu: {file} is not a file\n")


def test_a_price_of_nothing_is_a_price() -> None:
    [best, *_] = planned("--gpu-hour-price", "0")["layouts"]
    assert best["dollars_per_million"] == 0


def test_nothing_fits_is_told_and_exits_with_1() -> None:
    result = CliRunner().invoke(app, ["plan", "--model", "llama-3-70b", "--gpu", "l4-24gb"])
    assert result.exit_code == 1
    assert "1 x 1 x 1 cannot serve: weights (131.4 GiB" in result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "h100"), "error: gpu: 'h100' is not known"),
        (("--model", "llama-3-71b"), "did you mean 'llama-3-70b'?"),
        (("--retention", "snapkv"), "error: budget: 'snapkv' needs one"),
        (("--dtype", "bf16"), "error: dtype: 'bf16' is none"),
        (("--max-model-len", "9000"), "more than the model's context of 8192"),
        (("--prompt-tokens", "8192"), "more than max_model_len=8192"),
        (("--tensor-parallel-size", "3"), "no layout of this shape uses all of 8 GPUs"),
        (("--layer-split", "40,41"), "layer_split: 40,41 must be numbers"),
        (("--kv-memory-gib", "inf"), "'--kv-memory-gib'"),
        (("--gpu-hour-price", "inf"), "'--gpu-hour-price'"),
        (("--gpu-hour-price", "nan"), "'--gpu-hour-price'"),
        (("--nodes", "3"), "8 cannot be spread evenly over 3 nodes"),
        (("--layer-split", "a,b"), "layer_split: 'a,b' is no list of numbers"),
        (("--plot", "plan.txt"), "plot: plan.txt must end in .png, .svg, .pdf"),
        (("--plot", "plan.png"), "plot: it is drawn over budgets, and 'full' takes none"),
        (("--calibrate", "gone.json"), "calibrate: cannot read gone.json"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(flags: tuple[str, ...], message: str) -> None:
    result = run(*flags)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_plot_is_of_the_best_layout_over_budgets(tmp_path: Path) -> None:
    file = tmp_path / "images" / "plan.png"
    result = run("--retention", "pyramidkv", "--budget", "25%", "--plot", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(b"\x89PNG")
    asked = question(retention="pyramidkv", budget="25%")
    points = curve(asked, plan(asked)[0])
    assert points.full is not None
    known = [rates for rates in points.rates if rates is not None]
    assert len(known) == len(BUDGETS)
    sequences = [rates.sequences for rates in known]
    assert sequences == sorted(sequences, reverse=True)
    assert sequences[-1] == points.full.sequences  # 100% keeps everything


def test_a_plan_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from saqqara.cli import app\n"
        f"app(['plan', *{ASK}, '--retention', 'pyramidkv', '--budget', '25%'], "
        "standalone_mode=False)\n"
        "print(*{'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "4 x 2 x 1" in done.stdout
    assert done.stderr.strip() == ""


def test_the_command_loads_nothing_that_takes_long() -> None:
    """It is to answer within a second; a loaded machine would not let a test say so."""
    code = (
        "import sys\n"
        "from saqqara.cli import main\n"
        f"sys.argv = ['saqqara', 'plan', *{ASK}, '--retention', 'h2o', '--budget', '25%']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "slow = {'torch', 'ray', 'transformers', 'matplotlib', 'saqqara.configs.schema'}\n"
        "print(*slow & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "4 x 2 x 1" in done.stdout
    assert done.stderr.strip() == ""


def test_plan_alone_is_the_command_that_all_of_them_have() -> None:
    command = [sys.executable, "-m", "saqqara.cli", "plan", "--help"]
    alone = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    among_all = CliRunner().invoke(app, ["plan", "--help"]).output
    assert alone.split()[0] == among_all.split()[0] == "Usage:"
    assert alone.split("[OPTIONS]")[1].split() == among_all.split("[OPTIONS]")[1].split()


def test_the_documented_plan_of_llama_3_70b_is_what_the_command_says() -> None:
    """The command of docs/planning.md, and both of its tables."""
    text = DOC.read_text(encoding="utf-8")
    command = text.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    [program, name, *flags] = shlex.split(command)
    assert (program, name) == ("saqqara", "plan")
    plot = flags.index("--plot")
    result = CliRunner().invoke(app, ["plan", *flags[:plot], *flags[plot + 2 :], "--json"])
    assert result.exit_code == 0, result.output
    layouts = json.loads(result.output)["layouts"]
    rates, ranks = (_cells(part) for part in text.split("| tensor x pipeline")[1].split("| rank |"))
    assert [row[0] for row in rates] == [
        f"{each['tensor']} x {each['pipeline']} x {each['replicas']}"
        for each in layouts
        if each["kept"]
    ]
    for row, each in zip(rates, layouts, strict=False):
        kept, full = each["kept"], each["full"]
        assert row[1:] == [
            f"{kept['sequences'] * each['replicas']:,}",
            f"{kept['sequences'] / full['sequences']:.2f}x",
            f"{kept['output_tokens_per_second']:,.0f}",
            f"{kept['output_tokens_per_second'] / full['output_tokens_per_second']:.2f}x",
            f"{kept['decode_tokens_per_second']:,.0f}",
            f"{kept['prefill_tokens_per_second']:,.0f}",
            f"{1000 * kept['step_seconds']:.1f}",
            f"{kept['prompt_seconds']:.2f}",
            f"{each['dollars_per_million']:.2f}",
        ]
    for row in ranks:
        rank = layouts[0]["ranks"][int(row[0].split("-")[0])]
        total = sum(value for key, value in rank.items() if key.endswith("_bytes"))
        assert row[3:6] + row[-1:] == [
            f"{rank['weight_bytes'] / GIB:.2f}",
            f"{rank['pool_bytes'] / GIB:.2f}",
            f"{rank['num_pages']:,}",
            f"{total / GIB:.2f}",
        ]
    assert layouts[-1]["why_not"] in " ".join(text.split())


def _cells(part: str) -> list[list[str]]:
    """The rows of the table that begins here, its head left out."""
    lines = part.splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_defaults_are_the_engines() -> None:
    """A plan that nobody told otherwise is of the engine that nobody told otherwise."""
    engine = planned()["engine"]
    for name in ("page_tokens", "max_prefill_tokens", "memory_utilization", "kv_memory_gib"):
        assert engine[name] == EngineConfig(model="m").model_dump()[name]
    assert engine["linear_chunk_tokens"] == EngineConfig(model="m").linear_chunk_tokens
    flags = {name.replace("-", "_"): value for name, value in _ENGINE_DEFAULTS.items()}
    del flags["dtype"]  # "auto", which on a GPU is this
    assert flags == {name: EngineConfig(model="m").model_dump()[name] for name in flags}
