"""What `benchmarks/peers.py` says about engines that it has timed; none is started here but a toy.

The scripts in `benchmarks/` find each other by their folder, so it joins the path for this file.
"""

import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from saqqara.cluster.cli.tables import print_table

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

TOY = """
from protocol import Answers, Clock, serve

class Toy:
    settings = {"kind": "toy"}
    def prepare(self, prompts, new_tokens):
        print("a library talks")
    def generate(self, prompts, new_tokens):
        if new_tokens == 13:
            raise ValueError("unlucky")
        clock = Clock()
        clock.first_token()
        length = new_tokens - (new_tokens == 14)
        return Answers([prompt[:1] * length for prompt in prompts], clock.last_first_token)

serve(Toy, ["pytest"])
"""


@pytest.fixture(scope="module")
def scripts() -> Any:
    """Modules of the benchmark by name."""
    paths = ("peers", "harness.peer_report", "harness.peer_process")
    return {path.rpartition(".")[2]: importlib.import_module(path) for path in paths}


def sample(scripts: Any, engine: str, number: int, wall: float, answers: list[list[int]]) -> Any:
    return scripts["peer_report"].Sample(
        *("W1", engine, number, wall, wall / 2, answers, 2**30, 0.1 if number else 0.0),
        preemptions=number + 4 if engine == "saqqara:full" else None,
    )


@pytest.fixture
def summary(scripts: Any) -> Any:
    same, other = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]
    samples = []
    for number, factor in enumerate((1.0, 4.0, 2.0)):
        samples.append(sample(scripts, "saqqara:full", number, 1.0 * factor, same))
        samples.append(sample(scripts, "saqqara:pyramidkv@25%", number, 0.5 * factor, other))
        samples.append(sample(scripts, "vllm", number, 3.0 * factor, other if number else same))
    return scripts["peer_report"].summarise(samples)


def test_figures_are_medians_and_ratios_are_of_wall_times(summary: Any) -> None:
    engines = summary["W1"]["engines"]
    assert engines["vllm"]["wall_seconds"] == 6.0
    assert engines["vllm"]["prefill_seconds"] == 3.0
    assert engines["vllm"]["wall_seconds_of_rounds"] == [3.0, 12.0, 6.0]
    assert engines["saqqara:full"]["decode_tokens_per_second"] == 8.0
    assert engines["vllm"]["foreign_cpu_share"] == 0.1
    assert summary["W1"]["ratios"] == {
        "saqqara:full": {"saqqara:pyramidkv@25%": 0.5, "vllm": 3.0},
        "saqqara:pyramidkv@25%": {"saqqara:full": 2.0, "vllm": 6.0},
    }


def test_agreement_counts_tokens_until_the_first_difference(summary: Any) -> None:
    agreement = summary["W1"]["agreement"]
    assert agreement["vllm"]["saqqara:full"]["identical"] == 2  # the first round's answers
    one = agreement["saqqara:pyramidkv@25%"]["saqqara:full"]
    assert (one["identical"], one["answers"]) == (1, 2)
    assert one["common_prefix_share"] == 0.75
    assert one == agreement["saqqara:full"]["saqqara:pyramidkv@25%"]
    assert not summary["W1"]["engines"]["vllm"]["same_answers_in_all_rounds"]
    assert summary["W1"]["engines"]["saqqara:full"]["same_answers_in_all_rounds"]


