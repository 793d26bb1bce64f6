"""Short prompts through all layers in one native call, against the same layer by layer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.native.build import unavailable_reason
from saqqara.workers.passes import native_prefill
from saqqara.workers.plan import (
    CachedPrefix,
    DecodeItem,
    NewSequence,
    PrefillGroup,
    SamplingSpec,
    StepPlan,
    StepResult,
)
from saqqara.workers.worker import Worker

REASON = unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")
SAMPLING = SamplingSpec(temperature=0.0, num_logprobs=VOCAB, num_prompt_logprobs=3)
PLAIN = SamplingSpec(temperature=0.0, num_logprobs=VOCAB)
LAYERS, NEW_TOKENS = 3, 9
Pages = dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]]


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "bfloat16", "device": "cpu", "max_num_seqs": 8, "page_tokens": 8}
    config = EngineConfig(
        model=str(folder), linear_backend="native", num_threads=2, **{**defaults, **settings}
    )
    return Worker.local(config.for_worker())


def sequences(
    retention: str | dict[str, Any] | None, lengths: tuple[int, ...], sampling: SamplingSpec = PLAIN
) -> list[NewSequence]:
    rng = np.random.default_rng(len(lengths))
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in lengths]
    kept = Retention.parse(retention)
    return [
        new_sequence(slot, prompt, sampling=sampling, retention=kept)
        for slot, prompt in enumerate(prompts)
    ]


def answers(
    worker: Worker, new: list[NewSequence], ranges: tuple[tuple[int, int], ...] = ((0, LAYERS),)
) -> tuple[list[StepResult], Pages]:
    """Prefill a group in ranges of layers and decode; results, and the pages after prefill."""
    slots = tuple(n.slot for n in new)
    results = []
    for step, (start, stop) in enumerate(ranges):
        arrived = () if step else tuple(new)
        group = PrefillGroup(slots, start, stop)
        results.append(worker.execute(StepPlan(step, new=arrived, prefill=(group,))))
        worker.check_integrity()
    rows = [(s, layer, h) for s in slots for layer in range(LAYERS) for h in range(3)]
    pages = {row: worker.kv.read(*row) for row in rows}
    alive = [n for n in new if n.slot not in results[-1].refused]
    for step in range(NEW_TOKENS):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in alive)
        results.append(worker.execute(StepPlan(step + 9, decode=items)))
        worker.check_integrity()
    worker.execute(StepPlan(99, free=slots))
    return results, pages


def assert_same(
    found: tuple[list[StepResult], Pages], wanted: tuple[list[StepResult], Pages]
) -> None:
    for a, b in zip(found[0], wanted[0], strict=True):
        assert (a.sampled, a.prompts, a.kept) == (b.sampled, b.prompts, b.kept)
        assert (a.refused, a.pages_free) == (b.refused, b.pages_free)
        assert a.prefill_layer_tokens == b.prefill_layer_tokens
    for row, (keys, values) in wanted[1].items():
        assert torch.equal(found[1][row][0], keys), row
        assert torch.equal(found[1][row][1], values), row


def both_ways(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, new: list[NewSequence], **how: Any
) -> list[int]:
    """Assert that one call says what call after call says; the layers of each call."""
    native, sizes = worker._prefill._native, []
    assert native is not None
    step = native._step

    def counted(layers: range, *arguments: Any, **settings: Any) -> tuple[float, ...]:
        sizes.append(len(layers))
        return step(layers, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(native, "_step", counted)
        found = answers(worker, new, **how)
        patch.setattr(worker._prefill, "_native", None)
        wanted = answers(worker, new, **how)
    assert_same(found, wanted)
    return sizes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder)
    return folder


@pytest.fixture(scope="module")
def worker(tiny: Path) -> Worker:
    return make_worker(tiny, linear_chunk_tokens=128)


WINDOW = {"budget": 16, "window": 4}
SNAPKV = {"method": "snapkv", **WINDOW, "decode": {"slack_pages": 1}}


@pytest.mark.parametrize(
    "retention",
    [
        None,
        SNAPKV,
        {"method": "h2o", "budget": 16, "decode": {"slack_pages": 1}},
        {"method": "adakv", **WINDOW},
        {"method": "knorm", **WINDOW, "decode": {"slack_pages": 1}},
    ],
    ids=["full", "snapkv", "h2o", "adakv", "knorm"],
)
@pytest.mark.parametrize("lengths", [(41,), (3, 50, 1, 17)], ids=str)
def test_one_call_says_what_call_after_call_says(
    retention: str | dict[str, Any] | None,
    lengths: tuple[int, ...],
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens, logprobs and kept keys and values, bit for bit, also of prompts shorter than rows."""
    assert both_ways(worker, monkeypatch, sequences(retention, lengths)) == [LAYERS]


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3"])
def test_layers_with_a_window(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts shorter and longer than it; what is kept, cut and decoded is the same layer by layer.

    Rows with a window have its tokens, and the others what their method says. Gemma's layers also
    have caps of scores and norms behind attention and MLP, and rotate by two tables.
    """
    save_tiny(name, tmp_path, num_layers=LAYERS)
    worker = make_worker(tmp_path)
    spec = worker.spec
    native = worker._decode._native
    assert native is not None
    for retention in (None, SNAPKV, {"method": "h2o", "budget": 16, "decode": {"slack_pages": 1}}):
        new = sequences(retention, (3, 50, 1, 17))
        assert both_ways(worker, monkeypatch, new) == [LAYERS]
        found = answers(worker, new)
        monkeypatch.setattr(worker._decode, "_native", None)
        assert_same(answers(worker, new), found)
        monkeypatch.setattr(worker._decode, "_native", native)
        counts = np.frombuffer(found[0][0].kept[1].counts, dtype=np.int32)
        kept = 50 if retention is None else 16
        expected = [[window or kept] * spec.num_kv_heads for window in spec.layers.windows]
        assert counts.reshape(LAYERS, -1).tolist() == expected


def test_prompts_that_are_scored_or_shared(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = sequences(None, (20, 9), SAMPLING)
    prompt = scored[0].tokens().tolist()
    followers = [
        new_sequence(5, prompt, retention=Retention.parse(SNAPKV), shares_prefill_with=0),
        new_sequence(6, prompt, sampling=SAMPLING, shares_prefill_with=0),
    ]
    assert both_ways(worker, monkeypatch, scored) == [LAYERS]
    assert both_ways(worker, monkeypatch, [*scored, *followers]) == [LAYERS]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_prompts_behind_cached_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied or shared, with others in the group; what is stored again has the same bits, too."""
    save_tiny(name, tmp_path, num_layers=LAYERS)
    worker, blocks = make_worker(tmp_path), tuple(range(5))
    [storer] = sequences(None, (46,))
    text = storer.tokens().tolist()
    for retention in (None, SNAPKV, {"method": "adakv", **WINDOW}):
        kept = Retention.parse(retention)
        answers(worker, [replace(storer, retention=kept, prefix=CachedPrefix(stored=blocks))])
        new = [
            new_sequence(slot, [*text[:length], *text[3:9]], sampling=PLAIN, retention=kept)
            for slot, length in enumerate((40, 8, 17))
        ]
        new[0] = replace(new[0], prefix=CachedPrefix(blocks, is_shared=retention is None))
        new[1] = replace(new[1], prefix=CachedPrefix(blocks[:1]))
        assert both_ways(worker, monkeypatch, new) == [LAYERS]
        assert both_ways(worker, monkeypatch, new, ranges=((0, 2), (2, LAYERS))) == [2, 1]
        worker.execute(StepPlan(0, evict=blocks))
    held = []
    native = worker._prefill._native
    for ids, way in ((blocks, native), ((7, 8, 9, 10, 11), None)):
        monkeypatch.setattr(worker._prefill, "_native", way)
        answers(worker, [replace(storer, prefix=CachedPrefix(stored=ids))])
        pages = torch.from_numpy(worker._shard.blocks.pages_of(ids)).long()
        held.append([x[pages] for x in (worker.kv.pool.k_pages, worker.kv.pool.v_pages)])
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))


