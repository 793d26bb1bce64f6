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
NAMES = ("gpu_report", "gpu_models", "gpu_generation", "gpu_kernels", "gpu_baselines", "gpu_engine")
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


def test_kernels_are_checked_and_timed(
    gpu: dict[str, ModuleType], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = gpu["gpu_kernels"]
    some = {name: kernels.CHECKS[name] for name in ("decode", "fill pages")}  # all: another test
    monkeypatch.setattr(kernels, "CHECKS", some)
    rows = checked(kernels.check_kernels(bench, (torch.float32,), 2))
    assert [(row.state, row.numbers["cases"]) for row in rows] == [("ok", 2)] * 2
    sizes = kernels.DecodeSizes(2, 40, 2, 2, 16, copy_bytes=1 << 16)
    copy, decode = checked(kernels.measure_decode(bench, sizes))
    share = decode.numbers["bytes_per_second"] / copy.numbers["bytes_per_second"]
    assert decode.numbers["share_of_copy"] == pytest.approx(share)
    assert decode.state == ("ok" if share >= 0.75 else "missed")
    [row] = checked(
        kernels.measure_retention(bench, kernels.LayerSizes(48, 4, 16, 32, 48, 2, 2, 16))
    )
    expected = row.numbers["seconds"] / row.numbers["layer_seconds"]
    assert row.numbers["share_of_layer"] == pytest.approx(expected)


def test_a_wrong_kernel_is_found(
    gpu: dict[str, ModuleType], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> float:
        raise AssertionError("0.5 off")

    monkeypatch.setattr(gpu["gpu_kernels"], "CHECKS", {"decode": wrong})
    [row] = checked(gpu["gpu_kernels"].check_kernels(bench, (torch.float32,), 2))
    assert row.state == "wrong"
    assert "0.5 off" in row.result


def test_greedy_tokens_are_those_of_the_oracles(gpu: dict[str, ModuleType], bench: Any) -> None:
    rows = checked(gpu["gpu_engine"].check_parity(bench, new_tokens=4))
    assert [row.state for row in rows] == ["ok"] * 3, rows
    assert [row.numbers["tokens"] for row in rows] == [12.0] * 3


def test_steps_are_measured_against_their_bytes(
    gpu: dict[str, ModuleType], bench: Any, tiny: Any
) -> None:
    load = gpu["gpu_models"].Load(12, 4, 2)
    rows = checked(gpu["gpu_engine"].measure_step(bench, tiny, load, 1 << 16))
    assert len(rows) == 2
    for row in rows:
        numbers = row.numbers
        assert numbers["ratio"] == pytest.approx(numbers["seconds"] / numbers["floor_seconds"])


def test_the_comparison_has_a_row_for_each_engine_and_batch(
    gpu: dict[str, ModuleType], bench: Any, tiny: Any
) -> None:
    load, shape = gpu["gpu_models"].Load(100, 3, 2), replace(tiny, num_layers=4)
    quick = replace(bench, attention_backend="torch")
    rows = checked(gpu["gpu_engine"].compare_13b(quick, shape, load, max_num_seqs=4))
    by_name = {row.what: row for row in rows}
    assert len(by_name) == len(rows)
    speeds = [row for row in rows if "tokens_per_second" in row.numbers]
    assert len(speeds) == 2 * (3 + 1)
    kept = by_name["tiny, pyramidinfer-13b, same batch, batch 2"].numbers["kept_share"]
    trimmed = "tiny, pyramidinfer-13b with its decode stage, same batch, batch 2"
    assert by_name[trimmed].numbers["kept_share"] <= kept < 1
    assert by_name["tiny, full, same batch, batch 2"].numbers["kept_share"] == 1
    assert by_name["tiny, full, largest batch, batch 3"].numbers["batch"] == 3
    assert by_name["tiny, DeepSpeed inference"].state == "skipped"
    assert sum("over transformers" in what for what in by_name) == 6


def test_budgets_are_kept(gpu: dict[str, ModuleType], bench: Any, tiny: Any) -> None:
    load = gpu["gpu_models"].Load(256, 3, 2)
    budgets = gpu["gpu_check"]._BUDGETS
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
    retention = Retention.parse(gpu["gpu_engine"]._OFTEN_TRIMMED)
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


def _broken() -> Iterator[Any]:
    yield from (1 // x for x in [0])


def test_sections_report_their_own_failures(
    gpu: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    check, report = gpu["gpu_check"], gpu["gpu_report"]

    def late(_: object) -> Iterator[Any]:
        yield report.Row("first", "done", {"seconds": 1.0})
        raise report.OutOfTimeError

    def broken(_: object) -> Iterator[Any]:
        raise RuntimeError("no\nluck")

    cpu, total = torch.device("cpu"), report.Deadline.after(60)
    rows = check.run_section(check.Section("a", 1, True, late), cpu, total)
    rows += check.run_section(check.Section("b", 1, False, broken), cpu, total)
    rows += check.run_section(check.Section("c", 1, False, late), cpu, report.Deadline.after(0))
    assert [row.state for row in rows] == ["ok", "skipped", "failed", "skipped"]
    assert rows[2].result == "RuntimeError: no luck"
    late_rows, broken_rows = late(None), gpu["gpu_engine"].guarded("an engine", _broken())
    assert [row.state for row in broken_rows] == ["failed"]
    with pytest.raises(report.OutOfTimeError):
        list(gpu["gpu_engine"].guarded("an engine", late_rows))
    results = check.Results(tmp_path / "out.json", "a device")
    results.add(check.Section("a", 1, False, late), rows[:2])
    assert results.has_passed  # what is only measured may be skipped
    results.add(check.Section("b", 1, True, broken), rows[3:])
    assert not results.has_passed
    results.has_passed = True
    results.add(check.Section("c", 1, False, broken), rows[2:3])
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["rows"][0]["numbers"] == {"seconds": 1.0}
    resumed = check.Results(tmp_path / "out.json", "a device")
    resumed.resume()
    assert (resumed.rows, resumed.has_passed) == ([*rows[:2], rows[3], rows[2]], False)
    resumed.show()
    assert capsys.readouterr().out.endswith(report.table(resumed.rows) + "\n")


def test_a_lost_context_ends_the_process_and_not_the_run(
    gpu: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check, report = gpu["gpu_check"], gpu["gpu_report"]
    options = check.arguments(["--only", "kernels,parity", "--only", "8b", "--trace", "traces"])
    assert options.only == ["kernels", "parity", "8b"]
    with pytest.raises(SystemExit):
        check.arguments(["--only", "kernels,9b"])
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    check.start_anew(check.SECTIONS[2:4], report.Deadline.after(60), options)
    again = check.arguments(became[0][2:])
    assert again.resume
    assert again.only == ["bandwidth", "retention"]
    assert 50 < again.seconds <= 60
    assert (again.trace, again.out) == ("traces", options.out)


def test_nothing_is_blamed_for_a_context_that_an_earlier_kernel_lost(
    gpu: dict[str, ModuleType], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    kernels = gpu["gpu_kernels"]
    monkeypatch.setattr(kernels, "CHECKS", {"decode": lost, "append": lost})
    monkeypatch.setattr(kernels, "is_usable", lambda _: False)
    rows = checked(kernels.check_kernels(bench, (torch.float32,), 2))
    assert [row.state for row in rows] == ["wrong", "skipped"]
    assert "Sizes(num_heads=" in rows[0].result


def test_it_needs_torch_triton_and_transformers_only() -> None:
    absent = "ray typer rich matplotlib gguf fastapi uvicorn pydantic pydantic_core psutil"
    absent += " prometheus_client accelerate deepspeed"
    code = f"""
import sys
for name in {absent!r}.split():
    sys.modules[name] = None
import torch, gpu_check, gpu_engine, gpu_models
from gpu_report import Bench, Deadline
bench = Bench(torch.device("cpu"), torch.float32, Deadline.after(60))
tiny, load = gpu_models.Shape("tiny", 32, 48, 2, 4, 2, 61, dim=16), gpu_models.Load(12, 3, 1)
rows = list(gpu_engine.measure_step(bench, tiny, load, 1 << 16))
assert len(rows) == 2, rows
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