def test_table_and_picture(scripts: Any, summary: Any, tmp_path: Path) -> None:
    workload = {"name": "W1", "num_requests": 2, "prompt_tokens": 512, "new_tokens": 4}
    result = {"results": json.loads(json.dumps(summary)), "workloads": {"W1": workload}}
    (table,) = scripts["peer_report"].tables(result)
    printed = io.StringIO()
    print_table(table, file=printed, width=160)
    lines = printed.getvalue().splitlines()
    (row,) = (line for line in lines if line.strip("│ ").startswith("vllm"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == ["vllm", "6.00*"]  # starred: the machine was not alone with it
    assert cells[-5:] == ["", "3.00", "6.00", "100%", "2 of 2"]  # vLLM tells no preemptions
    assert summary["W1"]["engines"]["saqqara:full"]["preemptions_of_rounds"] == [4, 5, 6]
    narrow = io.StringIO()
    print_table(table, file=narrow, width=60)
    assert narrow.getvalue().count("saqqara:pyramidkv@25%") > 1  # in each part of the split table
    assert "…" not in narrow.getvalue()
    scripts["peer_report"].plot(tmp_path / "peers.png", result)
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_writes_workloads_out_and_gives_each_engine_a_colour(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = scripts["peer_report"]
    figures: list[Any] = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    engine = {"wall_seconds": 2.0, "prefill_seconds": 1.0}
    workloads = {
        "W3": {"num_requests": 8, "prompt_tokens": 6144, "new_tokens": 256},
        "W1": {"num_requests": 16, "prompt_tokens": 512, "new_tokens": 128},
    }
    results = {
        "W3": {"engines": {"saqqara:full": engine, "vllm": engine}},
        "W1": {"engines": {"vllm": engine, "saqqara:full": engine, "saqqara:tova@9": engine}},
    }
    report.plot(tmp_path / "peers.png", {"results": results, "workloads": workloads})
    panels = [panel for panel in figures[0].axes if panel.has_data()]
    assert [panel.get_title() for panel in panels] == [
        "16 requests x 512 in, 128 out",
        "8 requests x 6,144 in, 256 out",
    ]
    colours: dict[str, set[Any]] = {}
    for panel in panels:
        names = [label.get_text() for label in panel.get_yticklabels()]
        for name, bar in zip(names, panel.patches, strict=False):
            colours.setdefault(name, set()).add(bar.get_facecolor())
    assert {len(own) for own in colours.values()} == {1}
    assert len(set.union(*colours.values())) == len(colours) == 3


def test_variants_of_our_engine_are_held_against_the_plain_ones(scripts: Any) -> None:
    plain = scripts["peer_report"].plain
    ours = ["saqqara:full/executor=ray", "saqqara:full", "saqqara:pyramidkv@25%"]
    assert plain(ours) == ["saqqara:full", "saqqara:pyramidkv@25%"]
    assert plain(["saqqara:full/a=1", "saqqara:full/a=2"]) == ["saqqara:full/a=1"]
    assert plain([]) == []


def test_workloads_by_name_and_by_size(scripts: Any) -> None:
    first, second = scripts["peers"].parse_workloads("W3,2x64+8")
    assert (first.num_requests, first.prompt_tokens, first.new_tokens) == (8, 6144, 256)
    assert (second.num_requests, second.prompt_tokens, second.new_tokens) == (2, 64, 8)
    for text, said in (
        ("W9", "W1, W2"),
        ("W1,W1", "twice"),
        ("", "not one of"),
        ("0x64+8", "not one of"),
    ):
        with pytest.raises(ValueError, match=said):
            scripts["peers"].parse_workloads(text)


def test_settings_of_our_engine_come_from_its_name(scripts: Any) -> None:
    parse = scripts["peers"].parse_settings
    assert parse("saqqara:full") == {"retention": "full"}
    assert parse("saqqara:pyramidkv@25%") == {"retention": "pyramidkv", "budget": "25%"}
    assert parse("saqqara:snapkv@256/max_num_seqs=8/linear_backend=torch") == {
        "retention": "snapkv",
        "budget": 256,
        "max_num_seqs": 8,
        "linear_backend": "torch",
    }
    assert parse('saqqara:knorm@25%/decode={"slack_pages": 2}/page_tokens=8') == {
        "retention": {"method": "knorm", "budget": "25%", "decode": {"slack_pages": 2}},
        "page_tokens": 8,
    }
    for wrong in ("saqqara:", "saqqara:full@", "saqqara:full/x"):
        with pytest.raises(ValueError, match="should read saqqara:METHOD"):
            parse(wrong)


def test_a_peer_is_found_by_its_environment(scripts: Any, tmp_path: Path) -> None:
    python = tmp_path / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    parse = scripts["peers"].parse_engines
    ours, evict, vllm = parse("saqqara:full,openvino-evict25,vllm", tmp_path, "folder", 2)
    assert ours.command[0] == sys.executable
    assert ours.command[-1] == '{"retention": "full"}'
    assert evict.command[0] == str(python)
    assert evict.command[-2:] == ("--kept-share", "0.25")
    assert vllm.command is None
    assert "'vllm' in docs/peers.md" in vllm.missing
    (more,) = parse("openvino-evict25/kept-share=0.5", tmp_path, "folder", 2)
    assert more.command[-4:] == ("--kept-share", "0.25", "--kept-share", "0.5")  # the last one wins
    ours, evict, _ = parse("saqqara:full,openvino-evict25,vllm", tmp_path, "folder", 2, 5632)
    assert "--kv-tokens 5632" in " ".join(ours.command)
    assert "--kv-tokens 5632" in " ".join(evict.command)
    (python.parents[2] / "deepspeed" / "bin").mkdir(parents=True)
    (python.parents[2] / "deepspeed" / "bin" / "python").touch()
    (without,) = parse("deepspeed", tmp_path, "folder", 2, 5632)
    assert without.command is None
    assert "--kv-tokens" in without.missing
    for text, said in (
        ("openvino/u8", "OPTION=VALUE"),
        ("orca", "not one of saqqara"),
        ("vllm,vllm", "twice"),
    ):
        with pytest.raises(ValueError, match=said):
            parse(text, tmp_path, "folder", 2)


def test_each_recipe_is_in_the_docs_and_each_runner_is_there(scripts: Any) -> None:
    text = (BENCHMARKS.parent / "docs" / "peers.md").read_text(encoding="utf-8")
    for name, peer in scripts["peers"].PEERS.items():
        assert f"`{name}`" in text
        assert f"\n### {peer.environment}\n" in text
        assert (BENCHMARKS / "peer_runners" / peer.runner).exists()


def test_an_engine_answers_through_its_pipe(scripts: Any, tmp_path: Path) -> None:
    process = scripts["peer_process"]
    script = tmp_path / "run_toy.py"
    script.write_text(TOY)
    (tmp_path / "protocol.py").symlink_to(BENCHMARKS / "peer_runners" / "protocol.py")
    spec = process.EngineSpec("toy", (sys.executable, str(script), "--threads", "1"))
    with process.EngineProcess(spec, tmp_path / "toy.log", 60.0) as engine:
        assert engine.started["settings"] == {"kind": "toy"}
        reply = engine.request([[7, 8], [9]], 3)
        assert reply["output_token_ids"] == [[7, 7, 7], [9, 9, 9]]
        assert 0 <= reply["prefill_seconds"] <= reply["wall_seconds"]
        assert reply["peak_rss_bytes"] > 0
        assert 0 <= reply["foreign_cpu_share"] <= 1
        with pytest.raises(process.EngineFailedError, match="ValueError: unlucky"):
            engine.request([[7]], 13)
        with pytest.raises(process.EngineFailedError, match="13\\] tokens instead of 14"):
            engine.request([[7]], 14)
        assert engine.request([[7]], 1)["output_token_ids"] == [[7]]
        top = engine._top
    assert not top.is_running()
    assert "a library talks" in (tmp_path / "toy.log").read_text()


def test_an_engine_that_ends_or_hangs_is_told(scripts: Any, tmp_path: Path) -> None:
    process = scripts["peer_process"]
    for code, seconds, said in (
        ("0", 60.0, "has ended"),
        ("import time; time.sleep(60)", 1.0, "in 1 s"),
    ):
        command = (sys.executable, "-c", code, "--threads", "1")
        engine = process.EngineProcess(
            process.EngineSpec("x", command), tmp_path / "x.log", seconds
        )
        with pytest.raises(process.EngineFailedError, match=said), engine:
            pass


def test_engines_run_offline_with_their_threads(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    found = scripts["peer_process"].environment(("python", "run.py", "--threads", "3"))
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in found
    assert found["PATH"] == os.environ["PATH"]
