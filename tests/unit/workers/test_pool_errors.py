"""What a pool that is too small says: also that another cut of the layers may help."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from saqqara.cluster.planning.models import model_of
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers import sizing
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.part import Part
from saqqara.workers.sizing import size_pool

SPEC = model_of("llama-3-70b").spec
HINT = "or layer_split: [40, 40]"


def part(pipeline: int, **settings: Any) -> Part:
    """The first stage, as far as its pool is computed from it."""
    layout = MeshLayout(1, pipeline)
    config = EngineConfig(
        model="none",
        executor="ray",
        pipeline_parallel_size=pipeline,
        **({"kv_memory_gib": 1e-6} | settings),
    )
    retention = Retention.parse(config.retention, config.budget)
    footprint = Footprint.of_ranks(SPEC, torch.bfloat16, layout, config.layer_split, retention)[0]
    found = SimpleNamespace(
        config=config,
        spec=SPEC,
        device=torch.device("cpu"),
        mesh=SimpleNamespace(layout=layout, rank=0),
        layers=footprint.layers,
        footprint=footprint,
        num_rows=footprint.num_rows,
        replica_rows=SPEC.num_layers * SPEC.num_kv_heads,
        max_model_len=4096,
        sizes=(config.max_num_seqs, 4096, config.page_tokens),
        samples_on_device=False,
    )
    return cast("Part", found)


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({"pipeline": 2, "retention": "pyramidkv", "budget": "25%"}, True),
        ({"pipeline": 2}, False),
        ({"pipeline": 1, "retention": "pyramidkv", "budget": "25%"}, False),
        (
            {"pipeline": 2, "retention": "pyramidkv", "budget": "25%", "layer_split": (38, 42)},
            False,
        ),
    ],
    ids=str,
)
def test_where_stages_were_balanced_by_what_is_kept_an_even_split_is_named(
    settings: dict[str, Any], is_told: bool
) -> None:
    with pytest.raises(ValueError, match="fewer than one per row") as error:
        size_pool(part(**settings))
    assert (HINT in str(error.value)) == is_told


def test_host_memory_for_preempted_sequences_is_taken_from_the_pool_of_a_cpu() -> None:
    whole, none, some = (
        size_pool(part(2, kv_memory_gib=4.0, host_kv_gib=gib)) for gib in (None, 0.0, 1.0)
    )
    assert whole == none
    assert whole.host_kv_bytes == 0
    assert some.host_kv_bytes == 2**29  # half of the layers
    assert whole.pool_bytes - some.pool_bytes == pytest.approx(2**29, rel=1e-3)
    with pytest.raises(ValueError, match="a smaller host_kv_gib"):
        size_pool(part(2, kv_memory_gib=1.0, host_kv_gib=2.0))
    with pytest.raises(ValueError, match="host_kv_gib=10000: this worker's part would take 5000"):
        size_pool(part(2, host_kv_gib=10_000.0))


def test_host_memory_beside_gpus_is_a_share_of_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_gpu = part(2)
    of_gpu.device = torch.device("cuda")  # type: ignore[misc]
    for available_gib, gib in ((100, 4.0), (20, 3.0)):
        monkeypatch.setattr(sizing, "available_bytes", lambda gib=available_gib: gib * 2**30)
        assert sizing.host_kv_bytes(of_gpu) == gib * 2**30
