"""What start-up says that a GPU will hold is what it allocates: a dry run on the `meta` device.

Weights, tables, pages, a prefill step and all recorded steps of real models, without their bytes. A
GPU is 80 GB of which everything that is alive is taken; kernels are not launched, and attention of
prompts allocates what flash attention does.
"""

import gc
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is for Linux only", allow_module_level=True)

from support.peak_bytes import PeakBytes
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from saqqara.cluster.planning.devices import device_of
from saqqara.cluster.planning.memory import (
    CONTEXT_BYTES,
    NCCL_BYTES,
    EngineSizes,
    ReplicaMemory,
    gpu_step_bytes,
)
from saqqara.cluster.planning.models import model_of
from saqqara.cluster.planning.workload import Workload
from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers import fixed_sizes, sizing
from saqqara.workers.attention.base import AttentionBackend
from saqqara.workers.device_steps.device_decode import DeviceDecode
from saqqara.workers.device_steps.device_head import DeviceHead
from saqqara.workers.device_steps.graphs import Graphs
from saqqara.workers.fixed_sizes import graph_sizes
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.models.decoder import Decoder
from saqqara.workers.models.weights import DummyWeights, weight_shapes
from saqqara.workers.part import Choices, Part
from saqqara.workers.plan import SamplingSpec
from saqqara.workers.sampling import device_sampler, sampler
from saqqara.workers.sampling.device_sampler import SampledRow
from saqqara.workers.sampling.sampler import TokenHistory
from saqqara.workers.shard import Shard
from saqqara.workers.state.device_slots import DeviceSlots

