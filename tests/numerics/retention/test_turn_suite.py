"""Turns of a conversation keep what the definitions say, whatever the lengths of their rows.

A turn sees what its rows have and its own tokens, and retention chooses among both: each row keeps
what the whole text gives it, or all that it has; heads that compete divide what their layer is
given. With a decode stage rows are cut as they are fed; the next turn goes on from what is left.
The definitions are slow loops in float64 (`support/definitions.py`) over a list for each row.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.arrangements import config_of
from support.methods import HEADS, LAYERS, METHODS, PREFILL, Stage
from support.plans import GREEDY, new_sequence
from support.slow_llama import NEAR_CUT, SlowLlama, Weights
from support.tiny import VOCAB, save_tiny

from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, Parking, PrefillGroup, StepPlan, StepResult
from saqqara.workers.worker import Worker

EVEN = ("streaming", "snapkv", "pyramidkv", "tova", "knorm")
UNEVEN = ("adakv", "headkv", "recommended", "recommended-adaptive", "random-adaptive")
CUT = ("snapkv", "tova", "knorm", "adakv", "recommended")  # while decoding, too
PROMPT = 18  # no longer than the budget: the first turn keeps all
SLACK = Stage(9, slack_pages=1)  # they fire after 8 of the first turn's tokens, then twice a turn
TURNS = (20, 10, 3)  # the last is shorter than the window
SLOT, OTHER = 0, 1
SEED = 8  # no selection of its text is near its cut
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


def assert_same_rows(worker: Worker, slow: SlowLlama) -> None:
    for layer, head in np.ndindex(LAYERS, HEADS):
        row = slow.rows[layer][head]
        held = [torch.stack(x) for x in zip(*((e.key, e.value) for e in row), strict=True)]
        for got, expected in zip(worker.kv.read(SLOT, layer, head), held, strict=True):
            torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("method", [*EVEN, *UNEVEN])
def test_turns_keep_what_the_definition_says(
    method: str, worker: Worker, tiny: tuple[Path, Weights]
) -> None:
    """Beside another prompt; from rows that have all, and from rows that were cut before."""
    stage = SLACK if method in CUT else PREFILL
    retention, num_fed = METHODS[method].retention(method, stage), stage.num_steps
    tokens = (3 + np.random.default_rng(SEED).permutation(VOCAB - 3)).tolist()
    other = new_sequence(OTHER, tokens[-9:], sampling=ALL_LOGPROBS, retention=retention)
    rules, stop = METHODS[method].rules, PROMPT
    slow = SlowLlama(tiny[1], rules, stage.slack_tokens)
    other_logits = SlowLlama(tiny[1], rules).prefill(tokens[-9:])
    new = new_sequence(SLOT, tokens[:stop], tokens[stop : stop + num_fed], retention=retention)
    run(worker, new=(new,), prefill=(PrefillGroup((SLOT,), 0, LAYERS),))
    slow.prefill(tokens[:stop])
    for number, num_new in enumerate(TURNS):
        for position in range(stop, stop + num_fed):
            run(worker, decode=(DecodeItem(SLOT, position, sample=False),))
            slow.decode(tokens[position], position)
        run(worker, park=(Parking(SLOT, number, to_host=False),), free=(SLOT,))
        assert slow.num_compactions == (0 if stage is PREFILL else min(number + 1, 2))
        fed, stop = stop + num_fed, stop + num_fed + num_new
        is_last = number + 1 == len(TURNS)
        more = [] if is_last else tokens[stop : stop + num_fed]
        new = new_sequence(SLOT, tokens[:stop], more, ALL_LOGPROBS, retention)
        new = replace(new, resumes=number, resumed_tokens=fed)
        group = PrefillGroup((SLOT, OTHER), 0, LAYERS)
        result = run(worker, new=(new, other), prefill=(group,))
        assert result.prefill_layer_tokens == LAYERS * (num_new + 9)
        logits = slow.turn(tokens[fed:stop], fed)
        if is_last:
            assert_sampled_from(result, SLOT, logits)
            next_token = int(logits.argmax())
        assert_sampled_from(result, OTHER, other_logits)
        assert_same_rows(worker, slow)
        run(worker, free=(OTHER,))
    if stage is SLACK:  # behind a turn that is shorter than the window
        for position in range(stop, stop + 4):
            item = DecodeItem(SLOT, position)
            [sampled] = run(worker, decode=(item,)).sampled
            slow.decode(next_token, position)
            next_token = sampled.token_id
        assert slow.num_compactions == 1
        assert_same_rows(worker, slow)
    lengths = np.array([[len(row) for row in rows] for rows in slow.rows])
    assert (lengths != lengths[:, :1]).any() == (method in UNEVEN)
    assert slow.cuts.closest > NEAR_CUT, "rounding decides what is kept: take another seed"
    run(worker, free=(SLOT,))
    assert worker.kv.pages_free == worker.kv.num_pages
