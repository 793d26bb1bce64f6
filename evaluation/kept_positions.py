"""Which tokens of a prompt a retention setting keeps, read from the pages of a real worker."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import NewSequence, PrefillGroup, SamplingSpec, StepPlan
from saqqara.workers.worker import Worker

POOL_GIB = 1.0

Rows = tuple[tuple[tuple[int, ...], ...], ...]
"""Kept positions, ascending, by layer and kv head."""


def kept_positions(
    config: EngineConfig, prompt: Sequence[int], settings: Sequence[Retention]
) -> list[Rows]:
    """Prefill a prompt in fp32 under each setting and say which of its tokens are in the pages.

    Pages hold keys, not positions, so each stored key is looked up among those of the same prompt
    under full retention; rotation makes them all different. That holds for every method that drops
    tokens after their keys are computed. Where a method changes the keys themselves, a lookup that
    is not exact fails.

    Raises:
        ValueError: a setting does not fit the model, or the prompt the pool.
    """
    changes = {"dtype": "float32", "executor": "local", "max_num_seqs": 2}
    changes |= {"kv_memory_gib": POOL_GIB, "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    config = config.model_copy(update={**changes, "layer_split": None})
    worker = Worker.local(config.for_worker())
    try:
        _prefill(worker, 0, prompt, Retention())
        found = []
        for setting in settings:
            _prefill(worker, 1, prompt, setting)
            found.append(_rows(worker))
            worker.execute(StepPlan(2, free=(1,)))
        return found
    finally:
        worker.close()


def _prefill(worker: Worker, slot: int, prompt: Sequence[int], setting: Retention) -> None:
    tokens = np.asarray(prompt, dtype=np.int32).tobytes()
    new = NewSequence(slot, tokens, len(prompt), SamplingSpec(temperature=0.0), setting)
    group = PrefillGroup((slot,), 0, worker.spec.num_layers)
    result = worker.execute(StepPlan(slot, new=(new,), prefill=(group,)))
    if result.refused:
        raise ValueError(f"prompt: {len(prompt)} tokens do not fit a pool of {POOL_GIB} GiB")


def _rows(worker: Worker) -> Rows:
    spec = worker.spec
    return tuple(
        tuple(
            _look_up(worker.kv.read(1, layer, head)[0], worker.kv.read(0, layer, head)[0])
            for head in range(spec.num_kv_heads)
        )
        for layer in range(spec.num_layers)
    )


def _look_up(stored: Tensor, keys: Tensor) -> tuple[int, ...]:
    """Where the stored keys [kept, D] stand among all [n, D]."""
    distance = torch.cdist(stored.double(), keys.double())
    nearest = distance.min(dim=1)
    positions = tuple(nearest.indices.tolist())
    scale = float(keys.double().norm(dim=1).mean())
    assert float(nearest.values.max()) < 1e-3 * scale, "a stored key is none of the prompt's"
    assert list(positions) == sorted(set(positions)), "two stored keys are the same token's"
    return positions
