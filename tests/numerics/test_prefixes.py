"""A prompt behind a cached prefix ends like the same prompt computed whole.

Keys of the prefix come from blocks that an earlier prompt filled. What each row keeps then, which
tokens these are, and the tokens that follow are those of the prompt alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.methods import LAYERS, METHODS, PREFILL, WINDOW, Stage
from support.plans import GREEDY, new_sequence
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import (
    CachedPrefix,
    DecodeItem,
    NewSequence,
    PrefillGroup,
    StepPlan,
    StepResult,
)
from saqqara.workers.worker import Worker

PAGE = 4
STEPS = 3
ALL_LOGPROBS = replace(GREEDY, num_logprobs=VOCAB)
FULL = Retention.parse(None)
STORER, HIT, LONG_HIT, MISS = range(4)
BLOCKS = tuple(range(100, 109))
WITHOUT = {
    *("h2o", "h2o-adaptive"),  # they look at all queries of a prompt
    *("pyramidinfer-7b", "pyramidinfer-13b", "pyramidinfer-steep"),  # as pyramidinfer
}
REUSING = [name for name in METHODS if name not in WITHOUT]


def prompts() -> list[list[int]]:
    """Of 39, 32, 45 and 17 tokens; the second begins with 24 of the first's, the third with 36."""
    rng = np.random.default_rng(3)
    first, second, third, other = (
        rng.integers(3, VOCAB, length).tolist() for length in (39, 8, 9, 17)
    )
    return [first, first[:24] + second, first[:36] + third, other]


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": PAGE}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}).for_worker())


class Runs:
    """Steps of a worker; its integrity is proven after each."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.watched = worker.watch_positions()
        self.step = 0

    def execute(self, **parts: Any) -> StepResult:
        """One step."""
        self.step += 1
        result = self.worker.execute(StepPlan(self.step, **parts))
        self.worker.check_integrity()
        return result

    def store(
        self, prompt: list[int], blocks: Sequence[int], retention: Retention = FULL
    ) -> StepResult:
        """Fill blocks with the first tokens of a prompt, which leaves its slot."""
        new = new_sequence(STORER, prompt, retention=retention)
        new = replace(new, prefix=CachedPrefix(stored=tuple(blocks)))
        group = PrefillGroup((STORER,), 0, self.worker.spec.num_layers)
        result = self.execute(new=(new,), prefill=(group,))
        self.execute(free=(STORER,))
        return result

    def run(
        self, new: Sequence[NewSequence], stops: Sequence[int] = (), steps: int = STEPS
    ) -> dict[int, list[torch.Tensor]]:
        """Prefill in layer ranges that end at `stops`, and greedy steps.

        Returns:
            By slot what its rows hold after prefill, which positions these are, and all tokens'
            log-probabilities after each step.
        """
        slots, last = tuple(n.slot for n in new), self.worker.spec.num_layers
        results, taken = [], tuple(new)
        for start, stop in zip([0, *stops], [*stops, last], strict=True):
            group = PrefillGroup(slots, start, stop)
            results.append(self.execute(new=taken, prefill=(group,)))
            taken = ()
        seen = {slot: self._rows(slot) for slot in slots}
        for step in range(steps):
            items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
            results.append(self.execute(decode=items))
        assert not any(result.refused for result in results)
        for token in [token for result in results for token in result.sampled]:
            assert token.logprobs is not None
            ids = torch.tensor(token.logprobs.top_ids)
            table = torch.empty(VOCAB).index_put_((ids,), torch.tensor(token.logprobs.top_logprobs))
            seen[token.slot].append(table)
        self.execute(free=slots)
        return seen

    def _rows(self, slot: int) -> list[torch.Tensor]:
        kv, found = self.worker.kv, []
        for layer in range(kv.num_layers):
            positions = self.watched[slot, layer]
            for head in range(kv.num_heads):
                found += [*kv.read(slot, layer, head), positions[head]]
        return found


def assert_alike(
    got: dict[int, list[torch.Tensor]], expected: dict[int, list[torch.Tensor]]
) -> None:
    """To fp32 rounding: sums are taken over other tiles."""
    assert got.keys() == expected.keys()
    for slot, tensors in expected.items():
        for one, other in zip(got[slot], tensors, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def make_new(
    retention: Retention, *, cached: bool, blocks: tuple[int, ...] = BLOCKS
) -> list[NewSequence]:
    """Hits of different lengths, and between them a prompt that has none."""
    _, hit, long_hit, miss = prompts()
    settings: Any = {"sampling": ALL_LOGPROBS, "retention": retention}
    new = [
        new_sequence(HIT, hit, **settings),
        new_sequence(MISS, miss, **settings),
        new_sequence(LONG_HIT, long_hit, **settings),
    ]
    if cached:
        for number, num_blocks in ((0, 6), (2, 9)):
            length = new[number].prompt_tokens
            least = 0
            if retention.propagate is not None:
                least = retention.propagate.recent_tokens(length)
            num_blocks = min(num_blocks, (length - least) // PAGE)
            new[number] = replace(new[number], prefix=CachedPrefix(blocks[:num_blocks]))
    return new


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A model whose prompts have filled the blocks."""
    folder = tmp_path_factory.mktemp("deep")
    save_tiny("llama-gqa", folder, num_layers=LAYERS)
    made = Runs(make_worker(folder))
    made.store(prompts()[0], BLOCKS)
    return made


