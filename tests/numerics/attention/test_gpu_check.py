"""Every section of `benchmarks/gpu/gpu_check.py` at toy sizes, in Triton's interpreter on the CPU.

The scripts in `benchmarks/` find each other by their folder, so it joins the path for this file.
What they say of speed means nothing here; what they say of correctness does.
"""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from saqqara.compression.retention import Retention

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a GPU: run make gpu-check", allow_module_level=True)

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"
NAMES = (
    *("gpu_report", "gpu_models", "gpu_generation", "gpu_kernels", "gpu_baselines", "gpu_engine"),
    *("gpu_process", "gpu_sections", "gpu_trace", "gpu_collectives", "gpu_reuse"),
)
STATES = {"ok", "wrong", "missed", "failed", "skipped"}


@pytest.fixture(scope="module")
def gpu() -> dict[str, ModuleType]:
    return {name: importlib.import_module(name) for name in (*NAMES, "gpu_check")}


@pytest.fixture
def bench(gpu: dict[str, ModuleType]) -> Any:
    report = gpu["gpu_report"]
    return report.Bench(torch.device("cpu"), torch.float32, report.Deadline.after(60))


@pytest.fixture(scope="module")
def tiny(gpu: dict[str, ModuleType]) -> Any:
    return gpu["gpu_models"].Shape("tiny", 32, 48, 2, 4, 2, 61, dim=16)


def checked(rows: Iterator[Any]) -> list[Any]:
    """The rows, each of the right form and with numbers that are numbers."""
    found = list(rows)
    for row in found:
        assert row.state in STATES, row
        assert row.what
        assert row.result
        assert all(math.isfinite(number) for number in row.numbers.values()), row
    return found


