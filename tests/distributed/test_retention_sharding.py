"""Sharding a model over ranks changes nothing of what retention keeps, whatever the method needs.

Each rank's worker prefills the same prompts, one method each, in one packed group; what its pages
hold must be what one worker that has the whole model keeps for the same heads.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan
from support.ranks import run_ranks

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh import MeshLayout, head_shard
from saqqara.workers.worker import Worker

LAYERS, HEADS, QUERY_HEADS, VOCAB = 3, 3, 6, 199  # of the tiny model
PROFILE = {f"{i}-{j}": [1.0 + (3 * i + j) % 4] for i in range(LAYERS) for j in range(QUERY_HEADS)}
SPECS: list[dict[str, Any]] = [
    {"method": "h2o"},
    {"method": "tova"},
    {"method": "tova", "shape": "pyramid"},
    {"method": "adakv", "window": 8},
    {"method": "ada-pyramidkv", "window": 8},
    {"method": "h2o", "shape": "adaptive"},
    {"method": "random", "shape": "adaptive", "window": 2},
    {"method": "headkv", "window": 8, "profile": PROFILE},
    {"method": "snapkv-cosine", "window": 8},
]


def kept_rows(worker: Worker) -> dict[tuple[int, int, int], np.ndarray]:
    """Keys of every row (slot, layer, local head) after the prefill of one prompt per method."""
    rng = np.random.default_rng(5)
    new = [
        new_sequence(
            slot,
            rng.integers(3, VOCAB, 60 + 7 * slot).tolist(),
            retention=Retention.parse(spec, 24),
        )
        for slot, spec in enumerate(SPECS)
    ]
    result = worker.execute(prefill_plan(worker, new))
    assert result.refused == ()
    worker.check_integrity()
    heads = worker.info.stop_head - worker.info.start_head
    return {
        (slot, layer, head): worker.kv.read(slot, layer, head)[0].numpy()
        for slot in range(len(SPECS))
        for layer in range(LAYERS)
        for head in range(heads)
    }


def make_config(model: str, tensor_size: int) -> EngineConfig:
    return EngineConfig(
        model=model,
        dtype="float32",
        device="cpu",
        max_num_seqs=len(SPECS),
        kv_memory_gib=0.01,
        num_threads=1,
        executor="local" if tensor_size == 1 else "ray",
        tensor_parallel_size=tensor_size,
    )


def _work(model: str, layout: MeshLayout, rank: int, store: tuple[str, int]) -> Any:
    worker = Worker(make_config(model, layout.tensor_size), layout, rank, store)
    rows = kept_rows(worker)
    worker.close()
    return rows


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_ranks_keep_what_one_worker_keeps(tensor_size: int, tmp_path: Path) -> None:
    """2 + 1 kv heads on two ranks; on four, two share a head and have one of its queries each."""
    from support.tiny import save_tiny  # not for the ranks, which would import transformers

    save_tiny("llama-gqa", tmp_path)
    whole = kept_rows(Worker.local(make_config(str(tmp_path), 1)))
    ragged = [slot for slot, spec in enumerate(SPECS) if Retention.parse(spec, 24).ragged]
    assert any(
        len({len(whole[slot, layer, head]) for head in range(HEADS)}) > 1
        for slot in ragged
        for layer in range(LAYERS)
    ), "no heads differ: the test would show nothing"
    ranks = run_ranks(partial(_work, str(tmp_path), MeshLayout(tensor_size)), tensor_size)
    for rank, rows in enumerate(ranks):
        heads = head_shard(QUERY_HEADS, HEADS, tensor_size, rank).kv
        for (slot, layer, head), keys in rows.items():
            expected = whole[slot, layer, heads[head]]
            assert keys.shape == expected.shape
            # Hidden states are sums over ranks, in another order; another token is far off.
            torch.testing.assert_close(
                torch.from_numpy(keys), torch.from_numpy(expected), rtol=1e-3, atol=1e-4
            )