@pytest.mark.parametrize("method", REUSING)
def test_each_method_keeps_the_same(method: str, runs: Runs) -> None:
    """Also where rows are cut again while they decode, by queries from before the first step."""
    assert len(prompts()[1]) - 24 == WINDOW, "no token more is computed than looked at"
    decode, blocks, worker = METHODS[method].decode, BLOCKS, runs.worker
    stages = [Stage(6, slack_pages=1)] if "slack" in decode else []
    stages += [Stage(8, trigger="stored", exceed=3)] if "stored" in decode else []
    free = worker.kv.pages_free
    if METHODS[method].retention(method, PREFILL).propagate is not None:
        # Blocks of their own, which have hidden states behind the first cut.
        blocks = tuple(range(600, 609))
        runs.store(prompts()[0], blocks, METHODS[method].retention(method, PREFILL))
    for stage in (PREFILL, *stages):
        retention = METHODS[method].retention(method, stage)
        steps = stage.num_steps
        expected = runs.run(make_new(retention, cached=False), steps=steps)
        found = runs.run(make_new(retention, cached=True, blocks=blocks), [2], steps=steps)
        assert_alike(found, expected)
    runs.execute(evict=tuple({*blocks} - {*BLOCKS}))
    assert worker.kv.pages_free == free


@pytest.mark.parametrize("max_prefill_tokens", [2048, 24])
def test_cuts_take_hidden_states_from_blocks(max_prefill_tokens: int, tmp_path: Path) -> None:
    """Of hits that store more, of their followers, and of groups whose keys exist in parts."""
    save_tiny("llama-gqa", tmp_path, num_layers=LAYERS)
    made = Runs(make_worker(tmp_path, max_prefill_tokens=max_prefill_tokens))
    fastkv = METHODS["fastkv"].retention("fastkv", PREFILL)
    follows = Retention.parse({"propagate": fastkv.propagate})
    first, hit, long_hit, miss = prompts()
    settings: Any = {"sampling": ALL_LOGPROBS, "retention": fastkv}
    new = [
        new_sequence(0, long_hit, **settings),
        new_sequence(1, long_hit, sampling=ALL_LOGPROBS, retention=follows, shares_prefill_with=0),
        new_sequence(2, miss, **settings),
        new_sequence(3, hit, **settings),
        new_sequence(4, first, **settings),
    ]
    expected = made.run(new)
    made.store(first, BLOCKS[:6], fastkv)
    new[0] = replace(new[0], prefix=CachedPrefix(BLOCKS[:6], BLOCKS[6:]))
    new[3] = replace(new[3], prefix=CachedPrefix(BLOCKS[:5]))
    assert_alike(made.run(new), expected)
    new[0] = replace(new[0], prefix=CachedPrefix(BLOCKS))
    new[4] = replace(new[4], prefix=CachedPrefix(BLOCKS[:7]))
    assert_alike(made.run(new, [1, 2]), expected)
    group = PrefillGroup((0,), 0, LAYERS)
    result = made.execute(new=(new[0],), prefill=(group,))
    above = fastkv.entering_tokens(len(long_hit), LAYERS)[2:]
    assert result.prefill_layer_tokens == 2 * 9 + sum(above)
    made.execute(free=(0,), evict=BLOCKS)
    assert made.worker.kv.pages_free == made.worker.kv.num_pages


