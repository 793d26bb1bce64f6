"""Ranks that share a model compact its rows exactly as one rank does.

All cases run in the same two processes. What each stores at the end of the same plans, and the
tokens that the last stage sampled on the way, are compared with one process. Half-way all sequences
of the ranks leave their slots and come back, which must not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan
from support.ranks import Store, leave_together, run_ranks
from support.tiny import VOCAB, save_tiny

from saqqara.cluster.scheduling.ledger import Ledger
from saqqara.compression.layers import Layers
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, NewSequence, Parking, StepPlan
from saqqara.workers.worker import Worker

PAGE, SLACK_PAGES = 4, 2
NUM_STEPS = 23
PROFILE = {
    f"{layer}-{head}": [float(1 + (layer + head) % 4)] for layer in range(3) for head in range(6)
}
OWN = {"window": 8}
METHODS: tuple[tuple[str, dict[str, Any], int], ...] = (  # name, settings, prompt tokens
    ("pyramidkv", OWN, 45),
    ("snapkv", OWN, 30),
    ("random", OWN, 33),
    ("h2o", {}, 40),
    ("h2o-adaptive", {}, 12),
    ("ada-pyramidkv", OWN, 41),
    ("headkv", {"profile": PROFILE, "head_beta": 2.0, **OWN}, 35),
    ("published", {}, 60),
    ("stored", {}, 50),
)
RAGGED = (5, 6)
TRIMMED = (7, 8)


@dataclass
class Outcome:
    """Sampled tokens by slot, and rows (slot, layer, kv head) of the whole model, keys with values.

    `rows` are numpy arrays: tensors would be shared between processes, which may end too early.
    """

    tokens: list[tuple[int, int]]
    rows: dict[tuple[int, int, int], Any]
    kept: dict[int, Any] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)


def retention_of(slot: int) -> Retention:
    name, own, _ = METHODS[slot]
    if slot in TRIMMED:
        stage = {"trigger": name, "exceed": 6}
        propagate = {"sinks": 2, "min_context": 4, "rho": 0.5}
        return Retention.parse({"method": "pyramidinfer", "decode": stage, **propagate})
    decode = {"slack_pages": SLACK_PAGES}
    return Retention.parse({"method": name, "budget": 20, "sinks": 2, "decode": decode, **own})


def run_plans(worker: Worker, known: list[tuple[int, int]] | None = None) -> Outcome:
    """Sequences of every method at once; their compactions coincide for some and not for others.

    Methods that trim are not for models with windows. Where all tokens (slot, token id) are
    `known`, the sequences are parked on the way, and resumed.
    """
    rng = np.random.default_rng(0)
    new = []
    for slot, (_, _, prompt_tokens) in enumerate(METHODS):
        if worker.spec.windows and slot in TRIMMED:
            continue
        prompt = (3 + rng.permutation(VOCAB - 3)[:prompt_tokens]).tolist()
        new.append(new_sequence(slot, prompt, retention=retention_of(slot)))
    results = [worker.execute(prefill_plan(worker, [n])) for n in new]
    info = worker.info
    spec = worker.spec
    whole = replace(
        info,
        rank=1,
        start_layer=0,
        stop_layer=spec.num_layers,
        start_head=0,
        stop_head=spec.num_kv_heads,
        num_pages=10**6,
    )
    ledger = Ledger([replace(info, rank=0), whole], len(new))  # what it says of this rank counts
    for n in new:
        ledger.admit(n.slot, ledger.demand(n.retention, n.prompt_tokens), n.prompt_tokens)
        [kept] = results[n.slot].kept
        ledger.set_kept(n.slot, 0, kept.counts)
        ledger.advance_prefill([n.slot], info.stop_layer)
    for step in range(NUM_STEPS):
        # The third one rests now and then, so that not all rows are compacted together.
        items = [
            DecodeItem(n.slot, n.prompt_tokens + (step if n.slot != 2 else step - step // 4))
            for n in new
            if n.slot != 2 or step % 4 != 3
        ]
        if known is not None and step == NUM_STEPS // 2 + 1:
            park_all(worker, new, items, known)
        results.append(worker.execute(StepPlan(step, decode=tuple(items))))
        worker.check_integrity()
        ledger.append(np.array([i.slot for i in items]), np.ones(len(items), dtype=np.int64))
        ledger.settle()
        assert worker.kv.pages_free == info.num_pages - ledger.allocated()[0]
    rows = {
        (n.slot, layer, head): torch.cat(
            worker.kv.read(n.slot, layer - info.start_layer, head - info.start_head), dim=1
        ).numpy()
        for n in new
        for layer in range(info.start_layer, info.stop_layer)
        for head in range(info.start_head, info.stop_head)
    }
    tokens = [(s.slot, s.token_id) for r in results for s in r.sampled]
    return Outcome(tokens, rows, {n.slot: worker.kv.kept(n.slot) for n in new})


def park_all(
    worker: Worker, new: list[NewSequence], items: list[DecodeItem], known: list[tuple[int, int]]
) -> None:
    """Let all sequences leave their slots, to the host and within pages, and come back."""
    slots = tuple(n.slot for n in new)
    park = tuple(Parking(slot, slot, to_host=slot % 2 == 0) for slot in slots)
    worker.execute(StepPlan(0, park=park, free=slots))
    worker.check_integrity()
    resumed = []
    for n in new:
        [position] = {i.position for i in items if i.slot == n.slot}
        output = [token for slot, token in known if slot == n.slot]
        tokens = [*n.tokens().tolist(), *output[: position + 1 - n.prompt_tokens]]
        back = replace(n, token_ids=np.array(tokens, dtype=np.int32).tobytes())
        resumed.append(replace(back, resumes=n.slot, resumed_tokens=position))
    worker.execute(StepPlan(0, new=tuple(resumed)))
    worker.check_integrity()


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


CASES = {
    "two stages": ("llama-gqa", MeshLayout(1, 2)),
    "two and one kv heads": ("llama-gqa", MeshLayout(2, 1)),
    "one kv head on both ranks": ("llama-mqa", MeshLayout(2, 1)),
    "windows, two stages": ("qwen2", MeshLayout(1, 2)),
    "windows, two and one kv heads": ("qwen2", MeshLayout(2, 1)),
}


def config_of(name: str, folder: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder / name),
        dtype="float32",
        device="cpu",
        max_num_seqs=len(METHODS),
        page_tokens=PAGE,
        num_threads=1,
        kv_memory_gib=0.01,
    )


def _run_rank(
    folder: Path, known: dict[str, list[tuple[int, int]]], rank: int, stores: Sequence[Store]
) -> dict[str, Outcome]:
    outcomes = {}
    for (case, (name, layout)), store in zip(CASES.items(), stores, strict=True):
        worker = Worker(config_of(name, folder).for_worker(), layout, rank, store)
        outcomes[case] = run_plans(worker, known[name])
        outcomes[case].refused = run_short_of_pages(worker, rank)
        leave_together(worker)
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("llama-gqa", "llama-mqa", "qwen2"):
        save_tiny(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[Layers, Outcome]]:
    """The layers of every model, and what one process ends with."""
    found = {}
    for name in {name for name, _ in CASES.values()}:
        worker = Worker.local(config_of(name, folder).for_worker())
        found[name] = worker.spec.layers, run_plans(worker)
    return found


@pytest.fixture(scope="module")
def outcomes(folder: Path, alone: dict[str, tuple[Layers, Outcome]]) -> dict[str, list[Outcome]]:
    """What both ranks of every case end with; one pair of processes runs all cases."""
    known = {name: outcome.tokens for name, (_, outcome) in alone.items()}
    by_rank = run_ranks(partial(_run_rank, folder, known), 2, num_stores=len(CASES))
    return {case: [by_rank[0][case], by_rank[1][case]] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_sharded_equals_one_rank(
    case: str, alone: dict[str, tuple[Layers, Outcome]], outcomes: dict[str, list[Outcome]]
) -> None:
    layers, expected = alone[CASES[case][0]]
    for outcome in outcomes[case]:
        for row, stored in outcome.rows.items():
            # Sums over ranks are in another order; another kept token would differ by about 1.
            np.testing.assert_allclose(stored, expected.rows[row], atol=2e-3, rtol=0)
    assert {row for o in outcomes[case] for row in o.rows} == expected.rows.keys()
    assert [o.tokens for o in outcomes[case] if o.tokens] == [expected.tokens]
    assert case.startswith("windows") == bool(layers.local_layers)
    local, shared = list(layers.local_layers), list(layers.global_layers)
    assert all((kept[local] == layers.window).all() for kept in expected.kept.values())
    lengths = {slot: np.mean(kept[shared]) for slot, kept in expected.kept.items()}
    assert all(20 <= lengths[slot] < 20 + SLACK_PAGES * PAGE for slot in range(7))
    if case == "two and one kv heads":
        # A rank that had cut its own rows to their mean would differ here.
        assert all(np.ptp(expected.kept[slot], axis=1).any() for slot in RAGGED)
    if not case.startswith("windows"):
        assert all(lengths[slot] < METHODS[slot][2] + NUM_STEPS for slot in TRIMMED)


def test_a_rank_that_refused_a_sequence_does_not_hold_up_its_replicas(
    outcomes: dict[str, list[Outcome]],
) -> None:
    """They wait for its part of the scores, until the scheduler takes the sequence away."""
    first, second = outcomes["one kv head on both ranks"]
    assert first.refused == []
    assert second.refused == [1]  # what it held is enough for the other one
