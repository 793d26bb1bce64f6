"""Propagation by numbers: how many tokens enter each layer, known from the prompt's length alone.

The oracle counts follow the published definition word by word, with exact fractions where the
definition has decimals.
"""

import json
import math
import pickle
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saqqara.compression.propagate import Propagate
from saqqara.compression.retention import Retention


def pyramidinfer_counts(n: int, num_layers: int, **settings: Any) -> list[int]:
    """Steps 1 to 5 of the method: the tokens that enter each layer."""
    rho = settings.get("rho", 0.9)
    interval = settings.get("interval", 1)
    r = int(Decimal(str(settings.get("recent_ratio", 0.2))) * n)
    m, counts = n, []
    for layer in range(num_layers):
        counts.append(m)
        context = m - 1 - r
        ratio = rho + (1 - rho) * (math.cos(math.pi * layer / num_layers) + 1) / 2
        kept = int(ratio * context + 1e-9)
        if context > 0 and layer % interval == 0 and kept > settings.get("min_context", 64):
            m = kept + 1 + r
    return counts


@pytest.mark.parametrize(
    ("settings", "n", "num_layers", "linear", "attention"),
    [
        ({}, 6144, 30, 0.78, 0.65),
        ({"rho": 0.7}, 6144, 30, 0.61, 0.46),
        ({"rho": 0.5}, 6144, 30, 0.54, 0.40),
        ({"rho": 0.6, "recent_ratio": 0.05}, 6144, 30, 0.49, 0.38),
        ({"rho": 0.8, "interval": 2}, 512, 40, 0.72, None),
    ],
)
def test_what_the_settings_leave_of_a_prompt(
    settings: dict[str, Any], n: int, num_layers: int, linear: float, attention: float | None
) -> None:
    counts = Propagate(**settings).survivors(n, num_layers)
    assert list(counts) == pyramidinfer_counts(n, num_layers, **settings)
    assert round(sum(counts) / (num_layers * n), 2) == linear
    if attention is not None:
        assert round(sum(m * m for m in counts) / (num_layers * n * n), 2) == attention


@given(
    n=st.integers(1, 9000),
    num_layers=st.integers(1, 80),
    rho=st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]),
    interval=st.integers(1, 4),
    recent_ratio=st.sampled_from([0.0, 0.05, 0.2, 0.29, 0.99]),
    min_context=st.integers(4, 100),
)
def test_pyramidinfer_counts(n: int, num_layers: int, **settings: Any) -> None:
    propagate = Propagate(**settings)
    counts = propagate.survivors(n, num_layers)
    assert list(counts) == pyramidinfer_counts(n, num_layers, **settings)
    assert counts[0] == n
    assert list(counts) == sorted(counts, reverse=True)
    retention = Retention(method="pyramidinfer", propagate=propagate)
    assert retention.layer_tokens(n, num_layers) == counts
    assert retention.row_tokens(n, num_layers, 2)[:, 1].tolist() == list(counts)


def test_once_keeps_a_fifth_from_the_middle_on() -> None:
    """FastKV's published setting: of 32 layers the one numbered 15 selects."""
    once = Propagate(kind="once", window=8)
    assert once.survivors(1000, 32) == (1000,) * 16 + (200,) * 16
    assert once.survivors(20, 4) == (20, 20, 12, 12)  # never less than window and sinks
    assert once.survivors(11, 4) == (11,) * 4
    assert Propagate(kind="once", layer=0).survivors(1000, 3) == (1000, 200, 200)
    assert Propagate(kind="once", layer=2).survivors(1000, 3) == (1000,) * 3
    with pytest.raises(ValueError, match=r"^propagate.layer: .* below 1, not 1.0"):
        Propagate(kind="once", layer=1.0)  # it would equal the layer 1
    with pytest.raises(ValueError, match=r"^propagate.layer: 3 is no layer of this model"):
        Propagate(kind="once", layer=3).survivors(1000, 3)


def test_a_budget_on_top_takes_the_smaller_of_the_two() -> None:
    once = {"kind": "once", "layer": 1, "keep": 0.2}
    retention = Retention.parse({"method": "snapkv", "budget": "30%", "propagate": once})
    assert retention.layer_tokens(1000, 4) == (300, 300, 200, 200)
    pyramid = Retention.parse({"method": "pyramidkv", "budget": "30%", "propagate": "pyramidinfer"})
    alone = Retention.parse("pyramidkv", "30%").layer_tokens(500, 6)
    entered = pyramidinfer_counts(500, 6)
    assert pyramid.layer_tokens(500, 6) == tuple(map(min, alone, entered))
    assert pyramid.layer_tokens(500, 6) == alone  # all of them fit into what enters
    assert pyramid.label == "pyramidkv@30%+pyramidinfer"
    assert retention.label == "snapkv@30%+once(layer=1)"


