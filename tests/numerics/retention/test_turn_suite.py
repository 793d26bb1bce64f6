"""Turns of a conversation keep what the definitions say, whatever the lengths of their rows.

A turn sees what its rows have and its own tokens, and retention chooses among both: each row keeps
what the whole text gives it, or all that it has; heads that compete divide what their layer is
given. The definitions are slow loops in float64 (`support/definitions.py`) over a list for each
row.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.arrangements import config_of
from support.methods import HEADS, LAYERS, METHODS, PREFILL
from support.plans import GREEDY, new_sequence
from support.slow_llama import NEAR_CUT, SlowLlama, Weights
from support.tiny import VOCAB, save_tiny

from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, Parking, PrefillGroup, StepPlan, StepResult
from saqqara.workers.worker import Worker

EVEN = ("streaming", "snapkv", "pyramidkv", "tova", "knorm")
UNEVEN = ("adakv", "headkv", "recommended", "recommended-adaptive", "random-adaptive")
PROMPT, FED = 18, 2  # no longer than the budget: the first turn keeps all
TURNS = (20, 10, 3)  # the last is shorter than the window
SLOT, OTHER = 0, 1
SEED = 4  # no selection of its text is near its cut
ALL_LOGPROBS = replace(GREEDY, num_logprobs=VOCAB)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    folder = tmp_path_factory.mktemp("turns")
    return folder, Weights(save_tiny("llama-gqa", folder, num_layers=LAYERS))


@pytest.fixture(scope="module")
def worker(tiny: tuple[Path, Weights]) -> Worker:
    return Worker.local(config_of(tiny[0], MeshLayout(), 2).for_worker())


def run(worker: Worker, **parts: Any) -> StepResult:
    result = worker.execute(StepPlan(0, **parts))
    worker.check_integrity()
    assert not result.refused
    return result


def assert_sampled_from(result: StepResult, slot: int, logits: torch.Tensor) -> None:
    [token] = [token for token in result.sampled if token.slot == slot]
    assert token.logprobs is not None
    order = torch.tensor(token.logprobs.top_ids).argsort()
    got = torch.tensor(token.logprobs.top_logprobs, dtype=torch.float64)[order]
    torch.testing.assert_close(got, logits.log_softmax(dim=0), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("method", [*EVEN, *UNEVEN])
def test_turns_keep_what_the_definition_says(
    method: str, worker: Worker, tiny: tuple[Path, Weights]
) -> None:
    """Beside another prompt; from rows that have all, and from rows that were cut before."""
    retention = METHODS[method].retention(method, PREFILL)
    tokens = (3 + np.random.default_rng(SEED).permutation(VOCAB - 3)).tolist()
    other = new_sequence(OTHER, tokens[-9:], sampling=ALL_LOGPROBS, retention=retention)
    rules, stop = METHODS[method].rules, PROMPT
    slow, other_logits = SlowLlama(tiny[1], rules), SlowLlama(tiny[1], rules).prefill(tokens[-9:])
    new = new_sequence(SLOT, tokens[:stop], tokens[stop : stop + FED], retention=retention)
    run(worker, new=(new,), prefill=(PrefillGroup((SLOT,), 0, LAYERS),))
    slow.prefill(tokens[:stop])
    for number, num_new in enumerate(TURNS):
        for position in range(stop, stop + FED):
            run(worker, decode=(DecodeItem(SLOT, position, sample=False),))
            slow.decode(tokens[position], position)
        run(worker, park=(Parking(SLOT, number, to_host=False),), free=(SLOT,))
        fed, stop = stop + FED, stop + FED + num_new
        is_last = number + 1 == len(TURNS)
        more = [] if is_last else tokens[stop : stop + FED]
        new = new_sequence(SLOT, tokens[:stop], more, ALL_LOGPROBS, retention)
        new = replace(new, resumes=number, resumed_tokens=fed)
        group = PrefillGroup((SLOT, OTHER), 0, LAYERS)
        result = run(worker, new=(new, other), prefill=(group,))
        assert result.prefill_layer_tokens == LAYERS * (num_new + 9)
        logits = slow.turn(tokens[fed:stop], fed)
        if is_last:
            assert_sampled_from(result, SLOT, logits)
        assert_sampled_from(result, OTHER, other_logits)
        for layer, head in np.ndindex(LAYERS, HEADS):
            row = slow.rows[layer][head]
            held = [torch.stack(x) for x in zip(*((e.key, e.value) for e in row), strict=True)]
            for got, expected in zip(worker.kv.read(SLOT, layer, head), held, strict=True):
                torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=1e-4)
        run(worker, free=(OTHER,))
    lengths = np.array([[len(row) for row in rows] for rows in slow.rows])
    assert (lengths != lengths[:, :1]).any() == (method in UNEVEN)
    assert slow.cuts.closest > NEAR_CUT, "rounding decides what is kept: take another seed"
    run(worker, free=(SLOT,))
    assert worker.kv.pages_free == worker.kv.num_pages
