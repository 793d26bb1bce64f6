"""A prompt that goes on behind what its slot's rows kept of the turn before, as conversations do.

Only the tokens that are new are computed. Their queries see what was kept and each other, and
retention chooses again among both.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import GREEDY, new_sequence
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.native.build import unavailable_reason
from saqqara.workers.plan import (
    DecodeItem,
    NewSequence,
    Parking,
    PrefillGroup,
    StepPlan,
    StepResult,
)
from saqqara.workers.worker import Worker

PAGE, SLOT, OTHER = 4, 1, 2
ALL_LOGPROBS = replace(GREEDY, num_logprobs=VOCAB)
FULL = Retention.parse(None)
RNG = np.random.default_rng(7)
FIRST, FED, MORE, SHORT = (RNG.integers(3, VOCAB, n).tolist() for n in (37, 5, 19, 3))
TURN = [*FIRST, *FED]
NO_NATIVE = unavailable_reason()


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "page_tokens": PAGE}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}).for_worker())


class Turns:
    """A worker, and turns of conversations on it; its integrity is proven after each step."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.layers = worker.spec.num_layers
        self.step = 0

    def execute(self, **parts: Any) -> StepResult:
        """One step, that refuses nothing."""
        self.step += 1
        result = self.worker.execute(StepPlan(self.step, **parts))
        self.worker.check_integrity()
        assert not result.refused
        return result

    def first_turn(self, retention: Retention, parked_id: int) -> None:
        """Prefill `FIRST`, feed `FED`, and leave what is kept."""
        new = new_sequence(SLOT, FIRST, FED, retention=retention)
        self.execute(new=(new,), prefill=(PrefillGroup((SLOT,), 0, self.layers),))
        self.execute(decode=(DecodeItem(SLOT, len(FIRST), len(FED), sample=False),))
        self.execute(park=(Parking(SLOT, parked_id, to_host=False),), free=(SLOT,))

    def go_on(
        self, new: list[NewSequence], *stops: int, parked_id: int = 0, fed: int = len(TURN)
    ) -> StepResult:
        """The first of these goes on behind the parked rows, in layer ranges."""
        new[0] = replace(new[0], resumes=parked_id, resumed_tokens=fed)
        slots, taken = tuple(n.slot for n in new), tuple(new)
        for start, stop in zip((0, *stops), (*stops, self.layers), strict=True):
            result = self.execute(new=taken, prefill=(PrefillGroup(slots, start, stop),))
            taken = ()
        return result

    def rows(self, slot: int = SLOT) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each row, layer by layer."""
        kv = self.worker.kv
        places = [(layer, head) for layer in range(kv.num_layers) for head in range(kv.num_heads)]
        return [kv.read(slot, *place) for place in places]

    def logits(self, result: StepResult, slot: int = SLOT) -> torch.Tensor:
        """All tokens' log-probabilities where a slot is sampled."""
        [token] = [token for token in result.sampled if token.slot == slot]
        assert token.logprobs is not None
        order = torch.tensor(token.logprobs.top_ids).argsort()
        return torch.tensor(token.logprobs.top_logprobs)[order]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "mistral"])
def test_rows_that_kept_all_end_as_one_prompt(family: str, tmp_path: Path) -> None:
    """Beside another prompt, in layer ranges; the next steps go on from there, rings too."""
    save_tiny(family, tmp_path)
    turns = Turns(make_worker(tmp_path))
    whole = [*TURN, *MORE]
    for more in (MORE, SHORT):
        whole = [*TURN, *more]
        new = new_sequence(SLOT, whole, sampling=ALL_LOGPROBS)
        other = new_sequence(OTHER, FIRST[:9], sampling=ALL_LOGPROBS)
        seen = []
        for goes_on in (False, True):
            if goes_on:
                turns.first_turn(FULL, parked_id=0)
                result = turns.go_on([new, other], 1)
                assert result.prefill_layer_tokens == (turns.layers - 1) * (len(more) + 9)
            else:
                group = PrefillGroup((SLOT, OTHER), 0, turns.layers)
                result = turns.execute(new=(new, other), prefill=(group,))
            found = [turns.logits(result), turns.logits(result, OTHER)]
            found += [x for slot in (SLOT, OTHER) for row in turns.rows(slot) for x in row]
            for step in range(3):
                item = DecodeItem(SLOT, len(whole) + step)
                found.append(turns.logits(turns.execute(decode=(item,))))
            turns.execute(free=(SLOT, OTHER))
            seen.append(found)
        for one, other_one in zip(*seen, strict=True):
            assert_close(one, other_one)
    assert turns.worker.kv.pages_free == turns.worker.kv.num_pages


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Turns:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder)
    return Turns(make_worker(folder))