def test_keys_of_many_hits_exist_in_parts(tmp_path: Path, runs: Runs) -> None:
    """No more of them at once than of a group that is computed whole."""
    save_tiny("llama-gqa", tmp_path, num_layers=LAYERS)
    small = Runs(make_worker(tmp_path, max_prefill_tokens=64))
    small.store(prompts()[0], BLOCKS)
    snapkv = METHODS["snapkv"].retention("snapkv", PREFILL)
    expected = runs.run(make_new(snapkv, cached=False))
    new = [replace(n, slot=n.slot + 3) for n in make_new(snapkv, cached=True)]
    new += make_new(snapkv, cached=True)
    found = small.run(new)
    for offset in (0, 3):
        assert_alike({slot: found[slot + offset] for slot in expected}, expected)
    kv, peak = small.worker.kv, small.execute().memory.prefill_kv_bytes_peak
    rows = sum(snapkv.layer_tokens(len(n.tokens()), LAYERS)[0] for n in new) // PAGE + len(new)
    most = (64 + 66) * kv.page_bytes * kv.num_heads // PAGE  # reused and fresh, and fresh of all
    assert peak <= most + rows * LAYERS * kv.num_heads * kv.page_bytes


def test_only_what_follows_is_computed(runs: Runs) -> None:
    """And what is stored takes its pages at once and gives them back with the block."""
    worker = runs.worker
    before = worker.kv.pages_free
    new = make_new(FULL, cached=True)
    slots = tuple(n.slot for n in new)
    group = PrefillGroup(slots, 0, LAYERS)
    new[1] = replace(new[1], prefix=CachedPrefix(stored=(200, 201)))
    result = runs.execute(new=tuple(new), prefill=(group,))
    assert result.prefill_layer_tokens == LAYERS * (8 + 17 + 9)
    kept = np.frombuffer(result.kept[0].counts, dtype=np.int32)
    assert (kept == len(prompts()[1])).all()
    runs.execute(free=slots)
    rows = worker.kv.num_layers * worker.kv.num_heads
    assert worker.kv.pages_free == before - 2 * rows
    runs.execute(evict=(200, 201, 777))
    assert worker.kv.pages_free == before


def test_kernels_read_blocks_and_share_their_pages(tmp_path: Path) -> None:
    """In Triton's interpreter."""
    pytest.importorskip("triton")
    save_tiny("llama-gqa", tmp_path, num_layers=1)
    prompt, snapkv = prompts()[0][:21], METHODS["snapkv"].retention("snapkv", PREFILL)
    found = []
    for backend in ("torch", "triton"):
        made = Runs(make_worker(tmp_path, attention_backend=backend, warmup=False))
        made.store(prompt, BLOCKS[:3])
        new = [new_sequence(s, prompt, sampling=ALL_LOGPROBS) for s in (HIT, MISS)]
        new[0] = replace(new[0], prefix=CachedPrefix(BLOCKS[:3], is_shared=True))
        new[1] = replace(new[1], prefix=CachedPrefix(BLOCKS[:3]), retention=snapkv)
        found.append(made.run(new, steps=1))
        assert made.worker.kv.num_pages - made.worker.kv.pages_free == 3 * made.worker.kv.num_heads
    assert_alike(found[1], found[0])


def test_rows_that_keep_all_share_the_pages(runs: Runs) -> None:
    """They outlive the blocks, and are written by nobody."""
    kv, own_blocks = runs.worker.kv, tuple(range(500, 506))
    free, rows = kv.pages_free, kv.num_layers * kv.num_heads
    expected = runs.run(make_new(FULL, cached=False))
    new = make_new(FULL, cached=True)
    for number in (0, 2):
        prefix = replace(new[number].prefix or CachedPrefix(), is_shared=True)
        new[number] = replace(new[number], prefix=prefix)
    assert_alike(runs.run(new), expected)
    assert kv.pages_free == free
    # The same with blocks that go before the rows.
    taken = replace(new_sequence(STORER, prompts()[0]), prefix=CachedPrefix(stored=own_blocks))
    group = PrefillGroup((STORER,), 0, LAYERS)
    runs.execute(new=(taken,), prefill=(group,))
    runs.execute(free=(STORER,))
    hit = replace(new[0], prefix=CachedPrefix(own_blocks, is_shared=True))
    runs.execute(new=(hit,), prefill=(replace(group, slots=(HIT,)),))
    assert kv.pages_free == free - rows * len(prompts()[1]) // PAGE
    runs.execute(evict=own_blocks)
    assert kv.pages_free == free - rows * len(prompts()[1]) // PAGE
    step = runs.execute(decode=(DecodeItem(HIT, hit.prompt_tokens),))
    [token] = [t for t in step.sampled if t.slot == HIT]
    assert token.logprobs is not None
    order = torch.tensor(token.logprobs.top_ids).argsort()
    got = torch.tensor(token.logprobs.top_logprobs)[order]
    torch.testing.assert_close(got, expected[HIT][-STEPS], atol=2e-4, rtol=1e-4)
    runs.execute(free=(HIT,))
    assert kv.pages_free == free


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen3-moe", "qwen2-moe"])
def test_windows_and_experts(family: str, tmp_path: Path) -> None:
    """Rings hold the same last tokens, with the prefix's among them, and go on from there."""
    save_tiny(family, tmp_path)
    made = Runs(make_worker(tmp_path))
    made.store(prompts()[0], BLOCKS)
    snapkv = METHODS["snapkv"].retention("snapkv", PREFILL)
    for retention in (FULL,) if family == "mistral" else (FULL, snapkv):
        expected = made.run(make_new(retention, cached=False), steps=9)
        assert_alike(made.run(make_new(retention, cached=True), steps=9), expected)


