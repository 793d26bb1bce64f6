"""Ranks that hold the same kv head compact its rows together, each with a part of the scores.

Both run the same plans; what each stores at the end, and the tokens that were sampled on the way,
are compared with one process. Other layouts are in `numerics/test_method_suite.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan
from support.ranks import Store, run_ranks
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh import MeshLayout
from saqqara.workers.plan import DecodeItem, StepPlan
from saqqara.workers.worker import Worker

PAGE, SLACK_PAGES = 4, 2
NUM_STEPS = 31
METHODS = ("pyramidkv", "snapkv", "random")


@dataclass
class Outcome:
    """Sampled tokens by slot, and rows (slot, layer, kv head) of the whole model, keys with values.

    `rows` are numpy arrays: tensors would be shared between processes, which may end too early.
    """

    tokens: list[tuple[int, int]]
    rows: dict[tuple[int, int, int], Any]
    refused: list[int] = field(default_factory=list)


def run_plans(worker: Worker) -> Outcome:
    """Sequences of every method at once; their compactions coincide for some and not for others."""
    rng = np.random.default_rng(0)
    new = []
    for slot, prompt_tokens in enumerate((45, 30, 33)):
        settings = {"method": METHODS[slot], "budget": 20, "window": 8, "sinks": 2}
        retention = Retention.parse(settings | {"decode": {"slack_pages": SLACK_PAGES}})
        prompt = (3 + rng.permutation(VOCAB - 3)[:prompt_tokens]).tolist()
        new.append(new_sequence(slot, prompt, retention=retention))
    results = [worker.execute(prefill_plan(worker, [n])) for n in new]
    for step in range(NUM_STEPS):
        # The last one rests now and then, so that not all rows are compacted together.
        items = [
            DecodeItem(n.slot, n.prompt_tokens + (step if n.slot < 2 else step - step // 4))
            for n in new
            if n.slot < 2 or step % 4 != 3
        ]
        results.append(worker.execute(StepPlan(step, decode=tuple(items))))
        worker.check_integrity()
    info = worker.info
    rows = {
        (n.slot, layer, head): torch.cat(
            worker.kv.read(n.slot, layer - info.start_layer, head - info.start_head), dim=1
        ).numpy()
        for n in new
        for layer in range(info.start_layer, info.stop_layer)
        for head in range(info.start_head, info.stop_head)
    }
    tokens = [(s.slot, s.token_id) for r in results for s in r.sampled]
    return Outcome(tokens, rows)


def run_short_of_pages(worker: Worker, rank: int) -> list[int]:
    """Go on where `run_plans` ended; returns the slots that were refused.

    The first step ends with a compaction; what it returned is taken away on rank 1.
    """
    refused: list[int] = []
    for step in range(2 * SLACK_PAGES * PAGE):
        if step == 1 and rank == 1:
            worker.kv.pool.allocate(worker.kv.pages_free)
        items = tuple(DecodeItem(slot, n + NUM_STEPS + step) for slot, n in ((0, 45), (1, 30)))
        refused += worker.execute(StepPlan(step, decode=items)).refused
    return refused


LAYOUT = MeshLayout(tensor_size=2)


def config_of(folder: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=4,
        page_tokens=PAGE,
        num_threads=1,
        kv_memory_gib=0.01,
    )


def _run_rank(folder: Path, rank: int, stores: Sequence[Store]) -> Outcome:
    worker = Worker(config_of(folder), LAYOUT, rank, stores[0])
    outcome = run_plans(worker)
    outcome.refused = run_short_of_pages(worker, rank)
    worker.close()
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-mqa", folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[Outcome]:
    """What both ranks end with."""
    return run_ranks(partial(_run_rank, folder), LAYOUT.world_size)


def test_replicas_of_a_kv_head_equal_one_rank(folder: Path, outcomes: list[Outcome]) -> None:
    expected = run_plans(Worker.local(config_of(folder)))
    for outcome in outcomes:
        assert outcome.rows.keys() == expected.rows.keys()
        for row, stored in outcome.rows.items():
            # Sums over ranks are in another order; another kept token would differ by about 1.
            np.testing.assert_allclose(stored, expected.rows[row], atol=2e-3, rtol=0)
    assert [o.tokens for o in outcomes if o.tokens] == [expected.tokens]
    mean = np.mean([len(row) for row in expected.rows.values()])
    assert 20 <= mean < 20 + SLACK_PAGES * PAGE


def test_a_rank_that_refused_a_sequence_does_not_hold_up_its_replicas(
    outcomes: list[Outcome],
) -> None:
    """They wait for its part of the scores, until the scheduler takes the sequence away."""
    first, second = outcomes
    assert first.refused == []
    assert second.refused == [1]  # what it held is enough for the other one
