"""Settings that a model or a machine cannot meet are refused before any rank starts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic.fields import FieldInfo
from support.byte_llama import save_tiny_llama

from saqqara.cluster.engine.client import LocalClient
from saqqara.cluster.engine.intake import RetentionLimits
from saqqara.cluster.engine.model_fit import check_fits
from saqqara.cluster.on_ray.controller import start_controller
from saqqara.cluster.settings import engine_config
from saqqara.compression.layers import Layers
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.host_memory import total_bytes
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.models.spec import load_spec
from saqqara.workers.process import THREADS_PER_CORE, check_threads
from saqqara.workers.worker import Worker

BOUNDS = ("ge", "gt", "le", "lt")


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """Of a number, or of the number among what else a setting may be."""
    infos = [i for kind in get_args(field.annotation) for i in getattr(kind, "__metadata__", ())]
    metadata = [m for info in (field, *infos) for m in info.metadata]
    return {k: getattr(m, k) for m in metadata for k in BOUNDS if hasattr(m, k)}


NUMBERS = {
    name: _bounds(field)
    for name, field in EngineConfig.model_fields.items()
    if any(kind in str(field.annotation) for kind in ("int", "float"))
    and name not in ("budget", "layer_split", "dtype")
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of four query heads."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return folder


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_the_engine_has_bounds(name: str) -> None:
    bounds = NUMBERS[name]
    low = bounds["ge"] if "ge" in bounds else bounds["gt"]
    high = bounds["le"] if "le" in bounds else bounds["lt"]
    is_rank_count = name.endswith("parallel_size")
    settings: dict[str, Any] = {"model": "m", "executor": "ray" if is_rank_count else "local"}
    inside = [low if "ge" in bounds else high, high if "le" in bounds else high - 1]
    for value in inside:
        assert getattr(engine_config({**settings, name: value}), name) == value
    outside = [low - 1 if "ge" in bounds else low, high + 1 if "le" in bounds else high]
    for value in [*outside, math.nan, math.inf, "many", [1], 10**400]:
        with pytest.raises(ValueError, match=f"^{name}[: =]"):
            engine_config({**settings, name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 5}, "pipeline_parallel_size=5 exceeds .* can be at most 4"),
        ({"tensor_parallel_size": 8}, "tensor_parallel_size=8 exceeds .* can be at most 4"),
        ({"pipeline_parallel_size": 2, "layer_split": [3, 2]}, r"layer_split=\[3, 2\] must have"),
        ({"tensor_parallel_size": 2, "max_model_len": 513}, "max_model_len=513 is more than"),
    ],
)
def test_a_model_that_cannot_be_cut_so_starts_nothing(
    model: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saqqara.cluster.on_ray.controller.connect", pytest.fail)
    config = EngineConfig(model=str(model), executor="ray", load_format="dummy", **settings)
    with pytest.raises(ValueError, match=message):
        start_controller(config)


def test_what_the_machine_has_not(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    check_threads(2 * THREADS_PER_CORE)
    config = EngineConfig(model=str(model), load_format="dummy", num_threads=1000)
    with pytest.raises(ValueError, match=r"^num_threads=1000 .* 2 cores; it can be 1 to 8$"):
        LocalClient(config)
    config = EngineConfig(
        model=str(model), load_format="dummy", kv_memory_gib=1e3, max_num_seqs=4096, num_threads=1
    )
    monkeypatch.setattr("saqqara.workers.sizing.total_bytes", lambda: 2**20)
    with pytest.raises(ValueError, match=r"^kv_memory_gib=1000: .* the machine has 0.0 GiB"):
        LocalClient(config)
    assert total_bytes() > 2**28


def test_a_worker_leaves_its_process_as_it_is(model: Path) -> None:
    """Who owns the process sets its threads: for an engine in this process that is `local`."""
    before = torch.get_num_threads()
    settings = EngineConfig(
        model=str(model), load_format="dummy", kv_memory_gib=0.01, num_threads=before + 1
    ).for_worker()
    try:
        Worker(settings, MeshLayout()).close()
        assert torch.get_num_threads() == before
        Worker.local(settings).close()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("retention", ["recommended-fast", "fastkv", "pyramidinfer"])
def test_what_drops_hidden_states_is_refused_where_layers_have_windows(
    model: Path, retention: str
) -> None:
    """Before anything starts, and before a profile is looked up; for each request, too."""
    spec = replace(load_spec(model), windows=(8, 8, 8, 0))
    budget = None if retention == "pyramidinfer" else 64
    config = EngineConfig(model=str(model), retention=retention, budget=budget)
    message = r"^retention: propagate: .* .3 of its 4 layers see a window of 8 tokens"
    with pytest.raises(ValueError, match=message):
        check_fits(config, spec)
    limits = RetentionLimits(spec.layers, spec.num_query_heads, spec.num_kv_heads, 64)
    with pytest.raises(ValueError, match=message):
        limits.check_propagates(Retention.parse(retention, budget))
    check_fits(config, load_spec(model))


def test_a_budget_is_refused_where_no_layer_sees_all(model: Path) -> None:
    layers = Layers((8,) * 4)
    limits = RetentionLimits(layers, 4, 4, 64)
    limits.check(Retention())
    with pytest.raises(ValueError, match=r"^retention: budget: every layer of this model sees a"):
        limits.check(Retention.parse("snapkv", 64))
