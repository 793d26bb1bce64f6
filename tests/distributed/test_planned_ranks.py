"""Each rank of a layout holds, to the byte, what the planner says that it will."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from support.planned import Bytes, planned_bytes, real_bytes
from support.ranks import Store, leave_together, run_ranks
from support.tiny import CONFIGS

from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.worker import Worker

# Of 3 kv heads and 6 query heads: uneven (2 + 1), stages, both, and shared kv heads (4 on 3).
# The staged ones have a retention under which layers keep different numbers of tokens.
CASES = [
    ("llama-gqa", MeshLayout(2, 1), None),
    ("llama-bias", MeshLayout(2, 2), (1, 2)),
    ("llama-tied", MeshLayout(1, 3), None),
    ("llama-gqa", MeshLayout(4, 1), None),
    ("qwen3", MeshLayout(3, 1), None),
]


def _hold(
    cases: Sequence[tuple[EngineConfig, MeshLayout]], rank: int, stores: Sequence[Store]
) -> list[Bytes | None]:
    held: list[Bytes | None] = []
    for (config, layout), store in zip(cases, stores, strict=True):
        if rank >= layout.world_size:
            held.append(None)
            continue
        worker = Worker(config.for_worker(), layout, rank, store)
        held.append(real_bytes(worker))
        leave_together(worker)
    return held


def test_each_rank_holds_what_was_planned(tmp_path: Path) -> None:
    cases = []
    for number, (name, layout, split) in enumerate(CASES):
        folder = tmp_path / str(number)
        CONFIGS[name].save_pretrained(folder)
        config = EngineConfig(
            model=str(folder),
            load_format="dummy",
            device="cpu",
            dtype="float32",
            linear_backend="torch",
            attention_backend="torch",
            warmup=False,
            kv_memory_gib=2**-12,
            max_num_seqs=5,
            executor="ray",
            tensor_parallel_size=layout.tensor_size,
            pipeline_parallel_size=layout.pipeline_size,
            layer_split=split,
            retention="pyramidkv" if layout.pipeline_size > 1 else "full",
            budget="25%" if layout.pipeline_size > 1 else None,
        )
        cases.append((config, layout))
    by_rank = run_ranks(partial(_hold, cases), 4, len(cases))
    for number, (config, layout) in enumerate(cases):
        real = [by_rank[rank][number] for rank in range(layout.world_size)]
        assert real == planned_bytes(config, layout), CASES[number]
