"""What lies in a rank's memory, and how many sequences fit into a replica.

Weights, pages, tables, rings and sums are counted as the engine counts them, so they are exact.
A GPU's engine measures a step's activations when it starts; here they are an estimate, and so is
what the driver takes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from saqqara.cluster.scheduling.demand import Demand, demand_of
from saqqara.cluster.scheduling.seats import WATERMARK
from saqqara.configs.worker_settings import MAX_NUM_SEQS
from saqqara.workers.footprint import GIB, Footprint, replica_rows
from saqqara.workers.models.choice import why_not_triton
from saqqara.workers.plan import WorkerInfo, WorkerMemory

from .devices import Device
from .models import PlannedModel
from .workload import Workload

CONTEXT_BYTES = 600 << 20  # of CUDA and its libraries, in a process
NCCL_BYTES = 400 << 20  # of its channels, where ranks exchange data
_WINDOW_QUERIES = 64
_CPU_SHARE, _CPU_MAX_BYTES = 0.3, 4 * GIB
_FLOAT_BYTES = 4
_POSITION_BYTES = 8


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """Settings of the engine that memory depends on; names and defaults as `EngineConfig`'s.

    `max_num_seqs` None: as many as fit.
    """

    max_model_len: int
    max_num_seqs: int | None = None
    max_prefill_tokens: int = 2048
    linear_chunk_tokens: int = 2048
    page_tokens: int = 16
    memory_utilization: float = 0.9
    kv_memory_gib: float | None = None


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank.

    Attributes:
        weight_bytes: of its part of the model.
        pool_bytes: of its pages, `num_pages` of them.
        activation_bytes: of the largest step, and of recorded graphs; an estimate.
        table_bytes: of page tables, lengths, rotary angles, and what a GPU knows of slots.
        remembered_bytes: of the queries and sums that a decode stage goes by.
        reserved_bytes: of the driver and its libraries; an estimate.
    """

    rank: int
    stage: int
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    num_pages: int
    weight_bytes: int
    pool_bytes: int
    activation_bytes: int
    table_bytes: int
    remembered_bytes: int
    reserved_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        held = self.weight_bytes + self.pool_bytes + self.activation_bytes + self.table_bytes
        return held + self.remembered_bytes + self.reserved_bytes