@pytest.mark.parametrize("more", [MORE, SHORT], ids=["more", "short"])
def test_rows_of_several_lengths_go_on_beside_windows(more: list[int], tmp_path: Path) -> None:
    """What is fed in steps over the same rows sees the same; of its rows the budget's part stays.

    What each method keeps is shown in `retention/test_turn_suite.py`, of layers that see all.
    """
    save_tiny("gemma3", tmp_path)
    turns = Turns(make_worker(tmp_path))
    retention = Retention.parse({"method": "adakv", "budget": "40%", "sinks": 2, "window": 8})
    whole, layers = [*TURN, *more], turns.worker.spec.layers
    turns.first_turn(retention, parked_id=0)
    fed = new_sequence(SLOT, FIRST, [*FED, *more], sampling=ALL_LOGPROBS, retention=retention)
    turns.execute(new=(replace(fed, resumes=0, resumed_tokens=len(TURN)),))
    item = DecodeItem(SLOT, len(TURN), len(more))
    expected, all_rows = turns.logits(turns.execute(decode=(item,))), turns.rows()
    turns.execute(free=(SLOT,))
    turns.first_turn(retention, parked_id=0)
    new = new_sequence(SLOT, whole, sampling=ALL_LOGPROBS, retention=retention)
    result = turns.go_on([new], 1)
    assert_close(turns.logits(result), expected)
    wanted = retention.layer_tokens(len(whole), layers)
    num_heads = turns.worker.spec.num_kv_heads
    counts = turns.worker.kv.kept(SLOT)
    assert counts.sum(axis=1).tolist() == [num_heads * n for n in wanted]
    assert (counts != counts[:, :1]).any()
    for (k, v), (all_k, all_v) in zip(turns.rows(), all_rows, strict=True):
        places = torch.cdist(k, all_k).argmin(dim=1)
        assert_close(k, all_k[places])
        assert_close(v, all_v[places])
        assert (len(all_k) - places[-8:]).tolist() == [*range(8, 0, -1)]
    turns.execute(decode=(DecodeItem(SLOT, len(whole)),))
    turns.execute(free=(SLOT,))
    assert turns.worker.kv.pages_free == turns.worker.kv.num_pages


def test_a_prompt_that_differs_earlier_goes_on_from_there(turns: Turns) -> None:
    """Rows that have all tokens are cut back to those that it begins with."""
    whole = [*TURN[:30], *MORE]
    new = new_sequence(SLOT, whole, sampling=ALL_LOGPROBS)
    group = PrefillGroup((SLOT,), 0, turns.layers)
    expected = turns.logits(turns.execute(new=(new,), prefill=(group,)))
    turns.execute(free=(SLOT,))
    turns.first_turn(FULL, parked_id=0)
    assert_close(turns.logits(turns.go_on([new], fed=30)), expected)
    turns.execute(free=(SLOT,))
    assert turns.worker.kv.pages_free == turns.worker.kv.num_pages


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_a_turn_from_the_host_is_that_from_pages_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Others have its pages meanwhile, and it comes back into others."""
    save_tiny(family, tmp_path)
    turns = Turns(make_worker(tmp_path))
    for retention in (FULL, Retention.parse({"method": "snapkv", "budget": "40%", "window": 8})):
        seen = []
        for offload in ((), (0,)):
            turns.first_turn(retention, parked_id=0)
            others = [new_sequence(slot, FIRST[::-1]) for slot in (SLOT, OTHER)]
            group = PrefillGroup((SLOT, OTHER), 0, turns.layers)
            turns.execute(offload=offload, new=tuple(others), prefill=(group,))
            assert (turns.worker._shard.parked.host_bytes > 0) == bool(offload)
            turns.execute(free=(SLOT,))
            new = new_sequence(SLOT, [*TURN, *MORE], sampling=ALL_LOGPROBS, retention=retention)
            result = turns.go_on([new], 1)
            seen.append([turns.logits(result), *(x for row in turns.rows() for x in row)])
            turns.execute(free=(SLOT, OTHER))
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert turns.worker._shard.parked.host_bytes == 0
    assert turns.worker.kv.pages_free == turns.worker.kv.num_pages


@pytest.mark.parametrize("offload", [(), (0,)], ids=["pages", "host"])
def test_a_worker_that_is_short_of_pages_refuses_the_turn(
    offload: tuple[int, ...], tmp_path: Path
) -> None:
    save_tiny("llama-gqa", tmp_path)
    rows, page_bytes = 9, PAGE * 2 * 16 * 4
    gib = (rows * 12 + 0.5) * page_bytes / 1024**3
    turns = Turns(make_worker(tmp_path, kv_memory_gib=gib, warmup=False))
    turns.first_turn(FULL, parked_id=0)
    new, other = new_sequence(SLOT, [*TURN, *MORE]), new_sequence(OTHER, FIRST)
    if offload:  # there are too few as it comes, else as it goes on
        group = PrefillGroup((OTHER,), 0, turns.layers)
        turns.execute(offload=offload, new=(other,), prefill=(group,))
    with pytest.raises(AssertionError, match="refused"):
        turns.go_on([new])
    result = turns.execute(free=(SLOT, OTHER) if offload else (SLOT,), drop=(0,))
    assert result.pages_free == rows * 12
    assert turns.worker._shard.parked.host_bytes == 0


@pytest.mark.skipif(NO_NATIVE is not None, reason=f"no native kernels: {NO_NATIVE}")
def test_the_native_call_goes_on_behind_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what call after call says, bit for bit: where all is kept, and where some is."""
    save_tiny("llama-gqa", tmp_path)
    worker = make_worker(tmp_path, dtype="bfloat16", linear_backend="native", num_threads=2)
    turns, native = Turns(worker), worker._prefill._native
    assert native is not None
    for method in ("full", "snapkv", "adakv"):
        cut = {"method": method, "budget": 20, "window": 8}
        retention = FULL if method == "full" else Retention.parse(cut)
        seen = []
        for way in (native, None):
            monkeypatch.setattr(worker._prefill, "_native", native)
            turns.first_turn(retention, parked_id=0)
            monkeypatch.setattr(worker._prefill, "_native", way)
            new = new_sequence(SLOT, [*TURN, *MORE], sampling=ALL_LOGPROBS, retention=retention)
            result = turns.go_on([new, new_sequence(OTHER, FIRST[:9], retention=retention)])
            seen.append([turns.logits(result), *(x for row in turns.rows() for x in row)])
            turns.execute(free=(SLOT, OTHER))
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
