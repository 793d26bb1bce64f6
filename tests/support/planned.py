"""What a planner says of the ranks that a test really starts."""

from dataclasses import dataclass
from typing import Any

from saqqara.cluster.planning.cost_model import Factors
from saqqara.cluster.planning.devices import Device, device_of
from saqqara.cluster.planning.memory import EngineSizes, RankMemory, ReplicaMemory
from saqqara.cluster.planning.models import model_of
from saqqara.cluster.planning.planner import DTYPES, Question
from saqqara.cluster.planning.workload import Workload
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.worker import Worker

HOST = Device("host", memory_gib=64, bandwidth=50e9, flops=1e11, link_bandwidth=5e9, kind="cpu")


@dataclass(frozen=True)
class Bytes:
    """Of one rank."""

    weights: int
    pool: int
    num_pages: int
    tables: int
    layers: tuple[int, int]
    kv_heads: tuple[int, int]


def question(
    model: str = "llama-3-70b",
    gpu: str = "h100-80gb",
    gpus: int = 8,
    nodes: int = 1,
    retention: Any = None,
    budget: Any = None,
    **settings: Any,
) -> Question:
    """Prompts of 4,096 tokens, answers of 512."""
    asked = model_of(model)
    return Question(
        asked,
        device_of(gpu),
        gpus,
        nodes,
        Workload(4096, 512, Retention.parse(retention, budget)),
        DTYPES["bfloat16"],
        EngineSizes(asked.spec.max_position),
        Factors(),
        **settings,
    )


def planned(config: EngineConfig, layout: MeshLayout) -> ReplicaMemory:
    """The replica of an engine with these settings."""
    model = model_of(config.model)
    sizes = EngineSizes(
        max_model_len=config.max_model_len or model.spec.max_position,
        max_num_seqs=config.max_num_seqs,
        max_prefill_tokens=config.max_prefill_tokens,
        linear_chunk_tokens=config.linear_chunk_tokens,
        page_tokens=config.page_tokens,
        kv_memory_gib=config.kv_memory_gib,
    )
    retention = Retention.parse(config.retention, config.budget)
    split, dtype = config.layer_split, DTYPES[config.dtype]
    ranks = Footprint.of_ranks(model.spec, dtype, layout, split, retention)
    return ReplicaMemory(model, HOST, ranks, sizes, Workload(64, 8, retention))


def planned_bytes(config: EngineConfig, layout: MeshLayout) -> list[Bytes]:
    """What the planner says that each rank will hold."""
    return [_of(held) for held in planned(config, layout).at(config.max_num_seqs)]


def real_bytes(worker: Worker) -> Bytes:
    """What a rank that has started holds: its own arrays, counted."""
    shard, info = worker._shard, worker.info
    table, rotaries = shard.kv.table, shard.part.decoder.tables
    pool = shard.kv.pool
    assert info.memory.pool_bytes == pool.k_pages.nbytes + pool.v_pages.nbytes
    return Bytes(
        weights=info.memory.weight_bytes,
        pool=info.memory.pool_bytes,
        num_pages=info.num_pages,
        tables=table.num_bytes + sum(rotary.num_bytes for rotary in rotaries),
        layers=(info.start_layer, info.stop_layer),
        kv_heads=(info.start_head, info.stop_head),
    )


def _of(held: RankMemory) -> Bytes:
    return Bytes(
        held.weight_bytes,
        held.pool_bytes,
        held.num_pages,
        held.table_bytes,
        held.layers,
        held.kv_heads,
    )