@dataclass(frozen=True)
class ReplicaMemory:
    """One replica of a model on a device, and what a workload needs there."""

    model: PlannedModel
    device: Device
    ranks: tuple[Footprint, ...]
    sizes: EngineSizes
    workload: Workload

    def at(self, max_num_seqs: int) -> tuple[RankMemory, ...]:
        """What every rank holds with so many slots."""
        return tuple(self._rank(rank, max_num_seqs) for rank in self.ranks)

    def most_sequences(self) -> int:
        """Sequences that can all be at their end at once, so that none is ever preempted.

        0 where not even one fits.
        """
        low, high = 0, self.sizes.max_num_seqs or MAX_NUM_SEQS
        slots = self.sizes.max_num_seqs  # a number that is set is paid for, used or not
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(middle, slots or middle):
                low = middle
            else:
                high = middle - 1
        return low

    def fits(self, num_seqs: int, max_num_seqs: int) -> bool:
        """Whether so many sequences fit into an engine of so many slots."""
        kinds, kind_W = self.kinds
        held = [self._rank(rank, max_num_seqs) for rank in kinds]
        if any(rank.total_bytes > self.device.memory_bytes for rank in held):
            return False
        if any(of.num_pages < rank.num_rows for of, rank in zip(held, kinds, strict=True)):
            return False  # the engine refuses to start
        pages_W = np.array([rank.num_pages for rank in held])[kind_W]
        spare = pages_W // WATERMARK if num_seqs > 1 else 0
        at_end = num_seqs * self.demand.most(self.workload.fed_tokens)
        admitted = num_seqs * self.demand.most(0) + spare
        return bool((at_end <= pages_W).all() and (admitted <= pages_W).all())

    @cached_property
    def demand(self) -> Demand:
        """Pages of one sequence, by rank, as the ledger charges them."""
        workload = self.workload
        return demand_of(workload.retention, workload.prompt_tokens, self.worker_infos(1))

    def worker_infos(self, max_num_seqs: int) -> list[WorkerInfo]:
        """The ranks as the scheduler would see them."""
        sizes = self.sizes
        return [
            worker_info(rank, self.device, held, sizes.page_tokens, sizes.max_model_len)
            for rank, held in zip(self.ranks, self.at(max_num_seqs), strict=True)
        ]

    @cached_property
    def kinds(self) -> tuple[list[Footprint], list[int]]:
        """Ranks that differ in size, one of each kind; and the kind of every rank."""
        kinds: dict[tuple[object, ...], int] = {}
        examples: list[Footprint] = []
        kind_W: list[int] = []
        for rank in self.ranks:
            sizes = (rank.layers, len(rank.heads.kv), len(rank.heads.query), rank.num_channels)
            key = (*sizes, rank.tensor_rank == 0)  # the first has biases that others have not
            if key not in kinds:
                kinds[key] = len(examples)
                examples.append(rank)
            kind_W.append(kinds[key])
        return examples, kind_W

    @cached_property
    def _replica_rows(self) -> int:
        return replica_rows(self.ranks)

    def why_not(self) -> str:
        """Why not one sequence fits."""
        held = max(self.at(1), key=lambda rank: rank.total_bytes - rank.pool_bytes)
        fixed = held.total_bytes - held.pool_bytes
        whose = f"rank {held.rank} of {len(self.ranks)}"
        usable = self.device.memory_bytes * self.sizes.memory_utilization
        if fixed > usable:
            return (
                f"weights ({held.weight_bytes / GIB:.1f} GiB on {whose}) and what a step takes "
                f"need {fixed / GIB:.1f} of {usable / GIB:.1f} GiB"
            )
        needed = int(self.demand.most(self.workload.fed_tokens)[held.rank])
        return f"a sequence takes {needed} pages on {whose}, which has {held.num_pages}"

    def _rank(self, rank: Footprint, max_num_seqs: int) -> RankMemory:
        sizes, is_gpu = self.sizes, self.device.kind == "cuda"
        is_fused = is_gpu and why_not_triton(rank.spec) is None
        counts = (max_num_seqs, sizes.max_model_len, sizes.page_tokens)
        alone = rank.layout.world_size == 1
        fixed = rank.rotary_bytes(sizes.max_model_len)
        if is_fused:  # and samples on the device
            fixed += rank.slot_bytes(max_num_seqs, sizes.max_model_len)
        held = RankMemory(
            rank=rank.rank,
            stage=rank.layout.pipeline_rank(rank.rank),
            layers=(rank.layers.start, rank.layers.stop),
            kv_heads=(rank.heads.kv.start, rank.heads.kv.stop),
            num_pages=0,
            weight_bytes=rank.weight_bytes(),
            pool_bytes=0,
            activation_bytes=temporary_bytes(rank, sizes, max_num_seqs, is_fused)
            + (rank.graph_bytes(*counts[:2], self.workload.retention) if is_fused else 0),
            table_bytes=fixed,
            remembered_bytes=rank.rings_and_sums_bytes(self.workload.retention, *counts),
            reserved_bytes=(CONTEXT_BYTES + (0 if alone else NCCL_BYTES)) if is_gpu else 0,
        )
        # As `workers/sizing.py`: page tables share what `memory_utilization` leaves with the pool.
        pool = self._pool_bytes(rank, held.total_bytes)
        shares = is_gpu and sizes.kv_memory_gib is None
        pages = max(rank.pages_within(pool, *counts, with_mirror=shares), 0)
        tables = rank.table_bytes(*counts, mirrored_pages=pages if is_gpu else None)
        return replace(
            held,
            num_pages=pages,
            pool_bytes=pages * rank.page_bytes(sizes.page_tokens),
            table_bytes=tables + fixed,
        )

    def _pool_bytes(self, rank: Footprint, others: int) -> float:
        """Bytes that the pool may have beside what else lies there."""
        sizes, memory = self.sizes, self.device.memory_bytes
        of_replica = rank.num_rows / self._replica_rows
        if sizes.kv_memory_gib is not None:
            return sizes.kv_memory_gib * GIB * of_replica
        if self.device.kind == "cuda":
            return sizes.memory_utilization * memory - others
        return min(_CPU_MAX_BYTES, _CPU_SHARE * memory) * of_replica


def temporary_bytes(rank: Footprint, sizes: EngineSizes, max_num_seqs: int, is_fused: bool) -> int:
    """Bytes that a step takes at most: its activations, or what sampling takes after them."""
    hidden = sizes.max_prefill_tokens * rank.spec.hidden_size * rank.dtype.itemsize
    sampling = rank.sampler_bytes(max_num_seqs, sizes.max_model_len, on_device=is_fused)
    of_layer = gpu_step_bytes if is_fused else step_bytes
    return max(of_layer(rank, sizes, max_num_seqs), sampling + 3 * hidden)


