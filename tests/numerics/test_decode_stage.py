"""Rows are compacted while decoding exactly as the definition, written as loops over lists, says.

`support/slow_decode.py` is that definition. Greedy tokens and kept positions are compared after
every fed token; the engine computes in fp32, the loops in float64, and the random model's choices
are far apart compared with that.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan
from support.slow_decode import Rule, SlowLlama
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, StepPlan
from saqqara.workers.worker import Worker

LAYERS, HEADS, PAGE = 3, 3, 4
WINDOW, SINKS, BUDGET, SLACK_PAGES = 8, 2, 20, 2
SLACK = SLACK_PAGES * PAGE
METHODS = ["streaming", "snapkv", "pyramidkv", "knorm", "random"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Llama in which long texts have their place, and its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny("llama-gqa", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return model, folder


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": PAGE}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}))


def retention_of(method: str, **settings: Any) -> Retention:
    return Retention.parse(
        {"method": method, "budget": BUDGET, "window": WINDOW, "sinks": SINKS}
        | {"decode": {"slack_pages": SLACK_PAGES}}
        | settings
    )


def rule_of(retention: Retention, prompt_tokens: int) -> Rule:
    counts = retention.layer_tokens(prompt_tokens, LAYERS)
    assert retention.score is not None
    return Rule(retention.score, list(counts), BUDGET, WINDOW, SINKS, SLACK)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """No token comes twice: in the lowest layer its keys would differ by a rotation only."""
    rng = np.random.default_rng(seed)
    return [(3 + rng.permutation(VOCAB - 3)[:length]).tolist() for length in lengths]


def kept_positions(worker: Worker, slow: SlowLlama, slot: int) -> list[list[list[int]]]:
    """Which of the keys that the loops ever saw lie in each row, by layer and head."""
    rows = []
    for layer in range(LAYERS):
        rows.append([])
        for head in range(HEADS):
            stored, _ = worker.kv.read(slot, layer, head)
            distance = torch.cdist(stored.double(), torch.stack(slow.heads[layer][head].all_keys))
            assert float(distance.min(dim=1).values.max()) < 1e-3
            rows[-1].append(distance.argmin(dim=1).tolist())
    return rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompt_tokens", [45, 5])
def test_tokens_and_kept_positions_are_those_of_the_definition(
    method: str, prompt_tokens: int, model: tuple[Any, Path]
) -> None:
    hf, folder = model
    [prompt] = prompts([prompt_tokens])
    retention = retention_of(method)
    slow = SlowLlama(hf, rule_of(retention, prompt_tokens))
    worker = make_worker(folder)
    result = worker.execute(
        prefill_plan(worker, [new_sequence(0, prompt, retention=retention)], step=1)
    )
    token = slow.generate(prompt, 1)[0]
    for step in range(max(BUDGET - prompt_tokens, 0) + 3 * SLACK + 3):
        assert [s.token_id for s in result.sampled] == [token]
        expected = [[[e.position for e in h.kept] for h in heads] for heads in slow.heads]
        assert kept_positions(worker, slow, 0) == expected
        position = prompt_tokens + step
        token = slow.feed(token, position)
        result = worker.execute(StepPlan(step + 2, decode=(DecodeItem(0, position),)))
        worker.check_integrity()
    assert all(head.num_compactions == 3 for heads in slow.heads for head in heads)
