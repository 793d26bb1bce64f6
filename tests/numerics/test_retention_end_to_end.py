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
from saqqara.workers.plan import StepPlan
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


def make_worker(folder: Path, attention_backend: str = "torch") -> Worker:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=4,
        attention_backend=attention_backend,
    )
    return Worker.local(config)


def h2o_loop(attention: Any, head: int, n: int) -> list[float]:
    """Attention of all queries on each token, the group's mean."""
    group = attention[head * GROUP : (head + 1) * GROUP]
    return [
        sum(float(group[g, i, j]) for g in range(GROUP) for i in range(n)) / GROUP for j in range(n)
    ]


def tova_loop(attention: Any, n: int) -> list[float]:
    """Attention of the last query on each token before it, the mean of all query heads."""
    heads = HEADS * GROUP
    return [sum(float(attention[h, n - 1, j]) for h in range(heads)) / heads for j in range(n - 1)]


def assert_context(scores: list[float], got: list[int], keep: int, recent: int, n: int) -> None:
    """Sinks and the recent tokens are there; of the rest, what differs is near the cut."""
    assert len(got) == keep
    assert got == sorted(set(got))
    forced = {*range(SINKS), *range(n - recent, n)}
    assert forced <= set(got)
    free = sorted(set(range(n)) - forced, key=lambda j: (scores[j], j), reverse=True)
    expected = set(free[: keep - len(forced)])
    cut = min((scores[j] for j in expected), default=0.0)
    for j in expected ^ (set(got) - forced):
        assert abs(scores[j] - cut) <= NEAR_CUT * abs(cut), f"token {j} is far from the cut"


