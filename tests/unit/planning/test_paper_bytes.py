"""What start-up says that a GPU will hold is what it allocates: a dry run on the `meta` device.

Weights, tables, pages and a prefill step of real models, without their bytes. A GPU is 80 GB of
which everything that is alive is taken; attention allocates what flash attention does.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.peak_bytes import PeakBytes
from torch import Tensor

from saqqara.cluster.planning.devices import device_of
from saqqara.cluster.planning.memory import (
    CONTEXT_BYTES,
    NCCL_BYTES,
    EngineSizes,
    ReplicaMemory,
)
from saqqara.cluster.planning.models import model_of
from saqqara.cluster.planning.workload import Workload
from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers import sizing
from saqqara.workers.attention.base import AttentionBackend
from saqqara.workers.footprint import DRAWN_BYTES, LOGIT_BYTES, Footprint
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.models.decoder import Decoder
from saqqara.workers.models.weights import DummyWeights, weight_shapes
from saqqara.workers.part import Choices, Part
from saqqara.workers.plan import SamplingSpec
from saqqara.workers.sampling import sampler
from saqqara.workers.sampling.sampler import TokenHistory
from saqqara.workers.shard import Shard

META = torch.device("meta")
GPU = device_of("h100-80gb")
SLOTS, TOKENS, PREFILL = 256, 131072, 8192
FULL = Retention.parse("full")


class PaperWeights(DummyWeights):
    """Weights without numbers."""

    def _copy_slice(self, *_: Any) -> None:
        pass


class PaperMesh(Mesh):
    """A rank whose peers give it tensors of the right sizes."""

    def _connect(self, *_: Any) -> None:
        pass

    def all_gather_last(self, x: Tensor) -> Tensor:
        if self.layout.tensor_size == 1:
            return x
        shards = [torch.empty_like(x) for _ in range(self.layout.tensor_size)]
        return torch.cat(shards, dim=-1)


class PaperAttention:
    """Allocates what the kernels of a GPU return."""

    name = "triton"

    def prefill(self, q: Tensor, *_: Any) -> tuple[Tensor, None]:
        normalisers = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        out = torch.empty_like(q)
        del normalisers  # which are not handed on
        return out, None

    def mass(self, q_window: Tensor, k: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty(k.shape[1], len(k), dtype=torch.float32, device=k.device)


@dataclass
class Rank:
    """One rank that has started on paper."""

    shard: Shard
    memory: PeakBytes

    @property
    def live(self) -> int:
        gc.collect()
        return self.memory.live


@pytest.fixture(params=[("llama-3-70b", 8), ("llama-3-8b", 1)], ids=lambda given: given[0])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    name, tensor_size = request.param
    spec = model_of(name).spec
    layout = MeshLayout(tensor_size, 1)
    dtype, ranks = torch.bfloat16, Footprint.of_ranks(spec, torch.bfloat16, layout)
    footprint, reserved = ranks[0], CONTEXT_BYTES + (NCCL_BYTES if tensor_size > 1 else 0)
    config = WorkerSettings(
        model=name, max_model_len=TOKENS, max_num_seqs=SLOTS, max_prefill_tokens=PREFILL
    )
    memory = PeakBytes()

    def device_memory(_: torch.device) -> tuple[int, int]:
        return int(GPU.memory_bytes) - memory.live - reserved, int(GPU.memory_bytes)

    def peak_bytes(_: torch.device, work: Any) -> int:
        memory.peak = before = memory.live
        work()
        return memory.peak - before

    monkeypatch.setattr(sizing, "device_memory", device_memory)
    monkeypatch.setattr(sizing, "peak_bytes", peak_bytes)
    monkeypatch.setattr(sizing, "why_no_graphs", lambda _: None)
    with memory:
        mesh = PaperMesh(layout, 0, spec.num_kv_heads, META, ("", 0))
        source = PaperWeights(weight_shapes(spec), dtype, META)
        decoder = Decoder(spec, mesh, footprint.heads, footprint.layers, source, TOKENS)
        part = Part(
            config=config,
            spec=spec,
            device=META,
            dtype=dtype,
            mesh=mesh,
            layers=footprint.layers,
            heads=footprint.heads,
            kv_heads_of_ranks=tuple(of.heads.kv for of in ranks),
            max_model_len=TOKENS,
            backend=cast("AttentionBackend", PaperAttention()),
            decoder=decoder,
            choices=Choices("", "", "triton", ""),
        )
        yield Rank(Shard(part), memory)


def test_start_up_holds_what_it_says_and_what_was_planned(rank: Rank) -> None:
    part, held = rank.shard.part, rank.shard.meter.snapshot(0)
    assert rank.live == held.weight_bytes + held.table_bytes + held.pool_bytes
    with rank.memory:
        step = sizing.measure_step(part)
    assert step <= held.temporary_bytes

    spec, layout, workload = part.spec, part.mesh.layout, Workload(4096, 512, FULL)
    ranks = Footprint.of_ranks(spec, torch.bfloat16, layout)
    sizes = EngineSizes(TOKENS, SLOTS, PREFILL)
    [planned, *_] = ReplicaMemory(model_of(part.config.model), GPU, ranks, sizes, workload).at(
        SLOTS
    )
    assert planned.weight_bytes == held.weight_bytes
    assert planned.pool_bytes == held.pool_bytes
    assert planned.table_bytes == held.table_bytes
    assert planned.activation_bytes == held.temporary_bytes + held.graph_bytes
    assert planned.remembered_bytes == held.remembered_bytes
    # Nothing is left over but less than a page, in which the pool could not grow.
    limit = sizes.memory_utilization * GPU.memory_bytes
    page = ranks[0].page_bytes(16) + 3 * 4
    assert limit - page - 1 < planned.total_bytes <= limit


def test_tables_are_not_as_wide_as_the_longest_sequence() -> None:
    """Page tables of 256 slots of 128k: 5.4 GB on one rank if all rows had their full length."""
    [alone] = Footprint.of_ranks(model_of("llama-3-70b").spec, torch.bfloat16, MeshLayout())
    pages = alone.pages_within(60e9, SLOTS, TOKENS, 16, with_mirror=True)
    tables = alone.table_bytes(SLOTS, TOKENS, 16, mirrored_pages=pages)
    assert alone.table_bytes(SLOTS, TOKENS, 16) > 5.3e9
    assert tables < 0.11e9
    assert pages * alone.page_bytes(16) + tables <= 60e9


def test_sampling_takes_at_most_what_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of more rows than are drawn from at once."""
    rows, vocab, drawn = 12, 4096, 4
    monkeypatch.setattr(sampler, "SAMPLED_LOGITS", drawn * vocab)
    seen = TokenHistory(np.arange(50), np.arange(20))
    wide = {"temperature": 1000.0, "top_p": 0.999}  # no few candidates suffice: rows are sorted
    others = {"num_logprobs": 20, "logit_bias": ((3, 1.0),), "repetition_penalty": 1.2}
    logits = torch.randn(rows, vocab)
    with PeakBytes() as memory:
        specs = [SamplingSpec(seed=row, **wide, **others) for row in range(rows)]  # type: ignore[arg-type]
        sampler.sample(logits, specs, [70] * rows, [seen] * rows)
    sort_bytes = 2 * (8 + 8)  # on a GPU
    most = rows * vocab * LOGIT_BYTES + drawn * vocab * (DRAWN_BYTES - sort_bytes)
    assert 0.9 * most < logits.nbytes + memory.peak <= most
