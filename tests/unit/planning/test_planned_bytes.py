"""The planner's bytes are those of a worker that has started, to the byte.

`tests/distributed/test_planned_ranks.py` has several ranks.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.peak_bytes import PeakBytes
from support.planned import planned, planned_bytes, real_bytes
from support.tiny import CONFIGS

from saqqara.cluster.planning.memory import step_bytes
from saqqara.cluster.scheduling.demand import demand_of
from saqqara.compression.growth import most_ring_size, remembers_normalisers
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.sizing import largest_step
from saqqara.workers.worker import Worker

ALONE = MeshLayout()


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EngineConfig]:
    """Settings for a tiny model without weights."""

    def make(name: str, **settings: Any) -> EngineConfig:
        folder: Path = tmp_path_factory.mktemp("model")
        CONFIGS[name].save_pretrained(folder)
        given = {
            "dtype": "float32",
            "kv_memory_gib": 2**-12,
            "max_num_seqs": 3,
            "linear_backend": "torch",
            "attention_backend": "torch",
            **settings,
        }
        return EngineConfig(
            model=str(folder), load_format="dummy", device="cpu", warmup=False, **given
        )

    return make


@contextmanager
def started(config: EngineConfig) -> Iterator[Worker]:
    worker = Worker(config.for_worker(), ALONE)
    try:
        yield worker
    finally:
        worker.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank_holds_what_was_planned(name: str, config_of: Callable[..., EngineConfig]) -> None:
    config = config_of(name)
    with started(config) as worker:
        assert [real_bytes(worker)] == planned_bytes(config, ALONE)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"page_tokens": 5},
        {"max_model_len": 77},
        {"max_model_len": 20, "max_num_seqs": 1},  # the pool is as large as that one can fill
        {"kv_memory_gib": 2**-10, "max_num_seqs": 40},
    ],
    ids=str,
)
def test_settings_that_memory_depends_on(
    settings: dict[str, Any], config_of: Callable[..., EngineConfig]
) -> None:
    config = config_of("llama-gqa", **settings)
    with started(config) as worker:
        assert [real_bytes(worker)] == planned_bytes(config, ALONE)


RETENTIONS: list[tuple[str | dict[str, Any], str | None]] = [
    ("full", None),
    ("pyramidkv", "50%"),
    ("adakv", "50%"),
    ({"method": "snapkv", "decode": {"slack_pages": 1}}, "50%"),
    ({"method": "pyramidinfer", "min_context": 4, "decode": {"trigger": "published"}}, None),
]


@pytest.mark.parametrize(("retention", "budget"), RETENTIONS, ids=str)
def test_a_sequence_is_charged_what_the_ledger_will_charge(
    retention: Any, budget: str | None, config_of: Callable[..., EngineConfig]
) -> None:
    """The planner's ranks and the real worker's own card make the same demand."""
    config = config_of("llama-gqa", retention=retention, budget=budget, page_tokens=4)
    replica = planned(config, ALONE)
    with started(config) as worker:
        real = demand_of(Retention.parse(retention, budget), 64, [worker.info])
    for fed in (0, 1, 7, 40):
        np.testing.assert_array_equal(replica.demand.most(fed), real.most(fed))
    np.testing.assert_array_equal(replica.demand.ring_bytes, real.ring_bytes)


def test_rings_are_as_large_as_planned(config_of: Callable[..., EngineConfig]) -> None:
    retention, budget = RETENTIONS[-1]
    config = config_of("llama-gqa", retention=retention, budget=budget)
    parsed = Retention.parse(retention, budget)
    [held] = planned(config, ALONE).at(config.max_num_seqs)
    with started(config) as worker:
        rings, size = worker._shard.rings, most_ring_size(parsed, 512)
        for slot in range(config.max_num_seqs):
            rings.open(slot, size, with_normalisers=remembers_normalisers(parsed))
        assert rings.num_bytes == held.remembered_bytes > 0


LARGER = {"hidden_size": 264, "intermediate_size": 688, "head_dim": 32, "vocab_size": 4000}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-gqa", {}),
        ("llama-mha", {"dtype": "bfloat16"}),
        ("llama-gqa", {"linear_chunk_tokens": 128}),
        ("llama-mqa", {"max_num_seqs": 512}),
    ],
    ids=str,
)
def test_activations_are_about_as_planned(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What the engine would measure on a GPU, counted on the CPU, where a norm takes more."""
    config = EngineConfig(
        model=str(tmp_path),
        load_format="dummy",
        device="cpu",
        warmup=False,
        linear_backend="torch",
        attention_backend="torch",
        max_prefill_tokens=512,
        kv_memory_gib=2**-8,
        **{"dtype": "float32", **settings},
    )
    model = copy.deepcopy(CONFIGS[name])
    model.update(LARGER)
    model.save_pretrained(tmp_path)
    replica = planned(config, ALONE)
    expected = step_bytes(replica.ranks[0], replica.sizes, config.max_num_seqs)
    with started(config) as worker, PeakBytes() as memory:
        hidden_bytes = largest_step(worker._shard.part)
    measured = memory.peak + 2 * hidden_bytes
    assert 0.9 * measured < expected < 1.1 * measured
