"""What `benchmarks/prediction.py` makes of runs; the runs themselves are its own business."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prediction import RUNS, calibrated, errors, predict, weights_share

from saqqara.cluster.planning.devices import Device

HOST = Device("host", 14, bandwidth=54e9, flops=890e9, link_bandwidth=1e9, kind="cpu")
SMOL = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    (tmp_path / "config.json").write_text(json.dumps(SMOL), encoding="utf-8")
    return argparse.Namespace(model=str(tmp_path), dtype="bfloat16", kv_memory_gib=4.0)


def result(wall: float, prefill: float) -> dict[str, Any]:
    """Of 16 requests, 512 tokens in and 128 out."""
    report = {
        "requests": {"length": 16},
        "prompt_tokens": 16 * 512,
        "generation_tokens": 16 * 128,
        "num_running_peak": 16,
        "num_steps": 136,
        "prefill_seconds": prefill,
        "phase_seconds": {"total": wall},
        "wall_seconds": wall,
        "workers": [
            {
                "pipeline_rank": 0,
                "tensor_rank": 0,
                "dtype": "bfloat16",
                "page_tokens": 16,
                "attention_backend": "native",
                "layers": [0, 30],
                "kv_heads": [0, 3],
                "device": "cpu",
            }
        ],
    }
    config = {"retention": "full", "budget": None}
    return {"report": report, "config": config, "wall_seconds": wall}


def test_the_run_to_calibrate_with_is_predicted_and_others_follow(
    arguments: argparse.Namespace,
) -> None:
    measured = result(5.5, 2.6)
    factors = calibrated(measured, HOST, arguments.model)
    seconds = {run.name: predict(run, factors, HOST, arguments) for run in RUNS}
    assert seconds["W1"] == pytest.approx(5.5, rel=0.02)
    assert seconds["W1@25%"] < seconds["W1"] < seconds["W2"] < seconds["W4"]
    # Two plans in flight read the weights twice as often, and stages share what the cores can do.
    assert seconds["W1"] < seconds["W1-PP2"] < 2 * seconds["W1"]


def test_two_stages_of_one_sequence_each_are_not_twice_as_slow_where_products_copy(
    arguments: argparse.Namespace,
) -> None:
    """Two plans of one sequence beside one plan of two.

    A product of one row takes in weights without copying them first, and the host of each stage
    launches its own half of the layers, which no number of threads makes faster on one rank.
    """
    [w1] = [run for run in RUNS if run.name == "W1"]
    [stages] = [run for run in RUNS if run.name == "W1-PP2"]
    measured = result(22.0, 4.0)
    measured["report"] |= {
        "requests": {"length": 2},
        "prompt_tokens": 2 * 512,
        "generation_tokens": 2 * 128,
        "num_running_peak": 2,
    }
    ratios = []
    for product_bandwidth, launching in ((None, 50e-6), (30e9, 50e-6), (30e9, 1e-3)):
        host = replace(HOST, product_bandwidth=product_bandwidth)
        factors = calibrated(measured, host, arguments.model, launching)
        alone, staged = (
            predict(replace(run, num_requests=2), factors, host, arguments) for run in (w1, stages)
        )
        assert alone == pytest.approx(22.0, rel=0.03)
        ratios.append(staged / alone)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1.8
    assert ratios[1] < 1.5


def test_weights_are_taken_in_as_slowly_as_the_line_through_few_and_several_rows_says() -> None:
    """88 ms of one row; 140 of weights and 6.5 of each row else."""
    seconds = {
        "one row": 0.088,
        "few rows": 0.140 + 2 * 0.0065,
        "several rows": 0.140 + 32 * 0.0065,
    }
    assert weights_share(seconds) == pytest.approx(88 / 140)
    seconds["few rows"] = 0.05  # noise: no product of several rows is faster than one of one
    assert weights_share(seconds) == 1.0


def test_an_error_is_of_what_was_measured() -> None:
    assert errors([2.0, 4.0], [2.5, 3.0]) == [0.25, -0.25]