def test_a_hit_that_stores_more_and_its_followers(runs: Runs) -> None:
    """A prompt behind blocks fills the next ones, also for those that share its prefill."""
    _, _, long_hit, _ = prompts()
    snapkv = METHODS["snapkv"].retention("snapkv", PREFILL)
    settings: Any = {"sampling": ALL_LOGPROBS}
    leader = new_sequence(HIT, long_hit, **settings)
    follower = new_sequence(MISS, long_hit, retention=snapkv, shares_prefill_with=HIT, **settings)
    expected = runs.run([leader, follower])
    stored = tuple(range(300, 305))
    prefix = CachedPrefix(BLOCKS[:6], stored)
    assert_alike(runs.run([replace(leader, prefix=prefix), follower]), expected)
    # With one block more the window's first queries would be missing.
    prefix = CachedPrefix((*BLOCKS[:6], *stored))
    new = (replace(leader, prefix=prefix), follower)
    group = PrefillGroup((HIT, MISS), 0, LAYERS)
    result = runs.execute(new=new, prefill=(group,))
    assert [fault.slot for fault in result.faults] == [MISS]
    assert [token.slot for token in result.sampled] == [HIT]
    runs.execute(free=(HIT, MISS), evict=stored)


def test_a_worker_that_is_short_of_pages_holds_no_blocks(tmp_path: Path) -> None:
    """It refuses the slot, and gives up nothing else; others are computed on."""
    save_tiny("llama-gqa", tmp_path)
    rows, page_bytes = 9, PAGE * 2 * 16 * 4
    first, hit, _, other = prompts()
    pages = rows * 12  # the first prompt fills 10 pages of a row
    gib = (pages + 0.5) * page_bytes / 1024**3
    made = Runs(make_worker(tmp_path, kv_memory_gib=gib, warmup=False))
    group = PrefillGroup((STORER,), 0, 3)
    many = tuple(range(13))
    new = replace(new_sequence(STORER, first), prefix=CachedPrefix(stored=many))
    result = made.execute(new=(new,), prefill=(group,))
    assert result.refused == (STORER,)
    assert made.worker.kv.pages_free == pages
    made.execute(free=(STORER,), evict=many)
    # Here its blocks fit, but its own rows do not.
    new = replace(new_sequence(STORER, first), prefix=CachedPrefix(stored=BLOCKS[:3]))
    result = made.execute(new=(new,), prefill=(group,))
    assert result.refused == (STORER,)
    assert result.sampled == ()
    assert made.worker.kv.pages_free == pages - 3 * rows
    made.execute(free=(STORER,), evict=BLOCKS[:3])
    # And a hit whose rows find too few pages leaves its blocks alone.
    made.store(other, BLOCKS[:4])
    longer = [*other[:16], *hit]
    new = replace(new_sequence(HIT, longer), prefix=CachedPrefix(BLOCKS[:4]))
    result = made.execute(new=(new,), prefill=(replace(group, slots=(HIT,)),))
    assert result.refused == (HIT,)
    made.execute(free=(HIT,))
    short = new_sequence(HIT, other, sampling=ALL_LOGPROBS)
    expected = made.run([short], steps=1)
    assert_alike(made.run([replace(short, prefix=CachedPrefix(BLOCKS[:4]))], steps=1), expected)


def test_tokens_that_the_model_lacks_fill_no_blocks(runs: Runs) -> None:
    free = runs.worker.kv.pages_free
    strange = [*prompts()[0][:20], VOCAB + 7]
    new = replace(new_sequence(HIT, strange), prefix=CachedPrefix(BLOCKS[:2], (400, 401)))
    group = PrefillGroup((HIT,), 0, LAYERS)
    result = runs.execute(new=(new,), prefill=(group,))
    assert [fault.slot for fault in result.faults] == [HIT]
    runs.execute(free=(HIT,), evict=(400, 401))
    assert runs.worker.kv.pages_free == free
