"""A rank whose host has no memory for a sequence refuses it when it resumes; ranks stay together.

Where a layer's heads compete, or its scores are those of all heads, ranks ask each other in every
prefill and cut, of a refused slot, too.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.plans import new_sequence, run_greedy
from support.ranks import Store, leave_together, run_ranks
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, Parking, PrefillGroup, StepPlan, StepResult
from saqqara.workers.reuse import parked as parked_module
from saqqara.workers.worker import Worker

PROMPT, OTHER, FED, MORE = (
    np.random.default_rng(n).integers(3, VOCAB, n).tolist() for n in (30, 21, 3, 5)
)
METHODS: dict[str, dict[str, Any]] = {
    "layer": {"method": "tova", "budget": 12, "sinks": 2, "decode": {"slack_pages": 1}},
    "uneven": {"method": "adakv", "budget": 12, "window": 4, "decode": {"slack_pages": 1}},
}
TURN, PREEMPTED, NEW = 0, 1, 2  # slots; what the first two leave is parked under 10 and 11


def make_config(folder: str) -> EngineConfig:
    return EngineConfig(
        model=folder, dtype="float32", device="cpu", max_num_seqs=4, page_tokens=4, num_threads=1
    )


def no_memory(*_: Any) -> Any:
    raise MemoryError("none is left")


def run_rank(
    folder: str, retention: Retention, rank: int, stores: Sequence[Store]
) -> list[StepResult]:
    """A turn goes on from a copy that rank 1 lost, beside a resumed sequence and a new one."""
    worker = Worker(make_config(folder).for_worker(), MeshLayout(2, 1), rank, stores[0])
    results: list[StepResult] = []

    def execute(**parts: Any) -> None:
        results.append(worker.execute(StepPlan(len(results), **parts)))
        worker.check_integrity()

    whole = [
        new_sequence(slot, prompt, FED, retention=retention)
        for slot, prompt in ((TURN, PROMPT), (PREEMPTED, OTHER))
    ]
    layers = worker.spec.num_layers
    execute(new=tuple(whole), prefill=(PrefillGroup((TURN, PREEMPTED), 0, layers),))
    for step in range(len(FED)):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step, sample=False) for n in whole)
        execute(decode=items)
    execute(park=(Parking(TURN, 10, False), Parking(PREEMPTED, 11, False)), free=(TURN, PREEMPTED))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(parked_module, "HostPages", no_memory)
        execute(offload=(10, 11))
    turn = new_sequence(TURN, [*PROMPT, *FED, *MORE], retention=retention)
    turn = replace(turn, resumes=10, resumed_tokens=len(PROMPT) + len(FED))
    resumed = replace(whole[1], resumes=11, resumed_tokens=len(OTHER) + len(FED))
    new = new_sequence(NEW, OTHER, retention=retention)
    execute(new=(turn, resumed, new), prefill=(PrefillGroup((TURN, NEW), 0, layers),))
    for step in range(6):  # all are cut meanwhile
        places = (len(PROMPT) + len(FED) + len(MORE), len(OTHER) + len(FED), len(OTHER))
        items = tuple(DecodeItem(slot, place + step) for slot, place in enumerate(places))
        execute(decode=items)
    execute(drop=(10, 11), free=(TURN, PREEMPTED, NEW))
    assert results[-1].pages_free == worker.info.num_pages
    leave_together(worker)
    return results


@pytest.mark.parametrize("method", METHODS)
def test_others_get_their_tokens(method: str, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    retention = Retention.parse(METHODS[method])
    alone = Worker.local(make_config(str(tmp_path)).for_worker())
    [expected] = run_greedy(alone, [OTHER], 7, retention=retention)
    ours, lost = run_ranks(partial(run_rank, str(tmp_path), retention), 2)
    assert [r.refused for r in ours if r.refused] == []
    assert [r.refused for r in lost if r.refused] == [(TURN, PREEMPTED)]
    sampled = [token for result in ours for token in result.sampled if token.slot == NEW]
    assert [t.token_id for t in sampled] == [t.token_id for t in expected]
