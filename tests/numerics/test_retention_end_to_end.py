"""What a worker leaves in its pages is what the definition, written as loops, would keep.

The oracle sees only transformers: its attention weights (eager, fp32) and its KV cache.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan
from support.tiny import VOCAB, save_tiny
from transformers import AutoModelForCausalLM

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.worker import Worker

LAYERS, HEADS, GROUP = 3, 3, 2
WINDOW, SINKS, BUDGET, KERNEL, BETA = 8, 4, 24, 7, 20.0
LENGTHS = [90, 25, 61]
NEAR_CUT = 1e-5  # relative distance to the cut within which fp32 may decide either way


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB, length).tolist() for length in LENGTHS]


def observe(model: Any, prompt: list[int]) -> tuple[Any, list[tuple[Any, Any]]]:
    """Attention weights per layer [Hq, n, n], and keys and values per layer [H, n, D]."""
    with torch.inference_mode():
        out = model(torch.tensor([prompt]), output_attentions=True, use_cache=True)
    cache = [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers]
    return [a[0].double() for a in out.attentions], cache


def snapkv_loop(attention: Any, head: int, n: int) -> list[float]:
    """Pooled mean attention of the window's queries on each context token."""
    raw = []
    for j in range(n - WINDOW):
        total = 0.0
        for g in range(GROUP):
            for i in range(n - WINDOW, n):
                total += float(attention[head * GROUP + g, i, j])
        raw.append(total / (WINDOW * GROUP))
    half = KERNEL // 2
    return [max(raw[max(0, j - half) : j + half + 1]) for j in range(len(raw))]


def knorm_loop(keys: Any, head: int, n: int) -> list[float]:
    return [-(float(keys[head, j].double().pow(2).sum()) ** 0.5) for j in range(n - WINDOW)]


def pyramid_loop(n: int) -> list[float]:
    """Real-valued kept tokens per layer."""
    mean = BUDGET - WINDOW
    low = max(SINKS, mean / BETA)
    high = 2 * mean - low
    if high > n - WINDOW:
        high = n - WINDOW
        low = 2 * mean - high
    return [WINDOW + high - layer * (high - low) / (LAYERS - 1) for layer in range(LAYERS)]


def read_row(worker: Worker, slot: int, layer: int, head: int) -> Any:
    """Keys of one row, in the order in which they are stored."""
    keys, _ = worker.kv.read(slot, layer, head)
    return keys


def positions_of(stored: Any, keys: Any) -> list[int]:
    """Which of the prompt's keys [n, D] the stored ones are."""
    distance = torch.cdist(stored.double(), keys.double())
    assert float(distance.min(dim=1).values.max()) < 1e-4
    return [int(j) for j in distance.argmin(dim=1)]


def assert_selection(scores: list[float], got: list[int], keep: int, n: int) -> None:
    assert len(got) == keep
    assert got == sorted(set(got))
    assert got[:SINKS] == list(range(SINKS))
    assert got[-WINDOW:] == list(range(n - WINDOW, n))
    free = sorted(range(SINKS, n - WINDOW), key=lambda j: (scores[j], j), reverse=True)
    expected = free[: keep - SINKS - WINDOW]
    chosen = got[SINKS:-WINDOW]
    if not expected:
        assert chosen == []
        return
    cut = scores[expected[-1]]
    for j in set(expected) ^ set(chosen):
        assert abs(scores[j] - cut) <= NEAR_CUT * abs(cut), f"token {j} is far from the cut"


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "knorm", "streaming"])
def test_pages_hold_what_the_definition_keeps(method: str, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    worker = Worker.local(
        EngineConfig(model=str(tmp_path), dtype="float32", device="cpu", max_num_seqs=4)
    )
    retention = Retention.parse({"method": method, "window": WINDOW, "budget": BUDGET})
    new = [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]
    worker.execute(prefill_plan(worker, new))
    for slot, prompt in enumerate(prompts()):
        n = len(prompt)
        attention, cache = observe(model, prompt)
        kept = worker.kv.kept(slot)
        assert int(kept.sum()) == LAYERS * HEADS * BUDGET
        for layer in range(LAYERS):
            real = pyramid_loop(n)[layer] if method == "pyramidkv" else BUDGET
            assert abs(int(kept[layer, 0]) - real) <= 1
            for head in range(HEADS):
                keys = cache[layer][0]
                got = positions_of(read_row(worker, slot, layer, head), keys[head])
                if method == "knorm":
                    scores = knorm_loop(keys, head, n)
                elif method == "streaming":
                    scores = [float(j) for j in range(n - WINDOW)]
                else:
                    scores = snapkv_loop(attention[layer], head, n)
                assert_selection(scores, got, int(kept[layer, head]), n)
