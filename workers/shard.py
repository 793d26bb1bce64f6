"""What one rank holds: its part of the model, of the KV pages, and its place in the mesh.

`Worker` executes plans on it, `prefill.Prefill` and `decode.Decode` are the two ways through its
layers.
"""

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.decode import DecodeStage
from saqqara.compression.growth import (
    Cycle,
    TrimmedRows,
    cycle_of,
    most_ring_size,
    remembers_normalisers,
    ring_size,
    sums_mass,
    trimmed_rows,
)
from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings

from .attention.base import get_backend
from .clock import StepClock
from .device_decode import graph_bytes
from .faults import Faults
from .host_memory import check_threads
from .kv.store import KVStore
from .layout import MeshLayout, head_shard, layer_split
from .mass_sums import MassSums
from .memory import (
    MemoryMeter,
    choose_device,
    choose_dtype,
    pool_pages,
    reuse_freed_memory,
)
from .mesh import Mesh
from .models.decoder import Decoder, choose_linear_backend
from .models.spec import load_spec
from .models.weights import open_weights
from .plan import NewSequence, WorkerInfo
from .rings import NORMALISER_BYTES, QueryRings
from .slots import SlotTable
from .step_size import measure_step
from .transfer import to_device

logger = logging.getLogger(__name__)

# The head runs for sampled positions only, so in a step that also prefills it costs a part of what
# its weights, counted in layers, would suggest.
HEAD_SHARE = 0.25


