"""The limit that `benchmarks/step.py` holds a decode step against, and the steps it is made of."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from saqqara.compression.retention import Retention
from saqqara.workers.models.spec import load_spec


@pytest.fixture(scope="module")
def scripts() -> Any:
    """Modules of the benchmark by name."""
    names = {"step": "step", "stepped": "harness.stepped", "limits": "harness.limits"}
    return {name: importlib.import_module(path) for name, path in names.items()}


def test_the_limit_adds_the_larger_of_weights_and_products_to_the_kv(scripts: Any) -> None:
    step = scripts["step"]
    work = step.Work(weight_bytes=200.0, flops=3000.0, kv_bytes=50.0)
    slow_memory = step.Limit.of(work, bandwidth=10.0, gemm_rate=1000.0)
    assert (slow_memory.weights, slow_memory.products, slow_memory.kv) == (20.0, 3.0, 5.0)
    assert slow_memory.total == 1.5 * 20 + 5
    slow_products = step.Limit.of(work, bandwidth=10.0, gemm_rate=100.0)
    assert slow_products.total == 1.5 * 30 + 5


def test_the_work_of_a_step_is_that_of_the_model(scripts: Any, demo_model: Path) -> None:
    work = scripts["step"].step_work(load_spec(str(demo_model)), 16, kept_row_tokens=1000)
    # SmolLM2-135M by hand: q and o 576 x 576, k and v 192 x 576, three of 1536 x 576, the head.
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576
    parameters = 30 * layer + 49152 * 576
    assert work.weight_bytes == 2 * parameters
    assert work.flops == 2 * 16 * parameters
    assert work.kv_bytes == 1000 * 64 * 2 * 2


def test_the_kv_of_a_step_is_counted_at_the_middle_of_a_run(scripts: Any) -> None:
    step, stepped = scripts["step"], scripts["stepped"]
    steps = [
        stepped.Step(9.0, num_prefill=2, positions=()),
        stepped.Step(2.0, num_prefill=0, positions=(100, 100)),
        stepped.Step(1.0, num_prefill=0, positions=(101, 101)),
        stepped.Step(4.0, num_prefill=0, positions=(102, 102)),
        stepped.Step(8.0, num_prefill=0, positions=(103,)),  # one is done, so it does not count
        stepped.Step(8.0, num_prefill=0, positions=()),
    ]
    run = stepped.Run(2, tuple(steps), kv_kept_bytes=0, prefill_kv_bytes=0)
    assert run.prefill_seconds == 9.0
    assert len(run.decode_steps) == 3
    assert run.decode_step_seconds == 2.0
    kept_LH = np.array([[10, 20], [5, 5]])
    # Two prompts; each of the four rows has 1, 2 and 3 new tokens in the three steps.
    assert step.mean_row_tokens(run, 100, kept_LH) == 2 * 40 + 2 * 4 * 2


def test_table_and_json(scripts: Any) -> None:
    step = scripts["step"]
    result = step.Result(
        work=step.Work(weight_bytes=2**20, flops=4e6, kv_bytes=2**19),
        bandwidth=2**20 * 1e3,
        gemm_rate=1e9,
        nominal_gemm_rate=1e10,
        step_seconds=0.013,
        round_seconds=(0.012, 0.014),
        num_steps=6,
        profile=(),
    )
    printed = io.StringIO()
    Console(width=160, file=printed).print(step.table(result, "title"))
    rows = {
        cells[0]: cells[1:]
        for line in printed.getvalue().splitlines()
        if line.startswith("│")
        for cells in [[cell.strip() for cell in line.strip("│").split("│")]]
    }
    assert rows["weights read"][1:] == ["1.00", "1.00"]
    assert rows["products"][1:] == ["4.00", "0.40"]
    assert rows["KV read"][1:] == ["0.50", "0.50"]
    assert rows["limit"][1:] == ["6.50", "2.00"]
    assert rows["step"] == ["12.00 to 14.00 ms by round, 6 steps", "13.00", "13.00"]
    assert rows["step / limit"][1:] == ["2.00", "6.50"]
    written = json.loads(json.dumps(result.to_dict()))
    assert written["limits"]["measured"]["step_over_limit"] == pytest.approx(2)
    assert written["limits"]["nominal"]["total"] == pytest.approx(0.002)


def test_rates_are_work_over_time(scripts: Any) -> None:
    times = scripts["limits"].Times([0.2, 0.1, 0.4], clean=3)
    rates = times.rates(2e9)
    assert rates["median_ms"] == pytest.approx(200)
    assert rates["median_rate"] == pytest.approx(10)
    assert rates["quartile_ms"] == pytest.approx(150)  # halfway between the two fastest
    assert rates["clean"] == 3


def test_every_turn_of_a_call_is_counted(scripts: Any) -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    times = scripts["limits"].measure({n: lambda n=n: count(n) for n in calls}, rounds=2)
    assert set(times) == {"a", "b"}
    # Three turns to find the pace (a call to wake and one), two of MAX_CALLS: a count is fast.
    turns = 3 * 2 + 2 * (1 + scripts["limits"].MAX_CALLS)
    assert calls == {"a": turns, "b": turns}


def test_an_engine_stepped_by_hand(scripts: Any, demo_model: Path) -> None:
    engine = scripts["stepped"].SteppedEngine(str(demo_model), 1, 2, 96)
    prompts = [list(range(1000, 1092)), list(range(2000, 2092))]
    full = engine.run(prompts, 4, "full", None)
    small = engine.run(prompts, 4, "pyramidkv", 48)
    one = engine.run(prompts[:1], 2, "pyramidkv", 48)
    rows = engine.profile(prompts, 4, "pyramidkv", 48)
    engine.close()
    # All prompts in one step, and then three in which both decode.
    for run in (full, small):
        assert [s.num_prefill for s in run.steps if s.num_prefill] == [2]
        assert [s.positions for s in run.decode_steps] == [(92, 92), (93, 93), (94, 94)]
        assert min(run.decode_step_seconds, run.prefill_seconds) > 0
    # Pages of 16 tokens: six for 95 tokens in each of 90 rows; the budget leaves fewer.
    row_page_bytes = 16 * 64 * 2 * 2
    assert full.kv_kept_bytes == 2 * 90 * 6 * row_page_bytes
    kept_LH = Retention.parse("pyramidkv", 48).row_tokens(92, 30, 3)
    assert small.kv_kept_bytes == 2 * int(np.ceil((kept_LH + 3) / 16).sum()) * row_page_bytes
    assert one.prefill_kv_bytes < small.prefill_kv_bytes  # of this run, not of the one before
    assert {row.num_steps for row in rows if row.phase == "decode"} == {3}