def gpu_step_bytes(rank: Footprint, sizes: EngineSizes, max_num_seqs: int) -> int:
    """`step_bytes` of layers that rotate where they are and keep little between their products."""
    spec, size, tokens = rank.spec, rank.dtype.itemsize, sizes.max_prefill_tokens
    queries, is_alone = len(rank.heads.query), rank.layout.tensor_size == 1
    hidden = spec.hidden_size * size
    fused = (queries + 2 * len(rank.heads.kv)) * spec.head_dim * size
    attended = tokens * (fused + queries * spec.head_dim * size)
    chunk, inner = min(tokens, sizes.linear_chunk_tokens), rank.num_channels * size
    finish = 2 * hidden + 3 * inner  # sum, normed, gate and up, activated
    if not is_alone:
        finish = max(finish, 3 * hidden + inner)  # and the part of the sum over ranks
    logits = 0
    if rank.is_last_stage:
        product = max((1 if is_alone else 2) * size, size + _FLOAT_BYTES)  # gathered, in float32
        logits = max_num_seqs * (spec.vocab_size * product + hidden)
    prefill = attended + tokens * queries * _FLOAT_BYTES  # normalisers
    step = max(tokens * (hidden + fused), prefill, attended + max(chunk * finish, logits))
    # Hidden states as in `step_bytes`, and positions.
    return step + tokens * (3 * hidden + _POSITION_BYTES)


def step_bytes(rank: Footprint, sizes: EngineSizes, max_num_seqs: int) -> int:
    """Bytes of the largest step's activations, an estimate of what `sizing.measure_step` finds."""
    spec, size, tokens = rank.spec, rank.dtype.itemsize, sizes.max_prefill_tokens
    queries, rows = len(rank.heads.query), len(rank.heads.query) + 2 * len(rank.heads.kv)
    hidden = spec.hidden_size * size
    fused, own = rows * spec.head_dim * size, queries * spec.head_dim * size
    kinds = len({spec.rope_of(layer) for layer in rank.layers})
    angles = kinds * 2 * spec.head_dim * _FLOAT_BYTES
    rotation = 2 * queries * spec.head_dim * _FLOAT_BYTES + own  # product, sum, swapped halves
    project = tokens * (fused + angles + max(hidden, rotation))
    rotated = own + len(rank.heads.kv) * spec.head_dim * size  # beside the fused product
    attended = tokens * (fused + rotated + own + queries * _FLOAT_BYTES + angles)
    chunk = min(tokens, sizes.linear_chunk_tokens)
    mlp = 3 * rank.num_channels * size  # gate and up, and what they make
    if spec.experts is not None:  # a copy of the token for each expert, and what comes of it, wide
        mlp += spec.experts.per_token * (2 * hidden + spec.hidden_size * _FLOAT_BYTES)
    finish = chunk * (3 * hidden + mlp)
    logits = 0
    if rank.is_last_stage:
        copies = size + (_FLOAT_BYTES if size < _FLOAT_BYTES else 0)
        copies += size if rank.layout.tensor_size > 1 else 0  # what is gathered
        logits = max_num_seqs * (spec.vocab_size * copies + hidden)
    # Hidden states, and those of another group that may be parked beside the one in work.
    return int(max(project, attended + max(finish, logits)) + 3 * tokens * hidden)


def worker_info(
    rank: Footprint, device: Device, held: RankMemory, page_tokens: int, max_model_len: int
) -> WorkerInfo:
    """A rank as its worker would introduce itself."""
    nothing = "planned"
    return WorkerInfo(
        rank=rank.rank,
        pipeline_rank=held.stage,
        tensor_rank=rank.tensor_rank,
        start_layer=rank.layers.start,
        stop_layer=rank.layers.stop,
        start_head=rank.heads.kv.start,
        stop_head=rank.heads.kv.stop,
        num_pages=held.num_pages,
        page_tokens=page_tokens,
        page_bytes=rank.page_bytes(page_tokens),
        device=device.name,
        dtype=nothing,
        dtype_reason=nothing,
        attention_backend=nothing,
        attention_reason=nothing,
        linear_backend=nothing,
        linear_reason=nothing,
        memory=WorkerMemory(weight_bytes=held.weight_bytes, pool_bytes=held.pool_bytes),
        hostname=nothing,
        pid=0,
        max_model_len=max_model_len,
        windows=rank.spec.windows,
        ring_query_bytes=rank.ring_query_bytes(),
        ring_normaliser_bytes=rank.ring_normaliser_bytes(),
        hidden_bytes=rank.spec.hidden_size * rank.dtype.itemsize,
    )