def test_ranges_of_layers(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a quantum cuts them, and as memory for what is noted does."""
    ranges = ((0, 1), (1, LAYERS))
    for retention in (None, SNAPKV):
        new = sequences(retention, (30, 12))
        assert both_ways(worker, monkeypatch, new, ranges=ranges) == [1, 2]
    monkeypatch.setattr(native_prefill, "NOTED_BYTES", 1)
    assert both_ways(worker, monkeypatch, new) == [1] * LAYERS


def test_what_goes_layer_by_layer(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Long prompts, and methods whose layers choose what enters the next; the log says which."""
    native = worker._prefill._native
    assert native is not None
    too_long = native.max_tokens + 1
    assert both_ways(worker, monkeypatch, sequences(None, (too_long,))) == []
    caplog.set_level("INFO", logger=native_prefill.__name__)
    for _ in range(2):
        assert both_ways(worker, monkeypatch, sequences("pyramidinfer", (30,))) == []
    [message] = caplog.messages
    assert "pyramidinfer" in message


def test_short_of_pages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots that are refused are the same, and hold nothing."""
    page_bytes = 2 * 8 * 16 * 2  # key and value, 8 tokens, head_dim 16, bf16
    room = 6 * LAYERS * 3 * page_bytes  # 6 pages a row, where 30 tokens take 4, and 16 take 2
    small = make_worker(tiny, kv_memory_gib=room / 2**30, max_model_len=40, warmup=False)
    for retention in (None, SNAPKV):
        new = sequences(retention, (30, 30, 29, 5))
        assert both_ways(small, monkeypatch, new) == [LAYERS]
        [prefill, *_], _ = answers(small, new)
        assert 0 < len(prefill.refused) < len(new)
