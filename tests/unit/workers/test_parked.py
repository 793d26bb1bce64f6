"""Sequences that leave their slots come back bit for bit, from pages and from the host's memory."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, Parking, StepPlan, StepResult
from saqqara.workers.reuse import parked
from saqqara.workers.transfer import page_locked_parts
from saqqara.workers.worker import Worker

PAGE, NUM_STEPS, AT = 4, 26, 9
CUT = {"budget": 20, "window": 8, "sinks": 2, "decode": {"slack_pages": 2}}
PYRAMIDINFER = {"method": "pyramidinfer", "sinks": 2, "min_context": 4, "rho": 0.5}
METHODS: dict[str, tuple[Any, int]] = {  # retention, prompt tokens
    "full": ("full", 21),
    "snapkv": ({"method": "snapkv", "budget": 20, "window": 8}, 35),
    "adakv": ({"method": "adakv", "budget": 16, "window": 4}, 33),
    "cycles": ({"method": "snapkv"} | CUT, 30),
    "short": ({"method": "pyramidkv"} | CUT, 11),
    "sums": ({"method": "h2o", "budget": 20, "sinks": 2, "decode": {"slack_pages": 1}}, 40),
    "published": (PYRAMIDINFER | {"decode": {"trigger": "published", "exceed": 6}}, 60),
    "stored": (PYRAMIDINFER | {"decode": {"trigger": "stored", "exceed": 6}}, 50),
}


@pytest.fixture(scope="module", params=["llama-gqa", "gemma2"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=2 * len(METHODS),
        max_model_len=128,
        page_tokens=PAGE,
        num_threads=1,
        kv_memory_gib=0.01,
    )
    return Worker.local(config.for_worker())


def sequences(worker: Worker) -> list[Any]:
    rng = np.random.default_rng(0)
    found: list[Any] = []
    for method, num_tokens in METHODS.values():
        prompt = (3 + rng.integers(0, VOCAB - 3, num_tokens)).tolist()
        retention = Retention.parse(method)
        if retention.propagate is not None and worker.spec.windows:
            continue
        found.append(new_sequence(len(found), prompt, retention=retention))
    return found


def run(worker: Worker, way: str | None) -> tuple[list[list[int]], list[Any]]:
    """Tokens and rows of all sequences after `NUM_STEPS`; by `way` they leave their slots once.

    Meanwhile others take their slots and pages, and they come back into other slots.
    """
    new = sequences(worker)
    slots, tokens = [n.slot for n in new], [n.tokens().tolist() for n in new]

    def execute(plan: StepPlan) -> StepResult:
        result = worker.execute(plan)
        worker.check_integrity()
        assert result.refused == ()
        for sampled in result.sampled:
            if sampled.slot in slots:
                tokens[slots.index(sampled.slot)].append(sampled.token_id)
        return result

    for n in new:
        execute(prefill_plan(worker, [n]))
    for step in range(NUM_STEPS):
        if step == AT and way is not None:
            slots = leave_and_return(worker, way, new, slots, tokens, execute)
        items = tuple(
            DecodeItem(slot, n.prompt_tokens + step) for slot, n in zip(slots, new, strict=True)
        )
        execute(StepPlan(0, decode=items))
    rows = [
        torch.cat(worker.kv.read(slot, layer, head), dim=1)
        for slot in slots
        for layer in range(worker.kv.num_layers)
        for head in range(worker.kv.num_heads)
    ]
    execute(StepPlan(0, free=tuple(slots)))
    assert worker.kv.pages_free == worker.kv.num_pages
    assert len(worker._shard.parked) == 0
    return tokens, rows


def leave_and_return(
    worker: Worker, way: str, new: Any, slots: list[int], tokens: list[list[int]], execute: Any
) -> list[int]:
    sequences_out = worker._shard.parked
    held = worker.kv.num_pages - worker.kv.pages_free
    park = tuple(Parking(slot, 100 + slot, to_host=way == "host") for slot in slots)
    others = [new_sequence(slot, [7 + slot] * 30) for slot in slots]
    worker.execute(replace(prefill_plan(worker, others), park=park, free=tuple(slots)))
    worker.check_integrity()
    assert worker._shard.rings.num_open == 0
    ids = tuple(parking.parked_id for parking in park)
    if way == "pages":
        assert sequences_out.host_bytes < held * worker.kv.page_bytes
        assert len(sequences_out.pages()) == held
    else:
        if way == "offloaded":
            execute(StepPlan(0, offload=(*ids, 99)))  # of 99 nothing is known
        assert len(sequences_out.pages()) == 0
        assert sequences_out.host_bytes >= held * worker.kv.page_bytes
    execute(StepPlan(0, free=tuple(slots)))
    elsewhere = [slots[-1] + 1 + slot for slot in slots]
    back = [
        replace(
            new_sequence(slot, known, retention=n.retention),
            prompt_tokens=n.prompt_tokens,
            resumes=parked_id,
            resumed_tokens=len(known) - 1,
        )
        for n, slot, known, parked_id in zip(new, elsewhere, tokens, ids, strict=True)
    ]
    execute(StepPlan(0, new=tuple(back)))
    return elsewhere


@pytest.fixture(scope="module")
def undisturbed(worker: Worker) -> tuple[list[list[int]], list[Any]]:
    return run(worker, None)


@pytest.mark.parametrize("way", ["host", "pages", "offloaded"])
def test_who_comes_back_goes_on_bit_for_bit(way: str, worker: Worker, undisturbed: Any) -> None:
    tokens, rows = run(worker, way)
    assert tokens == undisturbed[0]
    for got, expected in zip(rows, undisturbed[1], strict=True):
        assert torch.equal(got, expected)


def back(n: Any, slot: int, parked_id: int) -> Any:
    return replace(n, slot=slot, resumes=parked_id, resumed_tokens=n.prompt_tokens)


def test_who_finds_no_pages_stays_parked_until_it_is_dropped(worker: Worker) -> None:
    first, second, *_ = sequences(worker)
    worker.execute(prefill_plan(worker, [first, second]))
    worker._shard.refuse(1)
    both = tuple(Parking(slot, slot) for slot in (0, 1))
    worker.execute(StepPlan(0, park=both, free=(0, 1)))
    left, pool = worker._shard.parked, worker.kv.pool
    assert 0 in left
    assert 1 not in left  # of a slot that was refused nothing is left
    taken = pool.allocate(pool.num_free - 1)
    assert worker.execute(StepPlan(0, new=(back(first, 5, 0),))).refused == (5,)
    assert len(left) == 1
    pool.release(taken)
    worker.execute(StepPlan(0, free=(5,), drop=(0, 1, 77)))
    worker.check_integrity()
    assert len(left) == left.host_bytes == 0
    assert worker.kv.pages_free == worker.kv.num_pages


def test_pages_that_others_hold_are_not_copied(worker: Worker) -> None:
    first = sequences(worker)[0]
    worker.execute(prefill_plan(worker, [first]))
    rows = [worker.kv.read(0, layer, 0)[0] for layer in range(worker.kv.num_layers)]
    worker.kv.fork(0, 1)
    held = worker.kv.num_pages - worker.kv.pages_free
    worker.execute(StepPlan(0, park=(Parking(0, 9),), free=(0,)))
    worker.check_integrity()
    assert worker.kv.num_pages - worker.kv.pages_free == held
    assert worker._shard.parked.host_bytes == 0
    worker.kv.free(1)
    worker.execute(StepPlan(0, new=(back(first, 3, 9),)))
    worker.check_integrity()
    for layer, row in enumerate(rows):
        assert torch.equal(worker.kv.read(3, layer, 0)[0], row)
    worker.execute(StepPlan(0, free=(3,)))
    assert worker.kv.pages_free == worker.kv.num_pages


def test_who_finds_no_host_memory_is_computed_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pages are free all the same, and the worker goes on."""

    def none(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nand more")

    first = sequences(worker)[0]
    monkeypatch.setattr(parked, "to_host", none)
    worker.execute(prefill_plan(worker, [first]))
    worker.execute(StepPlan(0, park=(Parking(0, 5),), free=(0,)))
    worker.check_integrity()
    assert worker.kv.pages_free == worker.kv.num_pages
    assert "lower host_kv_gib (CUDA error: out of memory)" in caplog.text
    prompt = new_sequence(4, first.tokens().tolist())
    for sequence in (back(first, 3, 5), replace(prompt, resumes=5, resumed_tokens=9)):
        plan = replace(prefill_plan(worker, [prompt]), new=(sequence,))
        plan = plan if sequence.slot == 4 else StepPlan(0, new=(sequence,))
        assert worker.execute(plan).refused == (sequence.slot,)
        worker.check_integrity()
    worker.execute(StepPlan(0, free=(3, 4), drop=(5,)))
    assert worker.kv.pages_free == worker.kv.num_pages


def test_page_locked_memory_is_filled() -> None:
    """What a part has more than its bytes is less than an item."""
    for num_items, item_bytes in ((37, 4096), (40_000, 3072), (1, 5), (3, 1 << 26), (0, 8)):
        parts = page_locked_parts(num_items, item_bytes, 1 << 25)
        assert sum(parts) == num_items
        assert parts == sorted(parts, reverse=True)
        for part in parts:
            taken = 1 << (part * item_bytes - 1).bit_length()
            assert part == 1 or taken - part * item_bytes < item_bytes
            assert part == 1 or taken <= 1 << 25
