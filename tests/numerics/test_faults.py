"""What a worker cannot do for one sequence ends that sequence; the others get their tokens."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import GREEDY, new_sequence, prefill_plan, run_greedy
from support.tiny import VOCAB, save_tiny

from saqqara.compression.decode import DecodeStage
from saqqara.compression.observation import Observation
from saqqara.compression.retention import Retention
from saqqara.compression.scores import Streaming
from saqqara.compression.scoring import context_scores
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, NewSequence, PrefillGroup, StepPlan, StepResult
from saqqara.workers.worker import Worker

LAYERS = 3
PROMPT = np.random.default_rng(4).integers(3, VOCAB, 30).tolist()
OTHER_PROFILE = {"0-0": [1.0]}
NEIGHBOUR = Retention.parse({"method": "snapkv", "budget": 16, "window": 4, "sinks": 2})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder)
    return folder


@pytest.fixture(scope="module")
def worker(tiny: Path) -> Worker:
    config = EngineConfig(
        model=str(tiny), dtype="float32", device="cpu", max_num_seqs=4, page_tokens=4
    )
    return Worker.local(config.for_worker())


def run_beside(worker: Worker, bad: NewSequence, num_tokens: int = 4) -> list[StepResult]:
    """Run slot 1 between two good sequences, which must not notice, in layer ranges."""
    expected = run_greedy(worker, [PROMPT, PROMPT[:9]], num_tokens, retention=NEIGHBOUR)
    new = [
        new_sequence(0, PROMPT, retention=NEIGHBOUR),
        bad,
        new_sequence(2, PROMPT[:9], retention=NEIGHBOUR),
    ]
    slots = (0, 1, 2)
    results = [
        worker.execute(StepPlan(0, new=tuple(new), prefill=(PrefillGroup(slots, 0, 1),))),
        worker.execute(StepPlan(1, prefill=(PrefillGroup(slots, 1, LAYERS),))),
    ]
    for step in range(num_tokens - 1):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
        results.append(worker.execute(StepPlan(step + 2, decode=items)))
    worker.check_integrity()
    for slot, tokens in ((0, expected[0]), (2, expected[1])):
        got = [t.token_id for r in results for t in r.sampled if t.slot == slot]
        assert got == [t.token_id for t in tokens]
    last = worker.execute(StepPlan(9, free=slots))
    worker.check_integrity()
    assert last.pages_free == worker.info.num_pages
    assert run_greedy(worker, [PROMPT[:9]], 2)  # the slot's next sequence is a fresh one
    return results


def only_fault(results: list[StepResult], num_sampled: int = 0) -> str:
    """The message of slot 1, which is at fault once and refused in the same step."""
    [(result, fault)] = [(r, f) for r in results for f in r.faults]
    assert fault.slot == 1
    assert result.refused == (1,)
    assert sum(t.slot == 1 for r in results for t in r.sampled) == num_sampled
    return fault.message


@pytest.mark.parametrize("token_id", [VOCAB, -1, 2**31 - 1, -(2**31)])
def test_a_token_that_the_model_lacks(worker: Worker, token_id: int) -> None:
    bad = new_sequence(1, [5, token_id, 7])
    message = only_fault(run_beside(worker, bad))
    assert message == (
        f"token_ids[1]={token_id} is no token of the model; they are 0 to {VOCAB - 1}"
    )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"method": "snapkv", "budget": 16, "window": 4, "skip_layers": [3]}, "skip_layers"),
        ({"method": "headkv", "budget": 16, "window": 4, "profile": OTHER_PROFILE}, "profile"),
        ({"propagate": {"kind": "once", "layer": 3}}, "propagate.layer"),
    ],
)
def test_a_retention_that_the_model_has_no_layers_for(
    worker: Worker, settings: dict[str, Any], field: str
) -> None:
    bad = new_sequence(1, PROMPT, retention=Retention.parse(settings))
    assert only_fault(run_beside(worker, bad)).startswith(f"retention: {field}: ")


def test_sampling_that_cannot_be_done(worker: Worker) -> None:
    """Here with a bias on no token; the tokens sampled before stand."""
    sampling = replace(GREEDY, logit_bias=((VOCAB, 1.0),))
    bad = new_sequence(1, PROMPT, sampling=sampling)
    assert only_fault(run_beside(worker, bad)).startswith("sampling failed: IndexError: ")


@dataclass(frozen=True, slots=True)
class BrokenScore(Streaming):
    """Fails in layer 1 at prefill, or else in every layer at a compaction."""

    at_compaction: bool = False


@context_scores.register
def broken_scores(score: BrokenScore, observation: Observation, window: int) -> torch.Tensor:
    if observation.compaction if score.at_compaction else observation.layer == 1:
        raise ArithmeticError("no score")
    return context_scores(Streaming(), observation, window)


def test_a_score_that_fails_in_one_layer(worker: Worker) -> None:
    retention = Retention("broken", BrokenScore(), budget=8, window=2, sinks=1)
    bad = new_sequence(1, PROMPT, retention=retention)
    assert only_fault(run_beside(worker, bad)) == "retention failed: ArithmeticError: no score"


def test_a_compaction_that_fails(worker: Worker) -> None:
    score = BrokenScore(at_compaction=True)
    retention = Retention("broken", score, budget=8, window=2, sinks=1, decode=DecodeStage(1))
    bad = new_sequence(1, PROMPT, retention=retention)
    message = only_fault(run_beside(worker, bad, num_tokens=7), num_sampled=4)
    assert message == "compaction failed: ArithmeticError: no score"


def test_followers_of_a_leader_at_fault(worker: Worker) -> None:
    """They share its prompt but not its retention; one is at fault itself."""
    foreign = Retention.parse(
        {"method": "headkv", "budget": 16, "window": 4, "profile": OTHER_PROFILE}
    )
    [expected] = run_greedy(worker, [PROMPT], 1, retention=NEIGHBOUR)
    new = [
        new_sequence(0, PROMPT, retention=foreign),
        new_sequence(1, PROMPT, retention=NEIGHBOUR, shares_prefill_with=0),
        new_sequence(2, PROMPT, retention=foreign, shares_prefill_with=0),
    ]
    result = worker.execute(prefill_plan(worker, new))
    worker.check_integrity()
    assert [fault.slot for fault in result.faults] == [0, 2]
    assert [(t.slot, t.token_id) for t in result.sampled] == [(1, expected[0].token_id)]
    worker.execute(StepPlan(1, free=(0, 1, 2)))
