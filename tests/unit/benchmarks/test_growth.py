"""What `benchmarks/growth.py` makes of its measurements; an engine runs only where steps are told.

The scripts in `benchmarks/` find each other by their folder, so it joins the path for this file.
"""

import importlib
import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console


@pytest.fixture(scope="module")
def growth() -> Any:
    return importlib.import_module("growth")


@pytest.fixture
def summary(growth: Any) -> Any:
    """`full` whose prefill is quadratic and whose step is linear, and a flat `pyramidkv`."""
    samples = []
    for disturbance in (1.0, 1.1, 3.0):  # of the rounds; the median is 1.1
        for length in (100, 200, 400):
            samples.append(
                growth.Sample(
                    "full", length, disturbance * length**2, disturbance * length, length, length
                )
            )
            samples.append(
                growth.Sample("pyramidkv 64", length, disturbance * length, disturbance, 64, 65)
            )
    return growth.summarise(samples)


def test_growth_is_the_ratio_and_the_exponent_of_medians(summary: Any) -> None:
    full, pyramid = summary["full"], summary["pyramidkv 64"]
    assert full["prompt_tokens"] == [100, 200, 400]
    assert full["decode_step_seconds"]["median"] == [1.1 * n for n in (100, 200, 400)]
    assert full["decode_step_seconds"]["low"] == [100, 200, 400]
    assert full["decode_step_seconds"]["high"] == [300, 600, 1200]
    # Powers of the length but for rounding.
    assert full["decode_step_seconds"]["ratio"] == pytest.approx(4)
    assert full["decode_step_seconds"]["exponent"] == pytest.approx(1)
    assert full["prefill_seconds"]["exponent"] == pytest.approx(2)
    assert pyramid["prefill_seconds"]["exponent"] == pytest.approx(1)
    assert pyramid["decode_step_seconds"]["ratio"] == 1
    assert pyramid["decode_step_seconds"]["exponent"] == pytest.approx(0, abs=1e-12)


def test_exponent_is_the_best_fit_over_all_lengths(growth: Any) -> None:
    lengths, values = [1000, 2000, 8000], [3.0, 5.0, 11.0]
    x, y = [math.log(n) for n in lengths], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / 3, sum(y) / 3
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = covariance / sum((a - mean_x) ** 2 for a in x)
    assert growth.exponent(lengths, values) == pytest.approx(slope)


def test_one_length_has_no_growth(growth: Any) -> None:
    one = growth.summarise([growth.Sample("full", 100, 1.0, 2.0, 3, 4)])
    assert set(one["full"]["prefill_seconds"]) == {"median", "low", "high"}


def test_a_prompt_leaves_room_for_its_answer(growth: Any) -> None:
    assert growth.fitting([8192, 1024], 8192, 64) == [1024, 8128]
    assert growth.fitting([8128], 8192, 64) == [8128]
    for lengths, new_tokens, said in (
        ([8192, 8150], 64, "the same"),
        ([0], 64, "at least 1"),
        ([10], 8192, "fill the model's context"),
    ):
        with pytest.raises(ValueError, match=said):
            growth.fitting(lengths, 8192, new_tokens)


def test_table_and_picture(growth: Any, summary: Any, tmp_path: Path) -> None:
    printed = io.StringIO()
    Console(width=160, file=printed).print(growth.table(summary, 4, 64))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in printed.getvalue().splitlines()
        if line.startswith("│")
    ]
    assert rows[1][:4] == [
        "full",
        "200",
        "44000.00 (40000.00 - 120000.00)",
        "220000.0 (200000.0 - 600000.0)",
    ]
    assert rows[3][:4] == ["full", "longest / shortest", "x 16.00", "x 4.00"]
    assert rows[4][:4] == ["full", "exponent", "2.00", "1.00"]
    assert rows[8][3:5] == ["x 1.00", "x 1.00"]
    growth.plot(tmp_path / "new" / "growth.png", summary)
    assert (tmp_path / "new" / "growth.png").read_bytes().startswith(b"\x89PNG")
