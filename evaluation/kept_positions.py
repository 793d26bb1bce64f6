"""Which tokens of a prompt a retention setting keeps: a real worker says while it keeps them."""

from collections.abc import Sequence

import numpy as np
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

    Raises:
        ValueError: a setting does not fit the model, or the prompt the pool.
    """
    changes = {"dtype": "float32", "executor": "local", "max_num_seqs": 1}
    changes |= {"kv_memory_gib": POOL_GIB, "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    config = config.model_copy(update={**changes, "layer_split": None})
    worker = Worker.local(config.for_worker())
    watched = worker.watch_positions()
    try:
        found = []
        for setting in settings:
            _prefill(worker, prompt, setting)
            found.append(_rows(worker, watched))
            worker.execute(StepPlan(2, free=(0,)))
        return found
    finally:
        worker.close()


def _prefill(worker: Worker, prompt: Sequence[int], setting: Retention) -> None:
    tokens = np.asarray(prompt, dtype=np.int32).tobytes()
    new = NewSequence(0, tokens, len(prompt), SamplingSpec(temperature=0.0), setting)
    group = PrefillGroup((0,), 0, worker.spec.num_layers)
    result = worker.execute(StepPlan(1, new=(new,), prefill=(group,)))
    if result.faults:
        raise ValueError(result.faults[0].message)
    if result.refused:
        raise ValueError(f"prompt: {len(prompt)} tokens do not fit a pool of {POOL_GIB} GiB")


def _rows(worker: Worker, watched: dict[tuple[int, int], list[Tensor]]) -> Rows:
    rows = tuple(
        tuple(tuple(positions.tolist()) for positions in watched[0, layer])
        for layer in range(worker.spec.num_layers)
    )
    lengths = [[len(row) for row in layer] for layer in rows]
    assert lengths == worker.kv.kept(0).tolist(), "the pages hold other numbers of tokens"
    return rows