def test_the_whole_check_runs_at_toy_sizes(
    gpu: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every section in its process, with the files that come of it; speeds mean nothing here."""
    code = "import sys, gpu_check; sys.exit(gpu_check.main(sys.argv[1:]))"
    found = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, "--toy", "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = gpu["gpu_report"]
    facts = json.loads((tmp_path / "results.json").read_text())
    rows = [report.Row(**row) for row in facts["rows"]]
    assert checked(iter(rows)) == gpu["gpu_process"].read(tmp_path / "rows.jsonl")
    assert (tmp_path / "table.txt").read_text() == report.table(rows) + "\n"
    by_name = {row.what: row for row in rows}
    assert {row.state for row in rows} <= {"ok", "missed", "skipped"}
    assert [row.what for row in rows if row.state == "skipped"] == [
        *("NCCL in a graph, group of one", "sums over two GPUs", "tiny, DeepSpeed inference"),
    ]
    assert by_name["greedy tokens, full, graphs off, as transformers"].numbers["tokens"] == 3
    parked = by_name["parked on the host and back, trimmed"].numbers
    assert parked["same"] == parked["rows"] == 2 * 3 * 3  # of three layers with three heads
    behind = by_name["prompt behind a cached 75%, tiny, 64 tokens"].numbers
    assert behind["cached_share"] == 0.75
    copy = by_name["copy on the device"].numbers["bytes_per_second"]
    ragged = by_name["decode kernel, 2 sequences x 2 heads, group 1, up to 40 kept"]
    share = ragged.numbers["bytes_per_second"] / copy
    assert ragged.numbers["share_of_copy"] == pytest.approx(share)
    layer = next(row for row in rows if row.what.startswith("score, select and write"))
    expected = layer.numbers["seconds"] / layer.numbers["layer_seconds"]
    assert layer.numbers["share_of_layer"] == pytest.approx(expected)
    step = by_name["decode step, tiny, batch 1, graphs auto"].numbers
    assert step["ratio"] == pytest.approx(step["seconds"] / step["floor_seconds"])
    traced = by_name["decode step, tiny, batch 1, graphs auto, traced"].numbers
    assert 0 < traced["busy_seconds"] <= traced["wall_seconds"]
    assert traced["seconds_of_a_node"] == pytest.approx(traced["wall_seconds"] / traced["kernels"])
    for name in ("auto", "off"):
        trace = tmp_path / f"step-graphs-{name}.json.gz"
        assert 0 < trace.stat().st_size < 16 << 20
    full = by_name["tiny, full, 4 out, same batch, batch 2"].numbers
    quarter = by_name["tiny, pyramidkv 25%, 4 out, same batch, batch 2"].numbers
    assert full["kept_share"] == 1 > quarter["kept_share"]
    speeds = [row for row in rows if ", over " in row.what]
    assert len(speeds) == 2 * 3 + 2  # ours over each cache, and at the largest batch


def test_order_and_time_of_the_sections(gpu: dict[str, ModuleType]) -> None:
    """Both halves fit a lease, and what is slow or extrapolated comes last."""
    check, found = gpu["gpu_check"], gpu["gpu_sections"]
    sections = found.sections(found.REAL, Path())
    assert [section.name for section in sections] == [
        *("kernels", "parity", "reuse", "collectives", "bandwidth", "step"),
        *("8b", "13b", "retention", "other-kernels", "13b-largest", "70b"),
    ]
    for is_first, limit in ((True, check.FIRST_SECONDS), (False, check.REST_SECONDS)):
        chosen = [section for section in sections if section.is_first == is_first]
        assert sum(section.seconds for section in chosen) <= limit + 10
    assert check.FIRST_SECONDS <= 340 >= check.REST_SECONDS
    assert set(sections[0].parts) >= {f"kernel {name}" for name in gpu["gpu_kernels"].CHECKS}
    sizes = gpu["gpu_kernels"].Case
    served = [sizes(torch.device("cpu"), torch.float32, s).sizes for s in found.REAL.kernel_seeds]
    assert [(size.group, size.dim, size.page_tokens) for size in served] == [
        *((1, 128, 16), (4, 128, 16), (8, 128, 16)),
    ]
    only = check.arguments(["--only", "kernels,parity", "--only", "8b"])
    assert [x.name for x in sections if check._is_chosen(x, only)] == ["kernels", "parity", "8b"]
    rest = [x.name for x in sections if check._is_chosen(x, check.arguments(["--rest"]))]
    assert rest == [section.name for section in sections if not section.is_first]
    with pytest.raises(SystemExit):
        check.arguments(["--only", "kernels,9b"])


def test_a_wrong_kernel_is_found(
    gpu: dict[str, ModuleType], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> float:
        raise AssertionError("0.5 off")

    monkeypatch.setattr(gpu["gpu_kernels"], "CHECKS", {"decode": wrong})
    [row] = checked(gpu["gpu_kernels"].check_kernel(bench, "decode", torch.float32, [0, 1]))
    assert row.state == "wrong"
    assert "0.5 off" in row.result
    assert "Sizes(num_heads=" in row.result


def test_budgets_are_kept(gpu: dict[str, ModuleType], bench: Any, tiny: Any) -> None:
    load = gpu["gpu_models"].Load(256, 3, 2)
    budgets = gpu["gpu_sections"].BUDGETS
    quick = replace(bench, attention_backend="torch")
    full, quarter, tenth = checked(gpu["gpu_engine"].measure_retentions(quick, tiny, load, budgets))
    shares = [row.numbers["kept_share"] for row in (full, quarter, tenth)]
    assert shares[0] == 1
    assert 0.1 < shares[2] < shares[1] < 0.35  # of 256 tokens, in whole pages


def test_sequences_that_are_trimmed_together_are_as_alone(
    gpu: dict[str, ModuleType], bench: Any, tiny: Any
) -> None:
    models, generation = gpu["gpu_models"], gpu["gpu_generation"]
    load, shape = models.Load(40, 8, 3), replace(tiny, num_layers=4)
    retention = Retention.parse(gpu["gpu_engine"].OFTEN_TRIMMED)
    quick = replace(bench, attention_backend="torch")
    changes = {"max_prefill_tokens": 400}
    with models.random_worker(quick, shape, load, 3, **changes) as (worker, settings):
        prompts = load.prompts(shape.vocab)
        run = [quick, worker, settings]
        together = generation.generate(*run, prompts, 8, retention, check_pages=True)
        alone = [
            generation.generate(*run, [prompt], 8, retention, check_pages=True).tokens[0]
            for prompt in prompts
        ]
    assert together.tokens == alone
    assert len(together.step_seconds) == 7  # one prefill for all, so all are cut at once


def test_a_run_out_of_time_leaves_the_worker_empty(
    gpu: dict[str, ModuleType], bench: Any, tiny: Any
) -> None:
    report, models, generation = (gpu[n] for n in ("gpu_report", "gpu_models", "gpu_generation"))
    load = models.Load(12, 8, 2)
    full = gpu["gpu_engine"].FULL

    class Soon(report.Deadline):  # type: ignore[misc, name-defined]
        checks = 3

        def check(self) -> None:
            type(self).checks -= 1
            if self.checks == 0:
                raise report.OutOfTimeError("over")

    with models.random_worker(bench, tiny, load, 2) as (worker, settings):
        prompts = load.prompts(tiny.vocab)
        soon = report.Bench(bench.device, bench.dtype, Soon(0.0))
        with pytest.raises(report.OutOfTimeError):
            generation.generate(soon, worker, settings, prompts, 8, full)
        assert worker.kv.pages_free == worker.info.num_pages
        run = generation.generate(bench, worker, settings, prompts, 8, full, check_pages=True)
        assert [len(tokens) for tokens in run.tokens] == [8, 8]
        assert len(run.step_seconds) == 6  # they come one after the other


def test_rows_outlive_what_ends_their_process(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    report, process = gpu["gpu_report"], gpu["gpu_process"]
    first = report.Row("first", "done", {"seconds": 1.0})

    def late() -> Iterator[Any]:
        yield first
        raise report.OutOfTimeError

    def broken() -> Iterator[Any]:
        yield from (1 // x for x in [0])

    def lost() -> Iterator[Any]:
        yield first
        os._exit(3)  # as libraries of CUDA end a process

    def hanging() -> Iterator[Any]:
        yield first
        subprocess.run(["sleep", "60"], check=True)

    file = tmp_path / "rows.jsonl"
    parts = {"late": late, "broken": broken, "lost": lost}
    rows = process.run_together(parts, 30, file)
    assert [row.state for row in rows] == ["ok", "skipped", "failed", "ok", "failed"]
    assert "ZeroDivisionError" in rows[2].result
    assert "ended with 3" in rows[4].result
    rows += process.run("hanging", hanging, 0.5, file)
    assert [(row.what, row.state) for row in rows[5:]] == [("first", "ok"), ("hanging", "skipped")]
    assert process.read(file) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_only_measures_may_be_skipped(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    check, report = gpu["gpu_check"], gpu["gpu_report"]
    rows = {state: report.Row("x", "y", state=state) for state in STATES}
    results = check.Results(tmp_path)
    results.add([rows["ok"], rows["skipped"], rows["missed"]], proves=False)
    results.add([rows["ok"]], proves=True)
    assert results.has_passed
    for state, proves in (("skipped", True), ("failed", False), ("wrong", False)):
        results.has_passed = True
        results.add([rows[state]], proves=proves)
        assert not results.has_passed


def test_it_needs_torch_triton_and_transformers_only(tmp_path: Path) -> None:
    absent = "ray typer rich matplotlib gguf fastapi uvicorn pydantic pydantic_core psutil"
    absent += " prometheus_client accelerate deepspeed"
    code = f"""
import sys
for name in {absent!r}.split():
    sys.modules[name] = None
from pathlib import Path
import torch
asked = []
for name in "is_available device_count _lazy_init init current_device".split():
    kept = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *a, name=name, kept=kept: (asked.append(name), kept(*a))[1])
import gpu_check, gpu_engine, gpu_models
assert not asked, f"CUDA was asked {{asked}} before sections are forked"
from gpu_report import Bench, Deadline
bench = Bench(torch.device("cpu"), torch.float32, Deadline.after(60), attention_backend="torch")
tiny, load = gpu_models.Shape("tiny", 32, 48, 2, 4, 2, 61, dim=16), gpu_models.Load(4, 12, 1)
rows = list(gpu_engine.measure_step(bench, tiny, load, Path({str(tmp_path)!r}), 1 << 16))
assert len(rows) == 4, rows
"""
    found = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
