"""Slots and prompt tokens by device, where the settings leave them open."""

from pathlib import Path

import pytest
import torch
from support.tiny import save_tiny

from saqqara.configs.schema import EngineConfig
from saqqara.configs.step_limits import GIB, ON_CPU, StepLimits, step_limits
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout, head_shard
from saqqara.workers.models.spec import load_spec
from saqqara.workers.part import settle


@pytest.mark.parametrize(
    ("device", "gib", "slot_mib", "limits"),
    [
        ("cpu", 0, 0, StepLimits(64, 2048)),
        ("cuda:0", 141, 0, StepLimits(256, 8192)),
        ("cuda:1", 80, 5, StepLimits(256, 8192)),  # Llama-3-70B's rings on a rank of eight
        ("cuda:0", 24, 0, StepLimits(128, 4096)),
        ("cuda:0", 80, 32, StepLimits(128, 8192)),  # 4 GiB of rings
        ("cuda:0", 80, 134, StepLimits(64, 8192)),  # sums of 131,072 tokens
    ],
)
def test_a_gpu_takes_more_at_once_as_far_as_its_memory_goes(
    device: str, gib: int, slot_mib: int, limits: StepLimits
) -> None:
    assert step_limits(device, gib * GIB, slot_mib << 20) == limits


def test_what_nobody_has_set_is_the_workers_least() -> None:
    workers = [StepLimits(256, 8192), StepLimits(128, 8192)]
    config = EngineConfig(model="m")
    assert (config.max_num_seqs, config.max_prefill_tokens) == (64, 2048)
    assert config.for_worker().left_open == ("max_num_seqs", "max_prefill_tokens")
    settled = config.settled(workers)
    assert (settled.max_num_seqs, settled.max_prefill_tokens) == (128, 8192)
    assert settled.left_open == ()
    assert config.settled([]) == config


def test_what_is_set_stays_as_it_is() -> None:
    config = EngineConfig(model="m", max_num_seqs=64)  # also where it is the default
    assert config.for_worker().left_open == ("max_prefill_tokens",)
    settled = config.settled([StepLimits(256, 8192)])
    assert (settled.max_num_seqs, settled.max_prefill_tokens) == (64, 8192)


def test_a_worker_settles_what_its_device_decides(tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    spec = load_spec(str(tmp_path))
    heads = head_shard(spec.num_query_heads, spec.num_kv_heads, 1, 0)
    layers = range(spec.num_layers)
    footprint = Footprint(spec, torch.float32, MeshLayout(), 0, layers, heads)
    open_, set_ = (
        settle(
            EngineConfig(model=str(tmp_path), **given).for_worker(),
            torch.device("cpu"),
            footprint,
            128,
        )
        for given in ({}, {"max_num_seqs": 7, "max_prefill_tokens": 9})
    )
    assert StepLimits(open_.max_num_seqs, open_.max_prefill_tokens) == ON_CPU
    assert StepLimits(set_.max_num_seqs, set_.max_prefill_tokens) == StepLimits(7, 9)