def test_ways_to_write_it() -> None:
    """A preset's name, its settings beside the name, or a stage of any method."""
    plain = Retention.parse("pyramidinfer")
    assert plain.score is None
    assert plain.propagate == Propagate()
    assert plain.label == "pyramidinfer"
    assert Retention.parse("pyramidinfer-7b").propagate == plain.propagate
    for spec in (
        {"method": "pyramidinfer", "rho": 0.7},
        {"method": "pyramidinfer", "propagate": {"rho": 0.7}},
        {"propagate": {"kind": "pyramidinfer", "rho": 0.7}},
    ):
        retention = Retention.parse(spec)
        assert retention == Retention(method="pyramidinfer", propagate=Propagate(rho=0.7))
        assert retention.label == "pyramidinfer(rho=0.7)"
    steep = Retention.parse({"method": "snapkv", "budget": 64, "propagate": {"kind": "once"}})
    assert (steep.method, steep.propagate) == ("snapkv", Propagate(kind="once"))
    cut = Retention.parse({"method": "pyramidinfer-13b", "score": "knorm", "budget": 64})
    assert cut.method == "knorm-uniform"
    assert cut.propagate == Propagate(rho=0.8, interval=2)
    # Another kind, or none, takes the name away.
    assert Retention.parse({"method": "pyramidinfer", "propagate": "once"}).method == "once"
    without = Retention.parse({"method": "fastkv", "budget": 64, "propagate": None})
    assert (without.method, without.propagate) == ("snapkv-uniform", None)
    for retention in (plain, steep, cut, Retention.parse("once")):
        again = Retention.parse(json.loads(json.dumps(retention.to_dict())))
        assert again == retention
        assert hash(again) == hash(retention)
        assert pickle.loads(pickle.dumps(retention)) == retention


@pytest.mark.parametrize(
    ("spec", "budget", "message"),
    [
        ("pyramidinfer", 64, "budget: 'pyramidinfer' keeps what enters each layer"),
        ({"method": "pyramidinfer", "window": 8}, None, "propagate.window: not a setting of 'py"),
        ({"method": "pyramidinfer", "rho": 0}, None, "propagate.rho: must be a number above 0"),
        ({"method": "pyramidinfer", "rho": "0.5"}, None, "propagate.rho: must be a number"),
        ({"method": "pyramidinfer", "rho": True}, None, "propagate.rho: must be a number"),
        ({"method": "pyramidinfer", "recent_ratio": 1}, None, "propagate.recent_ratio: must be"),
        ({"method": "pyramidinfer", "interval": 0}, None, "propagate.interval: must be an integer"),
        ({"method": "pyramidinfer", "sinks": -1}, None, "propagate.sinks: must be an integer"),
        ({"method": "pyramidinfer", "min_context": 3}, None, "propagate.min_context: .* least 4"),
        (
            {"method": "pyramidinfer", "distance_weight": float("nan")},
            None,
            "propagate.distance_weight: must be a number above 0",
        ),
        ({"method": "pyramidinfer", "propagate": None}, None, "propagate: without it and a score"),
        ({"method": "once", "layer": 0.0}, None, "propagate.layer: must be a layer from 0, or"),
        ({"method": "once", "layer": -1}, None, "propagate.layer: must be an integer of at least"),
        ({"method": "once", "keep": 1}, None, "propagate.keep: must be a number above 0 and below"),
        ({"method": "once", "window": 0}, None, "propagate.window: must be an integer of at least"),
        ({"method": "once", "kernel_size": 4}, None, "propagate.kernel_size: must be odd"),
        ({"method": "once", "pooling": "sum"}, None, "propagate.pooling: must be 'max' or 'avg'"),
        ({"method": "snapkv", "propagate": "some"}, 64, "propagate.kind: unknown 'some'; known: p"),
        ({"method": "snapkv", "propagate": {"rho": 0.5}}, 64, "propagate.kind: unknown None"),
        ({"method": "snapkv", "propagate": 7}, 64, "propagate: must be a kind .* not int 7"),
        ({"method": "full", "propagate": "once"}, None, "propagate: 'full' keeps everything"),
    ],
)
def test_what_is_wrong_is_named(spec: Any, budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Retention.parse(spec, budget)


def test_a_stage_is_valid_however_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"^propagate.rho: 'once' takes no such setting"):
        Propagate(kind="once", rho=0.5)
    with pytest.raises(ValueError, match=r"^score: method 'full' cannot have score None"):
        Retention(propagate=Propagate())
