"""A sequence at fault does not part ranks that work together: the others get their tokens."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from support.plans import GREEDY, new_sequence, prefill_plan, run_greedy
from support.ranks import Store, leave_together, run_ranks
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, StepPlan, StepResult
from saqqara.workers.worker import Worker

NUM_STEPS = 4
PROMPT = np.random.default_rng(4).integers(3, VOCAB, 30).tolist()
GOOD = Retention.parse({"method": "tova", "budget": 12, "sinks": 2})
FOREIGN = Retention.parse({"method": "tova", "budget": 12, "sinks": 2, "skip_layers": [3]})


def make_config(folder: str) -> EngineConfig:
    return EngineConfig(
        model=folder, dtype="float32", device="cpu", max_num_seqs=4, page_tokens=4, num_threads=1
    )


def run_rank(folder: str, rank: int, stores: Sequence[Store]) -> list[StepResult]:
    """A good sequence, one with a strange token, one with a strange layer, one not to sample."""
    worker = Worker(make_config(folder).for_worker(), MeshLayout(2, 2), rank, stores[0])
    unsampled = replace(GREEDY, logit_bias=((VOCAB, 1.0),))
    new = [
        new_sequence(0, PROMPT, retention=GOOD),
        new_sequence(1, [7, VOCAB, 9], retention=GOOD),
        new_sequence(2, PROMPT, retention=FOREIGN),
        new_sequence(3, PROMPT[:7], retention=GOOD, sampling=unsampled),
    ]
    results = [worker.execute(prefill_plan(worker, new))]
    for step in range(NUM_STEPS - 1):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
        results.append(worker.execute(StepPlan(step + 1, decode=items)))
    results.append(worker.execute(StepPlan(NUM_STEPS, free=(0, 1, 2, 3))))
    worker.check_integrity()
    assert results[-1].pages_free == worker.info.num_pages
    leave_together(worker)
    return results


def test_two_stages_of_two_ranks_go_on(tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    alone = Worker.local(make_config(str(tmp_path)).for_worker())
    [expected] = run_greedy(alone, [PROMPT], NUM_STEPS, retention=GOOD)
    by_rank = run_ranks(partial(run_rank, str(tmp_path)), 4)
    sampled = [token for result in by_rank[2] for token in result.sampled]
    assert [(t.slot, t.token_id) for t in sampled] == [(0, t.token_id) for t in expected]
    for rank, results in enumerate(by_rank):
        faults = {fault.slot: fault.message for result in results for fault in result.faults}
        assert faults[1].startswith(f"token_ids[1]={VOCAB} is no token")
        assert faults[2].startswith("retention: skip_layers: ")
        assert (3 in faults) == (rank >= 2)  # the last stage samples
