"""The ways that cut all rows of a step, or of a layer, at once keep what is kept length by length.

Keys and values are only moved, and a run goes on from what was kept, so equal stores after several
compactions, bit for bit, mean equal selections in each of them. Scores differ in their last bits,
as sums in another order do; none of these seeds puts a cut between two that are so close.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.compression.scoring import pooled
from saqqara.compression.selecting import kept_positions
from saqqara.configs.schema import EngineConfig
from saqqara.workers.attention.cpu import unavailable_reason
from saqqara.workers.kv.rows import shorten
from saqqara.workers.kv.store import KVStore
from saqqara.workers.native.compact import CutRows, ScoreKind, Scoring, compact
from saqqara.workers.plan import DecodeItem, StepPlan
from saqqara.workers.retain import compact as compaction
from saqqara.workers.retain.compact_natively import compacts_natively
from saqqara.workers.retain.masses import rows_mass
from saqqara.workers.worker import Worker

REASON = unavailable_reason(torch.device("cpu"), torch.bfloat16)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")

LAYERS, HEADS, PAGE, SLACK = 3, 3, 4, 8
PROFILE = {
    f"{layer}-{head}": [float(1 + (layer + head) % 4)] for layer in range(3) for head in range(6)
}
METHODS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 8},
    "pyramidkv": {"window": 5, "pooling": "avg", "kernel_size": 15},
    "headkv": {"window": 8, "profile": PROFILE, "head_beta": 2.0},
    "ada-pyramidkv": {"window": 8},
    "knorm": {"window": 3},
    "streaming": {"window": 3},
    "h2o": {},
    "h2o-adaptive": {"recent_ratio": 0.25},
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder: Path = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder)
    settings = {"dtype": "bfloat16", "device": "cpu", "attention_backend": "cpu"}
    sizes = {"max_num_seqs": 4, "page_tokens": PAGE, "max_model_len": 256}
    return Worker.local(EngineConfig(model=str(folder), **settings, **sizes).for_worker())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_what_the_other_way_keeps(
    method: str, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that fire together and apart; one is shorter than its budget at first."""
    spec = {"method": method, "budget": 20, "sinks": 2, "decode": {"slack_pages": SLACK // PAGE}}
    retention = Retention.parse(spec | METHODS[method])
    rng = np.random.default_rng(1)
    texts = [(3 + rng.permutation(VOCAB - 3)[: n + 3 * SLACK]).tolist() for n in (45, 30, 11)]
    counts = [len(text) - 3 * SLACK for text in texts]
    batch = [
        new_sequence(slot, text[:n], text[n:], retention=retention)
        for slot, (text, n) in enumerate(zip(texts, counts, strict=True))
    ]

    def run(way: str) -> list[torch.Tensor]:
        called = []

        def is_native(*arguments: Any) -> bool:
            called.append(arguments)
            return way == "natively"

        def by_length(shard: Any, index: int, present: Any) -> None:
            compaction._compact_layer(shard, index, present)

        monkeypatch.setattr(compaction, "compacts_natively", is_native)
        compact_rows = by_length if way == "by length" else together
        monkeypatch.setattr(compaction, "_compact_rows", compact_rows)
        worker.execute(prefill_plan(worker, batch))
        for step in range(3 * SLACK):
            items = tuple(DecodeItem(n.slot, n.prompt_tokens + step, sample=False) for n in batch)
            worker.execute(StepPlan(step, decode=items))
            worker.check_integrity()
        assert len(called) >= 3
        rows = [
            torch.cat(worker.kv.read(new.slot, layer, head), dim=1)
            for new in batch
            for layer in range(LAYERS)
            for head in range(HEADS)
        ]
        worker.execute(StepPlan(99, free=tuple(new.slot for new in batch)))
        assert worker.kv.pages_free == worker.kv.num_pages
        return rows

    together = compaction._compact_rows
    expected = run("by length")
    for way in ("together", "natively"):
        for row, (got, want) in enumerate(zip(run(way), expected, strict=True)):
            assert torch.equal(got, want), f"{way}: row {row}"


def test_only_what_it_knows_is_cut_natively(worker: Worker) -> None:
    """Scores that ask other heads, noise, wide kernels and shared pages take the general way."""
    shard = worker._shard

    def takes(method: str, **settings: Any) -> bool:
        budget = {"method": method, "budget": 100, "decode": True}
        return compacts_natively(shard, Retention.parse(budget | settings))

    assert takes("snapkv")
    assert takes("knorm")
    assert not takes("tova")
    assert not takes("random")
    assert not takes("snapkv", kernel_size=65)
    worker.execute(prefill_plan(worker, [new_sequence(0, [5, 6, 7])]))
    worker.kv.fork(0, 1)
    assert not takes("snapkv")
    worker.execute(StepPlan(1, free=(0,)))
    worker.kv.free(1)
    assert takes("snapkv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("window", "group", "dim", "page_tokens", "lengths"),
    [
        (16, 3, 64, 16, (300, 129, 41)),
        (1, 1, 16, 1, (70, 9, 128)),
        (32, 4, 50, 3, (97, 700, 40)),  # several tiles of query rows, ends of vectors
        (9, 2, 256, 16, (4096, 4200, 20)),  # more than is held until the softmax is known
    ],
)
def test_rows_of_any_shape_keep_the_best(
    window: int,
    group: int,
    dim: int,
    page_tokens: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Each head of one layer has another length; values are the numbers of their tokens."""
    generator = torch.Generator().manual_seed(3)
    heads, most, sinks = len(lengths), max(lengths), 2
    sizes = (1, heads, 1, 3 * heads * most // page_tokens + 9, page_tokens, most)
    store = KVStore(*sizes, dim, dtype, torch.device("cpu"))
    q = torch.randn(window, heads * group, dim, generator=generator).to(dtype)
    k = torch.randn(most, heads, dim, generator=generator).to(dtype)
    k[:, :, 0] += torch.linspace(-1, 1, most)[:, None]
    v = torch.zeros(most, heads, dim)
    number = torch.arange(most)[:, None]
    v[:, :, 0], v[:, :, 1] = number % 128, number // 128  # exact in bfloat16
    assert store.write(0, 0, k, v.to(dtype), [torch.arange(n) for n in lengths])
    keep = np.array([max(n // 2, min(n, window + sinks + 1)) for n in lengths])
    places = torch.randperm(window + 3, generator=generator)[:window]
    queries = torch.randn(window + 3, heads * group, dim, generator=generator).to(dtype)
    queries[places] = q
    scoring = Scoring(
        ScoreKind.WINDOW,
        divisor=window * group,
        scale=dim**-0.5,
        window=window,
        kernel_size=5,
        pooling="avg",
        queries=queries,
        places=places[None],
    )
    every = np.arange(heads)
    rows = CutRows(
        first_entry=store.table.first_entry[0, 0],
        length=np.array(lengths),
        keep=keep,
        sinks=np.full(heads, sinks),
        recent=np.full(heads, window),
        sequence=0 * every,
        first_query=every * group * dim,
        first_sum=0 * every,
    )
    pool = store.pool
    compact(pool.k_pages, pool.v_pages, store.table.device_pages, rows, group, scoring)
    shorten(store, np.array([0]), keep.astype(np.int32)[None, None])
    store.check_integrity()
    for head, length in enumerate(lengths):
        of_head = slice(head * group, (head + 1) * group)
        keys = k[:length, head : head + 1]
        mass = rows_mass(q[:, of_head], keys, dim**-0.5)[:, : length - window] / (window * group)
        [best] = kept_positions(pooled(mass, 5, "avg"), int(keep[head]), window, sinks)
        got_k, got_v = store.read(0, 0, head)
        numbers = got_v.float() @ torch.tensor([1.0, 128.0] + [0.0] * (dim - 2))
        assert numbers.long().tolist() == best.tolist()
        assert torch.equal(got_k, keys[best, 0])