@pytest.mark.parametrize("attention_backend", ["torch", "reference"])
@pytest.mark.parametrize("method", ["h2o", "tova"])
def test_scores_of_all_queries_and_of_all_heads(
    method: str, attention_backend: str, tmp_path: Path
) -> None:
    """The reference backend hands the log-sum-exps of prefill on to the scores."""
    save_tiny("llama-gqa", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    worker = make_worker(tmp_path, attention_backend)
    retention = Retention.parse(method, BUDGET)
    new = [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]
    worker.execute(prefill_plan(worker, new))
    for slot, prompt in enumerate(prompts()):
        n = len(prompt)
        attention, cache = observe(model, prompt)
        assert (worker.kv.kept(slot) == BUDGET).all()
        for layer in range(LAYERS):
            keys = cache[layer][0]
            rows = [
                positions_of(read_row(worker, slot, layer, head), keys[head])
                for head in range(HEADS)
            ]
            for head, got in enumerate(rows):
                if method == "h2o":
                    scores = h2o_loop(attention[layer], head, n)
                    assert_context(scores, got, BUDGET, BUDGET // 2, n)
                else:
                    assert got == rows[0], "all heads keep the same"
                    assert_context(tova_loop(attention[layer], n), got, BUDGET, 1, n)


@pytest.mark.parametrize("method", ["adakv", "ada-pyramidkv"])
def test_heads_compete_for_the_tokens_of_their_layer(method: str, tmp_path: Path) -> None:
    """With b = B - w: 0.2 b for each head by its own scores, the rest to the best of all."""
    save_tiny("llama-gqa", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    worker = make_worker(tmp_path)
    retention = Retention.parse({"method": method, "window": WINDOW, "budget": BUDGET})
    new = [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]
    worker.execute(prefill_plan(worker, new))
    differ = 0
    for slot, prompt in enumerate(prompts()):
        n = len(prompt)
        attention, cache = observe(model, prompt)
        kept = worker.kv.kept(slot)
        assert int(kept.sum()) == LAYERS * HEADS * BUDGET
        for layer in range(LAYERS):
            total = int(kept[layer].sum())
            real = pyramid_loop(n)[layer] if method == "ada-pyramidkv" else BUDGET
            assert total % HEADS == 0
            assert abs(total // HEADS - real) <= 1
            differ += len(set(kept[layer].tolist())) > 1
            assert_competition(
                [snapkv_loop(attention[layer], head, n) for head in range(HEADS)],
                [
                    positions_of(read_row(worker, slot, layer, head), cache[layer][0][head])
                    for head in range(HEADS)
                ],
                total // HEADS - WINDOW,
                n,
            )
    assert differ, "no heads differ: the test would show nothing"


def assert_competition(scores: list[list[float]], got: list[list[int]], mean: int, n: int) -> None:
    """`mean` context tokens per head, of which a fifth by its own scores."""
    floor = mean // 5
    order = [
        (float("inf") if j < SINKS else scores[head][j], j, -head)
        for head in range(HEADS)
        for j in range(n - WINDOW)
    ]
    order.sort(reverse=True)
    expected: list[set[int]] = [set() for _ in scores]
    for _, j, minus_head in order:
        if len(expected[-minus_head]) < floor:
            expected[-minus_head].add(j)
    for _, j, minus_head in order:
        if sum(map(len, expected)) < HEADS * mean:
            expected[-minus_head].add(j)
    window = set(range(n - WINDOW, n))
    cuts = [min(scores[head][j] for j in expected[head]) for head in range(HEADS)]
    for head, row in enumerate(got):
        assert row == sorted(set(row))
        assert window <= set(row)
        for j in expected[head] ^ (set(row) - window):
            value = scores[head][j]
            assert any(abs(value - cut) <= NEAR_CUT * abs(cut) for cut in cuts)


def test_a_profile_gives_each_head_its_own_budget(tmp_path: Path) -> None:
    """Shares 1 : 2 : 3 of each layer; the pages hold the counts that were promised."""
    save_tiny("llama-gqa", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    worker = make_worker(tmp_path)
    profile = {
        f"{layer}-{head}": [1.0 + head // GROUP]
        for layer in range(LAYERS)
        for head in range(HEADS * GROUP)
    }
    retention = Retention.parse(
        {"method": "headkv", "window": WINDOW, "budget": BUDGET, "profile": profile}
    )
    new = [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]
    worker.execute(prefill_plan(worker, new))
    for slot, prompt in enumerate(prompts()):
        n = len(prompt)
        attention, cache = observe(model, prompt)
        kept = worker.kv.kept(slot)
        assert kept.tolist() == retention.row_tokens(n, LAYERS, HEADS).tolist()
        assert int(kept.sum()) == LAYERS * HEADS * BUDGET
        assert (kept[:, 0] < kept[:, 2]).all()
        for layer in range(LAYERS):
            for head in range(HEADS):
                got = positions_of(read_row(worker, slot, layer, head), cache[layer][0][head])
                scores = [*snapkv_loop(attention[layer], head, n), *[0.0] * WINDOW]
                assert_context(scores, got, int(kept[layer, head]), WINDOW, n)


@pytest.mark.parametrize("method", ["h2o", "tova", "ada-pyramidkv"])
def test_what_else_is_in_the_batch_changes_nothing(method: str, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path)
    retention = Retention.parse(method, 40)
    sequences = [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]
    worker.execute(prefill_plan(worker, sequences))
    rows = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    together = {
        (new.slot, *row): read_row(worker, new.slot, *row) for new in sequences for row in rows
    }
    worker.execute(StepPlan(1, free=tuple(new.slot for new in sequences)))
    for new in sequences:
        worker.execute(prefill_plan(worker, [new], step=2))
        for row in rows:
            alone = read_row(worker, new.slot, *row)
            assert alone.shape == together[new.slot, *row].shape
            # Linear layers of other sizes may round otherwise; another token is far off.
            torch.testing.assert_close(alone, together[new.slot, *row], rtol=1e-4, atol=1e-4)
        worker.check_integrity()
        worker.execute(StepPlan(3, free=(new.slot,)))


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "knorm", "streaming"])
def test_pages_hold_what_the_definition_keeps(method: str, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    worker = make_worker(tmp_path)
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