class Shard:
    """Everything that lives as long as its worker; arguments and errors as `Worker`'s.

    Attributes:
        layers: numbers of this rank's layers in the whole model.
        heads: this rank's query and kv heads.
        refused: slots whose tokens did not fit; this rank holds nothing of them.
        faults: those of them whose sequences cannot go on.
        cycles: when the rows of a slot are compacted, for the slots with a decode stage.
        trimmed: how long the rows of a slot are, for the slots that are trimmed instead.
        after_prefill: what prefill selected for the slots in `cycles`, refused or not: int32
            [local layers, local kv heads].
        clock: time spent in the current step, by phase.
    """

    def __init__(
        self, config: WorkerSettings, layout: MeshLayout, rank: int, store: tuple[str, int] | None
    ) -> None:
        if config.num_threads is not None:
            check_threads(config.num_threads)
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.spec = load_spec(config.model)
        self.device = choose_device(config, rank)
        if self.device.type == "cpu":
            reuse_freed_memory()
        self.dtype, self._dtype_reason = choose_dtype(config, self.device)
        self.backend, self._attention_reason = get_backend(
            config.attention_backend, self.device, self.dtype
        )
        self._linear_backend, self._linear_reason = choose_linear_backend(
            config.linear_backend, self.device, self.dtype
        )
        self.max_model_len = config.max_model_len or self.spec.max_position
        self.scale = self.spec.head_dim**-0.5
        all_heads = [
            head_shard(self.spec.num_query_heads, self.spec.num_kv_heads, layout.tensor_size, t)
            for t in range(layout.tensor_size)
        ]
        self.heads = all_heads[layout.tensor_rank(rank)]
        self._kv_heads_of_ranks = [heads.kv for heads in all_heads]
        self.layers = layer_split(
            self.spec.num_layers,
            layout.pipeline_size,
            HEAD_SHARE * self.spec.head_layers,
            config.layer_split,
        )[layout.pipeline_rank(rank)]
        self.mesh = Mesh(layout, rank, self.spec.num_kv_heads, self.device, store)
        self.decoder = self._load_decoder()
        self.slots = SlotTable(config.max_num_seqs, self.max_model_len + 1)
        self.meter = MemoryMeter(self.decoder.weight_bytes())
        self.refused: set[int] = set()
        self.faults = Faults(self._give_up, is_alone=layout.tensor_size == 1)
        self.cycles: dict[int, Cycle] = {}
        self.trimmed: dict[int, TrimmedRows] = {}
        self.after_prefill: dict[int, NDArray[np.int32]] = {}
        self.clock = StepClock()
        self.kv = self._make_pool(sum(len(heads.kv) for heads in all_heads))
        self.meter.pool_bytes = self.kv.num_pages * self.kv.page_bytes
        self.rings = QueryRings(
            config.max_num_seqs,
            len(self.layers),
            len(self.heads.query),
            self.spec.head_dim,
            self.dtype,
            self.device,
        )
        self.sums = MassSums(config.max_num_seqs, len(self.layers), len(self.heads.kv), self.device)

    def _load_decoder(self) -> Decoder:
        config = self.config
        with open_weights(
            config.model, self.spec, config.load_format, self.dtype, self.device, config.seed
        ) as source:
            return Decoder(
                self.spec,
                self.mesh,
                self.heads,
                self.layers,
                source,
                self.max_model_len,
                self._linear_backend,
            )

    def _make_pool(self, heads_of_all_ranks: int) -> KVStore:
        config, spec = self.config, self.spec
        num_pages = pool_pages(
            config,
            self.device,
            page_bytes=config.page_tokens * spec.kv_bytes_per_row_token(self.dtype),
            local_rows=len(self.layers) * len(self.heads.kv),
            all_rows=spec.num_layers * heads_of_all_ranks,
            max_row_tokens=self.max_model_len,
            step_bytes=measure_step(self) + graph_bytes(self) + self._stage_bytes()
            if self.device.type == "cuda"
            else 0,
        )
        return KVStore(
            num_layers=len(self.layers),
            num_heads=len(self.heads.kv),
            num_slots=config.max_num_seqs,
            num_pages=num_pages,
            page_tokens=config.page_tokens,
            max_row_tokens=self.max_model_len,
            head_dim=spec.head_dim,
            dtype=self.dtype,
            device=self.device,
            kernels=True if self.backend.name == "triton" else None,
        )

    def _stage_bytes(self) -> int:
        """Bytes of every slot's ring and sums under the engine's own retention."""
        retention = Retention.parse(self.config.retention, self.config.budget)
        query_bytes = self.ring_query_bytes
        if remembers_normalisers(retention):
            query_bytes += self.ring_normaliser_bytes
        slot_bytes = most_ring_size(retention, self.max_model_len) * query_bytes
        if sums_mass(retention):
            assert isinstance(retention.decode, DecodeStage)
            rows = retention.row_tokens(
                self.max_model_len, self.spec.num_layers, self.spec.num_kv_heads
            )
            slack = retention.decode.slack_pages * self.config.page_tokens
            num_rows = len(self.layers) * len(self.heads.kv)
            slot_bytes += 4 * num_rows * (int(rows.max()) + slack)
        return self.config.max_num_seqs * slot_bytes

    @property
    def ring_query_bytes(self) -> int:
        """Bytes of a query that a ring remembers, in all layers."""
        return len(self.layers) * len(self.heads.query) * self.spec.head_dim * self.dtype.itemsize

    @property
    def ring_normaliser_bytes(self) -> int:
        """Bytes of a query's normalisers, in all layers."""
        return len(self.layers) * len(self.heads.query) * NORMALISER_BYTES

    def info(self, hostname: str, pid: int, log_file: str | None) -> WorkerInfo:
        """What the scheduler and the start-up log want to know."""
        return WorkerInfo(
            rank=self.mesh.rank,
            pipeline_rank=self.mesh.pipeline_rank,
            tensor_rank=self.mesh.tensor_rank,
            start_layer=self.layers.start,
            stop_layer=self.layers.stop,
            start_head=self.heads.kv.start,
            stop_head=self.heads.kv.stop,
            num_pages=self.kv.num_pages,
            page_tokens=self.config.page_tokens,
            page_bytes=self.kv.page_bytes,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            dtype_reason=self._dtype_reason,
            attention_backend=self.backend.name,
            attention_reason=self._attention_reason,
            linear_backend=self._linear_backend,
            linear_reason=self._linear_reason,
            memory=self.meter.snapshot(0),
            hostname=hostname,
            pid=pid,
            log_file=log_file,
            max_model_len=self.max_model_len,
            ring_query_bytes=self.ring_query_bytes,
            ring_normaliser_bytes=self.ring_normaliser_bytes,
        )

    def add(self, new: NewSequence) -> None:
        """Give a free slot to a sequence.

        One that this model cannot serve is at fault; a sequence that it can takes part in its place
        (with token 0 for what is no token, and nothing dropped), of which nothing is kept.
        """
        message = self._fault_of(new)
        if message is not None:
            new = self._harmless(new)
        self.slots.add(new)
        if message is not None:
            self.faults.add(new.slot, message)
        cycle = cycle_of(new.retention, new.prompt_tokens, self.config.page_tokens)
        if cycle is not None:
            self.cycles[new.slot] = cycle
            shape = (len(self.layers), len(self.heads.kv))
            self.after_prefill[new.slot] = np.zeros(shape, dtype=np.int32)
        trimmed = trimmed_rows(new.retention, new.prompt_tokens, self.spec.num_layers)
        if trimmed is not None:
            self.trimmed[new.slot] = trimmed
        self.rings.open(
            new.slot,
            ring_size(new.retention, new.prompt_tokens, self.max_model_len),
            with_normalisers=remembers_normalisers(new.retention),
        )
        if sums_mass(new.retention):
            self.sums.open(new.slot)

    def _fault_of(self, new: NewSequence) -> str | None:
        """What a sequence asks for that this model has not; the same on every rank."""
        tokens, vocab_size = new.tokens(), self.spec.vocab_size
        strangers = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(strangers):
            place = int(strangers[0])
            return (
                f"token_ids[{place}]={tokens[place]} is no token of the model; they are 0 to "
                f"{vocab_size - 1}"
            )
        try:
            self._plan_rows(new.retention, new.prompt_tokens)
        except Exception as error:
            return f"retention: {error}"
        return None

    def _harmless(self, new: NewSequence) -> NewSequence:
        """The sequence as this model can compute it, with the lengths that its followers share."""
        tokens = new.tokens().copy()
        tokens[(tokens < 0) | (tokens >= self.spec.vocab_size)] = 0
        propagate = new.retention.propagate
        retention = Retention.parse(None if propagate is None else {"propagate": propagate})
        try:
            self._plan_rows(retention, new.prompt_tokens)
        except Exception:
            retention = Retention.parse(None)
        return replace(new, token_ids=tokens.tobytes(), retention=retention)

    def _plan_rows(self, retention: Retention, prompt_tokens: int) -> None:
        """Work out all numbers of tokens that follow from a retention and a prompt's length."""
        num_layers = self.spec.num_layers
        retention.entering_tokens(prompt_tokens, num_layers)
        retention.row_tokens(prompt_tokens, num_layers, self.spec.num_kv_heads)
        cycle_of(retention, prompt_tokens, self.config.page_tokens)
        trimmed_rows(retention, prompt_tokens, num_layers)

    def free(self, slot: int) -> None:
        """Take back a slot and all its pages."""
        for of_slot in (self.cycles, self.trimmed, self.after_prefill):
            of_slot.pop(slot, None)
        self.rings.close(slot)
        self.sums.close(slot)
        self.kv.free(slot)
        self.slots.free(slot)
        self.refused.discard(slot)
        self.faults.forget(slot)

    def refuse(self, slot: int) -> None:
        """Give up a slot whose tokens do not fit; the scheduler will requeue its sequence."""
        logger.warning("rank %d is short of pages and refuses slot %d", self.mesh.rank, slot)
        self._give_up(slot)

    def _give_up(self, slot: int) -> None:
        self.kv.free(slot)
        self.refused.add(slot)

    def receive_hidden(self, num_tokens: int) -> Tensor:
        """Hidden states [T, E] from the stage before."""
        with self.clock.phase("receive"):
            return self.mesh.recv_hidden((num_tokens, self.spec.hidden_size), self.dtype)

    def receive_positions(self, num_tokens: int) -> Tensor:
        """Positions, int64 [T], of the hidden states that the stage before sends next."""
        with self.clock.phase("receive"):
            return self.mesh.recv_hidden((num_tokens,), torch.int64)

    def gather_heads(self, x: Tensor) -> Tensor:
        """Join the [H, m] of this stage's ranks to one row per kv head of the model, in order."""
        return self.mesh.gather_heads(x, self._kv_heads_of_ranks)

    def to_device(self, values: NDArray[np.integer]) -> Tensor:
        """An int64 tensor of these numbers on this rank's device."""
        return to_device(values.astype(np.int64), self.device)