META = torch.device("meta")
GPU = device_of("h100-80gb")
SLOTS, TOKENS, PREFILL = 256, 131072, 8192
FULL = Retention.parse("full")
MODELS = [("llama-3-70b", 8, "full"), ("llama-3-8b", 1, "full")]  # with tensor ranks
CUT = {"score": "snapkv", "window": 16, "budget": 1024, "decode": {"slack_pages": 2}}


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
    softcap = 0.0

    def prefill(self, q: Tensor, *_: Any) -> tuple[Tensor, None]:
        normalisers = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        out = torch.empty_like(q)
        del normalisers  # which are not handed on
        return out, None

    def mass(self, q_window: Tensor, k: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty(k.shape[1], len(k), dtype=torch.float32, device=k.device)


class PaperGraphs:
    """Runs what would be recorded, and keeps what recording keeps."""

    def __init__(self, memory: PeakBytes) -> None:
        self._memory = memory
        self._kept: list[Any] = []
        self.temporary: dict[str, int] = {}  # of the largest step, by what it is

    def get(self, _: object) -> None:
        """Nothing is recorded twice."""

    def record(self, key: tuple[str, int], inputs: Any, step: Callable[[], Tensor]) -> None:
        self._memory.peak = before = self._memory.live
        self._kept.append((inputs, step()))
        peak = self._memory.peak - before
        self.temporary[key[0]] = max(peak, self.temporary.get(key[0], 0))


@dataclass
class Rank:
    """One rank that has started on paper."""

    shard: Shard
    memory: PeakBytes

    @property
    def live(self) -> int:
        gc.collect()
        return self.memory.live


@pytest.fixture(params=MODELS, ids=lambda given: given[0])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    name, tensor_size, retention = request.param
    spec = model_of(name).spec
    layout = MeshLayout(tensor_size, 1)
    dtype, ranks = torch.bfloat16, Footprint.of_ranks(spec, torch.bfloat16, layout)
    own, reserved = ranks[0], CONTEXT_BYTES + (NCCL_BYTES if tensor_size > 1 else 0)
    config = WorkerSettings(
        model=name,
        max_model_len=TOKENS,
        max_num_seqs=SLOTS,
        max_prefill_tokens=PREFILL,
        retention=retention,
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
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    with memory:
        mesh = PaperMesh(layout, 0, spec.num_kv_heads, META, ("", 0))
        source = PaperWeights(weight_shapes(spec), dtype, META)
        decoder = Decoder(spec, mesh, own.heads, own.layers, source, TOKENS, "triton")
        part = Part(
            config=config,
            spec=spec,
            device=META,
            dtype=dtype,
            mesh=mesh,
            layers=own.layers,
            heads=own.heads,
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
    assert gpu_step_bytes(ranks[0], sizes, SLOTS) == pytest.approx(step, rel=1e-4)
    assert planned.weight_bytes == held.weight_bytes
    assert planned.pool_bytes == held.pool_bytes
    assert planned.table_bytes == held.table_bytes
    assert planned.activation_bytes == held.temporary_bytes + held.graph_bytes
    assert planned.remembered_bytes == held.remembered_bytes
    # Nothing is left over but less than a page, in which the pool could not grow.
    limit = sizes.memory_utilization * GPU.memory_bytes
    page = ranks[0].page_bytes(16) + 3 * 4
    assert limit - page - 1 < planned.total_bytes <= limit


@pytest.mark.parametrize(
    "rank", [("llama-3-70b", 8, CUT)], indirect=True, ids=lambda given: given[0]
)
def test_recorded_steps_hold_what_was_set_aside(rank: Rank) -> None:
    """Up to what the driver keeps, of which nobody knows. Temporaries share one memory."""
    shard, memory = rank.shard, rank.memory
    part, slots, graphs = shard.part, shard.device_slots, PaperGraphs(memory)
    assert slots is not None
    before, retention = rank.live, Retention.parse(CUT)
    with memory, torch.inference_mode():
        decode = DeviceDecode(shard, slots, cast("Graphs", graphs))  # which has room for queries
        decode.record_all()
        DeviceHead(part.decoder, part.mesh, slots, SLOTS, cast("Graphs", graphs)).record_all()
    counted, largest = part.footprint, graph_sizes(SLOTS)[-1]
    noted = largest * counted.ring_query_bytes()
    assert rank.live - before == counted.recorded_bytes(SLOTS, kinds=2) + noted
    both = [counted.graph_bytes(SLOTS, TOKENS, each) for each in (retention, FULL)]
    assert both[0] - both[1] >= noted
    assert rank.shard.meter.snapshot(0).graph_bytes == both[0]
    for steps, planned in (
        ("decode", largest * counted.scratch_bytes(TOKENS)),
        ("head", counted.recorded_sampling_bytes(largest)),
    ):
        assert 0.97 * planned < graphs.temporary[steps] <= planned * 1.0001, steps


def test_tables_are_not_as_wide_as_the_longest_sequence() -> None:
    """Page tables of 256 slots of 128k: 5.4 GB on one rank if all rows had their full length."""
    [alone] = Footprint.of_ranks(model_of("llama-3-70b").spec, torch.bfloat16, MeshLayout())
    pages = alone.pages_within(60e9, SLOTS, TOKENS, 16, with_mirror=True)
    tables = alone.table_bytes(SLOTS, TOKENS, 16, mirrored_pages=pages)
    assert alone.table_bytes(SLOTS, TOKENS, 16) > 5.3e9
    assert tables < 0.34e9
    assert pages * alone.page_bytes(16) + tables <= 60e9


ROWS, VOCAB, DRAWN, KNOWN = 12, 4096, 4, 70
WIDE = {"temperature": 1000.0, "top_p": 0.999}  # no few candidates suffice: rows are sorted
OTHERS = {"num_logprobs": 20, "logit_bias": ((3, 1.0),), "repetition_penalty": 1.2}
SPECS = [SamplingSpec(seed=row, **WIDE, **OTHERS) for row in range(ROWS)]  # type: ignore[arg-type]
SORT_BYTES = 2 * (8 + 8)  # on a GPU, where the host decides how rows are drawn from


def footprint_of_sampling() -> Footprint:
    spec = replace(model_of("llama-3-8b").spec, vocab_size=VOCAB)
    return Footprint.of_ranks(spec, torch.float32, MeshLayout())[0]


def test_sampling_takes_at_most_what_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of more rows than are drawn from at once."""
    monkeypatch.setattr(sampler, "SAMPLED_LOGITS", DRAWN * VOCAB)
    monkeypatch.setattr(fixed_sizes, "SAMPLED_LOGITS", DRAWN * VOCAB)
    seen = TokenHistory(np.arange(50), np.arange(20))
    logits = torch.randn(ROWS, VOCAB)
    with PeakBytes() as memory:
        sampler.sample(logits, SPECS, [KNOWN] * ROWS, [seen] * ROWS)
    most = footprint_of_sampling().sampler_bytes(ROWS, KNOWN, on_device=False)
    most -= DRAWN * VOCAB * SORT_BYTES
    assert 0.9 * most < logits.nbytes + memory.peak <= most


@pytest.mark.parametrize("wants_more", [False, True])
def test_so_does_sampling_on_the_device(wants_more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampler, "SAMPLED_ROWS", DRAWN)
    monkeypatch.setattr(fixed_sizes, "SAMPLED_ROWS", DRAWN)
    slots = DeviceSlots(ROWS, KNOWN + 1, VOCAB, torch.device("cpu"))
    logits = torch.randn(ROWS, VOCAB)
    decoder = SimpleNamespace(logits=lambda _: logits, spec=SimpleNamespace(vocab_size=VOCAB))
    head = DeviceHead(cast("Decoder", decoder), Mesh(), slots, ROWS, None)
    rows = [SampledRow(row, KNOWN, 50, spec) for row, spec in enumerate(SPECS)]
    if not wants_more:
        rows = [replace(row, spec=SamplingSpec(**WIDE)) for row in rows]  # type: ignore[arg-type]
    with PeakBytes() as memory:
        head.draw(logits, rows, None)
    most = footprint_of_sampling().sampler_bytes(ROWS, KNOWN)
    if not wants_more:  # rows are drawn from as they are, and no copy is made
        most -= logits.nbytes
    assert 0.9 * most < logits.nbytes + memory.peak <= most
