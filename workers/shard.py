"""What one rank holds: its part, the pages of its rows, and what it remembers of each sequence.

`Worker` executes plans on it; `passes/prefill.py` and `passes/decode.py` are the two ways through
its layers.
"""

import logging
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.growth import (
    cycle_of,
    remembers_normalisers,
    ring_size,
    sums_mass,
    trimmed_rows,
)
from saqqara.compression.retention import Retention

from .clock import Event, StepClock
from .kv.rows import shorten
from .kv.store import KVStore
from .part import Part
from .plan import NewSequence, Parking, WorkerInfo, WorkerMemory
from .reuse.blocks import Blocks
from .reuse.parked import ParkedSequences
from .sizing import size_pool
from .state.device_slots import DeviceSlots
from .state.faults import Faults
from .state.meter import MemoryMeter
from .state.retained import Retained
from .state.rings import QueryRings
from .state.slots import SlotTable, goes_on_in_prefill
from .state.sums import MassSums

logger = logging.getLogger(__name__)


def _timing_event() -> Event:
    return cast("Event", torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]


class Shard:
    """A part with its pages, and with what changes from step to step.

    Attributes:
        part: what is fixed.
        kv: keys and values.
        blocks: those of prompts' first tokens, before retention, for later prompts.
        slots: tokens and settings of each sequence.
        device_slots: the same as the device knows them, where it samples; else None.
        retained: which rows are cut while they decode, and when.
        rings: the last queries of sequences whose cuts look at them.
        sums: the attention that tokens got, of sequences whose cuts look at it.
        parked: sequences that left their slots and may come back.
        resumed: tokens that rows begin with, int32 [L, H], of slots whose sequences came back with
            more of a prompt.
        faults: slots that were refused, and those of them whose sequences cannot go on.
        meter: peaks of memory.
        clock: time spent in the current step, by phase.

    Raises:
        ValueError: see `sizing.size_pool`.
    """

    def __init__(self, part: Part) -> None:
        config, device = part.config, part.device
        num_layers, num_heads, head_dim = len(part.layers), len(part.heads.kv), part.spec.head_dim
        uses_kernels = part.backend.name == "triton"
        holdings = size_pool(part)
        self.part = part
        self._host_kv_bytes = holdings.host_kv_bytes
        self.kv = KVStore(
            num_layers=num_layers,
            num_heads=num_heads,
            num_slots=config.max_num_seqs,
            num_pages=holdings.num_pages,
            page_tokens=config.page_tokens,
            max_row_tokens=part.max_model_len,
            head_dim=head_dim,
            dtype=part.dtype,
            device=device,
            kernels=True if uses_kernels else None,
            mirrored=True if uses_kernels else None,
            mirror_entries=part.footprint.mirror_entries(holdings.num_pages, *part.sizes),
            windows=part.windows,
        )
        self.blocks = Blocks(self.kv)
        self.kv.holders.append(self.blocks.held)
        self.slots = SlotTable(config.max_num_seqs, part.max_model_len + 1)
        self.device_slots = None
        if part.samples_on_device:
            sizes = (config.max_num_seqs, part.max_model_len + 1, part.spec.vocab_size)
            self.device_slots = DeviceSlots(*sizes, device)
        self.retained = Retained(part.spec.layers, (num_layers, num_heads), config.page_tokens)
        self.rings = QueryRings(
            config.max_num_seqs, num_layers, len(part.heads.query), head_dim, part.dtype, device
        )
        self.sums = MassSums(config.max_num_seqs, num_layers, num_heads, device)
        self.parked = ParkedSequences(self.kv, self.retained, self.rings, self.sums)
        self.kv.holders.append(self.parked.pages)
        self.resumed: dict[int, NDArray[np.int32]] = {}
        self.faults = Faults(self.kv.free, is_alone=part.mesh.layout.tensor_size == 1)
        held = WorkerMemory(
            weight_bytes=part.decoder.weight_bytes(),
            pool_bytes=holdings.pool_bytes,
            table_bytes=holdings.table_bytes,
            temporary_bytes=holdings.temporary_bytes,
            graph_bytes=holdings.graph_bytes,
            remembered_bytes=holdings.remembered_bytes,
        )
        self.meter = MemoryMeter(held)
        self.clock = StepClock(_timing_event if device.type == "cuda" else None)

    def info(self, hostname: str, pid: int, log_file: str | None) -> WorkerInfo:
        """What the scheduler and the start-up log want to know."""
        part, mesh = self.part, self.part.mesh
        return WorkerInfo(
            rank=mesh.rank,
            pipeline_rank=mesh.pipeline_rank,
            tensor_rank=mesh.tensor_rank,
            start_layer=part.layers.start,
            stop_layer=part.layers.stop,
            start_head=part.heads.kv.start,
            stop_head=part.heads.kv.stop,
            num_pages=self.kv.num_pages,
            page_tokens=part.config.page_tokens,
            page_bytes=self.kv.page_bytes,
            device=str(part.device),
            dtype=str(part.dtype).removeprefix("torch."),
            dtype_reason=part.choices.dtype_reason,
            attention_backend=part.backend.name,
            attention_reason=part.choices.attention_reason,
            linear_backend=part.choices.linear_backend,
            linear_reason=part.choices.linear_reason,
            memory=self.meter.snapshot(0),
            hostname=hostname,
            pid=pid,
            log_file=log_file,
            max_model_len=part.max_model_len,
            windows=part.spec.windows,
            ring_query_bytes=part.footprint.ring_query_bytes(),
            ring_normaliser_bytes=part.footprint.ring_normaliser_bytes(),
            max_num_seqs=part.config.max_num_seqs,
            max_prefill_tokens=part.config.max_prefill_tokens,
            host_kv_bytes=self._host_kv_bytes,
            most_shared_entries=self._most_shared_entries(),
            hidden_bytes=part.spec.hidden_size * part.dtype.itemsize,
        )

    def _most_shared_entries(self) -> int | None:
        """How many entries the page tables have for pages that rows share; None: enough for all."""
        if self.kv.table.mirror is None:
            return None
        return self.part.footprint.most_shared_entries(self.kv.num_pages, *self.part.sizes)

    def add(self, new: NewSequence) -> None:
        """Give a free slot to a sequence.

        One that this model cannot serve is at fault; a sequence that it can takes part in its place
        (with token 0 for what is no token, and nothing dropped), of which nothing is kept. If the
        blocks that it is to store find too few pages, it is refused, and they are not here.
        """
        message = self._fault_of(new)
        if message is not None:
            new = self._harmless(new)
        self.slots.add(new)
        if message is not None:
            self.faults.add(new.slot, message)
        elif new.prefix is not None and not self.blocks.take(new.prefix.stored):
            self.refuse(new.slot)
        if self.device_slots is not None:
            self.device_slots.open(new)
        if new.resumes is not None and message is None:
            with self.clock.phase("resume"):
                self._resume(new, new.resumes)
        else:
            self._remember(new)

    def _resume(self, new: NewSequence, parked_id: int) -> None:
        """Put a parked sequence into the slot.

        For one with more of a prompt to come that is a new beginning: the end of its prefill is a
        cut like another, and when its rows are cut next is counted from there. A ring goes on, for
        what comes may be shorter.
        """
        only_rows = goes_on_in_prefill(new)
        if parked_id not in self.parked:  # its slot was refused when it was parked
            self._remember(new)
            self.refuse(new.slot)
            return
        if only_rows:
            self._remember(new)
            self.rings.refill(new.slot, self.parked[parked_id].ring)
            self._note_rows(new, self.parked[parked_id].kept)
        if not self.parked.resume(new.slot, parked_id, only_rows=only_rows):
            self.refuse(new.slot)
        elif only_rows:
            self._cut_back(new)

    def _note_rows(self, new: NewSequence, kept: NDArray[np.int32]) -> None:
        """Note what the rest of a prompt will go on behind: `kept` [L, H], or what stays of it."""
        self.resumed[new.slot] = np.minimum(kept, np.int32(new.resumed_tokens))

    def _cut_back(self, new: NewSequence) -> None:
        """Cut off tokens behind those that the prompt begins with, of rows that have them all."""
        slots, counts = np.array([new.slot]), self.resumed[new.slot]
        if (self.kv.kept(new.slot) == counts).all():
            return
        shorten(self.kv, slots, counts[None])
        if self.kv.rings.window:
            assert new.resumed_tokens <= self.kv.rings.window, "a ring has lost what comes last now"
            self.kv.rings.seen[new.slot] = new.resumed_tokens

    def _remember(self, new: NewSequence) -> None:
        """Get ready to note of a sequence what cutting its rows while it decodes will ask for."""
        self.retained.add(new)
        self.rings.open(
            new.slot,
            ring_size(new.retention, new.prompt_tokens, self.part.max_model_len),
            with_normalisers=remembers_normalisers(new.retention),
        )
        if sums_mass(new.retention):
            self.sums.open(new.slot)

    def _fault_of(self, new: NewSequence) -> str | None:
        """What a sequence asks for that this model has not; the same on every rank."""
        tokens, vocab_size = new.tokens(), self.part.spec.vocab_size
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
        tokens[(tokens < 0) | (tokens >= self.part.spec.vocab_size)] = 0
        propagate = new.retention.propagate
        retention = Retention.parse(None if propagate is None else {"propagate": propagate})
        try:
            self._plan_rows(retention, new.prompt_tokens)
        except Exception:
            retention = Retention.parse(None)
        return replace(new, token_ids=tokens.tobytes(), retention=retention)

    def _plan_rows(self, retention: Retention, prompt_tokens: int) -> None:
        """Work out all numbers of tokens that follow from a retention and a prompt's length."""
        spec, layers = self.part.spec, self.part.spec.layers
        retention.entering_tokens(prompt_tokens, layers)
        retention.row_tokens(prompt_tokens, layers, spec.num_kv_heads)
        cycle_of(retention, prompt_tokens, self.part.config.page_tokens)
        trimmed_rows(retention, prompt_tokens, layers)

    def park(self, parking: Parking) -> None:
        """Take a sequence out of its slot; of a slot that was refused nothing is left to park."""
        if parking.slot not in self.faults.refused:
            self.parked.park(parking.slot, parking.parked_id, parking.to_host)

    def free(self, slot: int) -> None:
        """Take back a slot and all its pages."""
        self.retained.free(slot)
        self.resumed.pop(slot, None)
        self.rings.close(slot)
        self.sums.close(slot)
        self.kv.free(slot)
        self.slots.free(slot)
        self.faults.forget(slot)

    def refuse(self, slot: int) -> None:
        """Give up a slot whose tokens do not fit; the scheduler will requeue its sequence."""
        logger.warning("rank %d is short of pages and refuses slot %d", self.part.mesh.rank, slot)
        self.faults.refuse(slot)

    def receive_hidden(self, num_tokens: int) -> Tensor:
        """Hidden states [T, E] from the stage before."""
        part = self.part
        with self.clock.phase("receive"):
            return part.mesh.recv_hidden((num_tokens, part.spec.hidden_size), part.dtype)

    def receive_positions(self, num_tokens: int) -> Tensor:
        """Positions, int64 [T], of the hidden states that the stage before sends next."""
        with self.clock.phase("receive"):
            return self.part.mesh.recv_hidden((num_tokens,), torch.int64)
