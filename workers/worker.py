"""One rank: a shard of the model and of the KV pages, and the one place where layers are walked.

A plan is executed in the order *free, new, prefill, decode*. Prefill is layer-major: a prompt's
keys and values exist at full length only while their layer is computed; then retention picks what
is written to pages.

Shapes: T packed tokens, N sequences, S sampled positions, E hidden size, Hq local query heads,
H local kv heads, D head dim.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.compression.observation import Observation
from saqqara.compression.retention import Retention
from saqqara.compression.select import select
from saqqara.configs.schema import EngineConfig

from .attention.base import CuSeqlens, get_backend
from .batch import DecodeBatch
from .head import Head
from .kv.store import KVStore
from .memory import (
    MemoryMeter,
    choose_device,
    choose_dtype,
    pool_pages,
    reuse_freed_memory,
)
from .mesh import Mesh, MeshLayout, head_shard, layer_split
from .models.decoder import Decoder, choose_linear_backend, chunks
from .models.layer import QKV, Layer, Places
from .models.spec import load_spec
from .models.weights import open_weights
from .plan import (
    DecodeItem,
    KeptCounts,
    NewSequence,
    PrefillGroup,
    SampledToken,
    SamplingSpec,
    ScoredTokens,
    StepPlan,
    StepResult,
    WorkerInfo,
)
from .slots import SlotTable, Target, ended

logger = logging.getLogger(__name__)

# The head runs for sampled positions only, so in a step that also prefills it costs a part of what
# its weights, counted in layers, would suggest.
HEAD_SHARE = 0.25


@dataclass
class ParkedPrefill:
    """A prefill group between two layer ranges: hidden states [T, E] and where they stand."""

    hidden_TE: Tensor
    places: Places
    cu: CuSeqlens

    @property
    def num_tokens(self) -> int:
        """Packed tokens, T."""
        return self.hidden_TE.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes that the group holds while it is parked."""
        return self.hidden_TE.nbytes + self.places.num_bytes


class Worker:
    """Executes step plans on one rank.

    Args:
        config: the engine's settings; the same on every rank.
        layout: tensor and pipeline sizes.
        rank: this worker's rank, `pipeline_rank * tensor_size + tensor_rank`.
        store: host and port of the rendezvous TCPStore; None for a single rank.
        log_file: where this rank logs, for error messages.

    Raises:
        ValueError: a setting that this model or machine cannot meet, naming the field.
    """

    def __init__(
        self,
        config: EngineConfig,
        layout: MeshLayout,
        rank: int = 0,
        store: tuple[str, int] | None = None,
        log_file: str | None = None,
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.spec = load_spec(config.model)
        self.device = choose_device(config, rank)
        if self.device.type == "cpu":
            reuse_freed_memory()
        self.dtype, dtype_reason = choose_dtype(config, self.device)
        self.backend, backend_reason = get_backend(
            config.attention_backend, self.device, self.dtype
        )
        linear_backend, linear_reason = choose_linear_backend(
            config.linear_backend, self.device, self.dtype
        )
        self.max_model_len = config.max_model_len or self.spec.max_position
        shards = [
            head_shard(self.spec.num_query_heads, self.spec.num_kv_heads, layout.tensor_size, t)
            for t in range(layout.tensor_size)
        ]
        self.heads = shards[layout.tensor_rank(rank)]
        self.layers = layer_split(
            self.spec.num_layers,
            layout.pipeline_size,
            HEAD_SHARE * self.spec.head_layers,
            config.layer_split,
        )[layout.pipeline_rank(rank)]
        self.mesh = Mesh(layout, rank, self.spec.num_kv_heads, self.device, store)
        with open_weights(
            config.model, self.spec, config.load_format, self.dtype, self.device, config.seed
        ) as source:
            self.decoder = Decoder(
                self.spec,
                self.mesh,
                self.heads,
                self.layers,
                source,
                self.max_model_len,
                linear_backend,
            )
        self.scale = self.spec.head_dim**-0.5
        self.slots = SlotTable(config.max_num_seqs, self.max_model_len + 1)
        self.head = Head(self.decoder, self.mesh, self.slots) if self.mesh.is_last_stage else None
        self.meter = MemoryMeter(self.decoder.weight_bytes())
        self._parked: dict[tuple[int, ...], ParkedPrefill] = {}
        num_pages = pool_pages(
            config,
            self.device,
            page_bytes=config.page_tokens * self.spec.kv_bytes_per_row_token(self.dtype),
            local_rows=len(self.layers) * len(self.heads.kv),
            all_rows=self.spec.num_layers * sum(len(shard.kv) for shard in shards),
            max_row_tokens=self.max_model_len,
            step_bytes=self._measure_step() if self.device.type == "cuda" else 0,
        )
        self.kv = KVStore(
            num_layers=len(self.layers),
            num_heads=len(self.heads.kv),
            num_slots=config.max_num_seqs,
            num_pages=num_pages,
            page_tokens=config.page_tokens,
            max_row_tokens=self.max_model_len,
            head_dim=self.spec.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self.meter.pool_bytes = num_pages * self.kv.page_bytes
        self._awaited: deque[list[Target]] = deque()
        self._refused: set[int] = set()
        self._seconds: dict[str, float] = {}
        self.info = WorkerInfo(
            rank=rank,
            pipeline_rank=self.mesh.pipeline_rank,
            tensor_rank=self.mesh.tensor_rank,
            start_layer=self.layers.start,
            stop_layer=self.layers.stop,
            start_head=self.heads.kv.start,
            stop_head=self.heads.kv.stop,
            num_pages=num_pages,
            page_tokens=config.page_tokens,
            page_bytes=self.kv.page_bytes,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            attention_backend=self.backend.name,
            attention_reason=backend_reason,
            linear_backend=linear_backend,
            linear_reason=linear_reason,
            dtype_reason=dtype_reason,
            memory=self.meter.snapshot(0),
            hostname=os.uname().nodename,
            pid=os.getpid(),
            log_file=log_file,
        )
        if config.warmup:
            self.warm_up()

    @classmethod
    def local(cls, config: EngineConfig) -> "Worker":
        """The only rank of an engine that runs in this process."""
        return cls(config, MeshLayout(1, 1))

    # -- one step ---------------------------------------------------------------------------

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run this rank's part of a plan. Every rank of the replica runs every plan, in order."""
        self._seconds = {}
        started = time.perf_counter()
        for slot in plan.free:
            self._free(slot)
        for new in plan.new:
            self.slots.add(new)
        targets = self.slots.samples(plan, self.spec.num_layers)
        already_refused = frozenset(self._refused)
        finals = self._prefill(plan)
        decoded = self._decode(plan.decode)
        sampled, scored = self._read_head(plan, targets, finals, decoded)
        kept = tuple(
            KeptCounts(slot, self.kv.kept(slot).astype(np.int32).tobytes())
            for group in ended(plan, self.layers.stop)
            for slot in group.slots
            if slot not in self._refused
        )
        self._seconds["total"] = time.perf_counter() - started
        parked = sum(p.num_bytes for p in self._parked.values())
        return StepResult(
            step=plan.step,
            rank=self.mesh.rank,
            sampled=sampled,
            scored=scored,
            kept=kept,
            refused=tuple(sorted(self._refused - already_refused)),
            pages_free=self.kv.pages_free,
            seconds=self._seconds,
            memory=self.meter.snapshot(parked),
        )

    def check_integrity(self) -> None:
        """Prove that every page has exactly the owners that the tables say.

        Raises:
            AssertionError: what does not match.
        """
        self.kv.check_integrity()

    def close(self) -> None:
        """Leave the process groups."""
        self.mesh.close()

    def warm_up(self) -> None:
        """Run one small sequence through prefill and decode, so the first request is not slower."""
        length = max(1, min(16, self.max_model_len - 2))
        tokens = np.zeros(length, dtype=np.int32).tobytes()
        sampling = SamplingSpec(temperature=0.0)
        retention = Retention.parse(None)
        group = PrefillGroup((0,), 0, self.spec.num_layers)
        self.execute(
            StepPlan(
                -2, new=(NewSequence(0, tokens, length, sampling, retention),), prefill=(group,)
            )
        )
        self.execute(StepPlan(-1, decode=(DecodeItem(0, length),)))
        self.execute(StepPlan(0, free=(0,)))
        self.meter.reset_peaks()

    def _free(self, slot: int) -> None:
        for slots in [slots for slots in self._parked if slot in slots]:
            del self._parked[slots]  # a group is given up half-way only as a whole
        self.kv.free(slot)
        self.slots.free(slot)
        self._refused.discard(slot)

    def _refuse(self, slot: int) -> None:
        """Give up a slot whose tokens do not fit; the scheduler will requeue its sequence."""
        logger.warning("rank %d is short of pages and refuses slot %d", self.mesh.rank, slot)
        self.kv.free(slot)
        self._refused.add(slot)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    @torch.inference_mode()
    def _measure_step(self) -> int:
        """Peak GPU bytes of the largest step: one layer of a full prefill group, and the head."""
        tokens = self.config.max_prefill_tokens
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        hidden = torch.zeros(tokens, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        length = min(tokens, self.max_model_len)
        places = self.decoder.places(self._to_device(np.arange(tokens) % length))
        lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
        parked = ParkedPrefill(hidden, places, CuSeqlens.of(lengths, self.device))
        weights = self.decoder.layers[0]
        q, k, v = self._project_prompts(weights, parked)
        attended = self.backend.prefill(q, k, v, parked.cu, parked.cu, self.scale)
        self._mass(q[-64:], k[:length])
        for chunk in chunks(tokens, self.config.linear_chunk_tokens):
            weights.finish(hidden[chunk], attended[chunk])
        if self.head is not None:
            self.decoder.logits(hidden[: self.config.max_num_seqs])
        peak = torch.cuda.max_memory_allocated(self.device)
        # Another group's hidden states may be parked beside the one in work.
        return peak - before + 2 * hidden.nbytes

    # -- prefill ----------------------------------------------------------------------------

    def _prefill(self, plan: StepPlan) -> dict[int, Tensor]:
        """Advance every prefill group; returns the last hidden state [E] of slots that ended."""
        finals: dict[int, Tensor] = {}
        # What this stage holds already goes first: what is handed over arrives later.
        for group in sorted(plan.prefill, key=self._is_handed_over):
            if group.start_layer == 0 and self.mesh.is_first_stage:
                self._parked[group.slots] = self._embed_prompts(group.slots)
            elif self._is_handed_over(group):
                self._parked[group.slots] = self._receive_prompts(group.slots)
            start = max(group.start_layer, self.layers.start)
            stop = min(group.stop_layer, self.layers.stop)
            if start >= stop:
                continue
            parked = self._parked[group.slots]
            with self._timed("prefill"):
                for layer in range(start, min(stop, self.spec.num_layers - 1)):
                    self._prefill_layer(layer, group.slots, parked)
                if stop == self.spec.num_layers:
                    last_NE = self._prefill_last_layer(group.slots, parked)
                    finals.update(zip(group.slots, last_NE, strict=True))
            if stop == self.layers.stop:
                del self._parked[group.slots]
                if not self.mesh.is_last_stage:
                    self.mesh.send_hidden(parked.hidden_TE)
        return finals

    def _is_handed_over(self, group: PrefillGroup) -> bool:
        """Whether the previous stage finishes its part of the group in this range."""
        return group.start_layer < self.layers.start <= group.stop_layer

    def _embed_prompts(self, slots: tuple[int, ...]) -> ParkedPrefill:
        assert self.decoder.embedding is not None
        tokens = np.concatenate([self.slots.prompt(slot) for slot in slots])
        return self._park(slots, self.decoder.embedding(self._to_device(tokens)))

    def _receive_prompts(self, slots: tuple[int, ...]) -> ParkedPrefill:
        num_tokens = sum(self.slots[slot].prompt_tokens for slot in slots)
        with self._timed("receive"):
            hidden = self.mesh.recv_hidden((num_tokens, self.spec.hidden_size), self.dtype)
        return self._park(slots, hidden)

    def _park(self, slots: tuple[int, ...], hidden_TE: Tensor) -> ParkedPrefill:
        lengths = [self.slots[slot].prompt_tokens for slot in slots]
        positions = np.concatenate([np.arange(n) for n in lengths])
        places = self.decoder.places(self._to_device(positions))
        return ParkedPrefill(hidden_TE, places, CuSeqlens.of(lengths, self.device))

    def _prefill_layer(self, layer: int, slots: tuple[int, ...], parked: ParkedPrefill) -> None:
        """Replace the parked hidden states by those after `layer`; keep what retention selects."""
        weights = self.decoder.layers[layer - self.layers.start]
        q, k, v = self._project_prompts(weights, parked)
        attended = self.backend.prefill(q, k, v, parked.cu, parked.cu, self.scale)
        self._retain(layer, slots, parked, q, k, v)
        del q, k, v
        for chunk in chunks(parked.num_tokens, self.config.linear_chunk_tokens):
            hidden = parked.hidden_TE[chunk]
            weights.finish(hidden, attended[chunk], out=hidden)

    def _prefill_last_layer(self, slots: tuple[int, ...], parked: ParkedPrefill) -> Tensor:
        """The model's last layer: queries and MLP only where the next token comes from, [N, E]."""
        layer = self.spec.num_layers - 1
        weights = self.decoder.layers[layer - self.layers.start]
        q, k, v = self._project_prompts(weights, parked)
        last_N = parked.cu.device[1:].long() - 1
        one_each = CuSeqlens.of([1] * len(slots), self.device)
        attended = self.backend.prefill(q[last_N], k, v, one_each, parked.cu, self.scale)
        self._retain(layer, slots, parked, q, k, v)
        return weights.finish(parked.hidden_TE[last_N], attended)

    def _project_prompts(self, weights: Layer, parked: ParkedPrefill) -> QKV:
        """Queries [T, Hq, D], keys and values [T, H, D] of whole prompts, chunk by chunk."""
        num_tokens, dim = parked.num_tokens, self.spec.head_dim
        new = parked.hidden_TE.new_empty
        num_queries, num_keys = len(self.heads.query), len(self.heads.kv)
        qkv = QKV(
            new(num_tokens, num_queries, dim),
            new(num_tokens, num_keys, dim),
            new(num_tokens, num_keys, dim),
        )
        for chunk in chunks(num_tokens, self.config.linear_chunk_tokens):
            hidden, places = parked.hidden_TE[chunk], parked.places.part(chunk)
            weights.project(hidden, places, out=qkv.part(chunk))
        chunk_tokens = min(num_tokens, self.config.linear_chunk_tokens)
        self.meter.see_prefill(
            kv_bytes=qkv.k.nbytes + qkv.v.nbytes + self._prefill_page_bytes(),
            activation_bytes=(
                sum(p.num_bytes for p in self._parked.values())
                + 2 * qkv.q.nbytes  # queries + attention output
                + chunk_tokens * weights.activation_bytes_per_token(qkv.q.itemsize)
            ),
        )
        return qkv

    def _prefill_page_bytes(self) -> int:
        pages = sum(self.kv.pages_of(slot) for slots in self._parked for slot in slots)
        return pages * self.kv.page_bytes

    def _retain(
        self,
        layer: int,
        slots: tuple[int, ...],
        parked: ParkedPrefill,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
    ) -> None:
        """Write to pages what each prompt's retention method keeps of this layer."""
        bounds = parked.cu.host
        for slot, start, stop in zip(slots, bounds[:-1], bounds[1:], strict=True):
            retention = self.slots[slot].retention
            length = stop - start
            keys, values = k_THD[start:stop], v_THD[start:stop]
            indices = None
            if retention.drops(length):
                window = retention.num_window_queries(length)
                indices = select(
                    retention,
                    Observation(
                        layer=layer,
                        num_layers=self.spec.num_layers,
                        prompt_tokens=length,
                        keys=keys,
                        values=values,
                        queries=q_THD[stop - window : stop] if window else None,
                        scale=self.scale,
                        heads=self.heads.kv,
                        group_size=self.spec.num_query_heads // self.spec.num_kv_heads,
                        mass_fn=self._mass,
                        reduce_fn=self.mesh.reduce_replicas if self.heads.replicated else None,
                    ),
                )
            if slot in self._refused:
                continue
            if not self.kv.write(slot, layer - self.layers.start, keys, values, indices):
                self._refuse(slot)
        # The pages just written and the layer's fresh keys and values exist side by side.
        self.meter.see_prefill(k_THD.nbytes + v_THD.nbytes + self._prefill_page_bytes(), 0)

    def _mass(self, q_window: Tensor, keys: Tensor) -> Tensor:
        return self.backend.mass(q_window, keys, self.scale)

    # -- decode -----------------------------------------------------------------------------

    def _decode(self, items: tuple[DecodeItem, ...]) -> Tensor | None:
        """Feed the items' tokens through this rank's layers.

        Returns hidden states [T, E] on the last stage, tokens in the order of `items`.
        """
        if not items:
            return None
        batch = self._decode_batch(items)
        if self.mesh.is_first_stage:
            self._await_tokens({item.slot for item in items})
            assert self.decoder.embedding is not None
            hidden = self.decoder.embedding(self._to_device(self.slots.feed(items)))
        else:
            shape = (batch.num_tokens, self.spec.hidden_size)
            with self._timed("receive"):
                hidden = self.mesh.recv_hidden(shape, self.dtype)
        with self._timed("decode"):
            places = self.decoder.places(self._to_device(batch.positions))
            for index, weights in enumerate(self.decoder.layers):
                q, k, v = weights.project(hidden, places)
                attended = batch.attend(self.kv, self.backend, index, q, k, v, self.scale)
                hidden = weights.finish(hidden, attended, out=hidden)
        if self.mesh.is_last_stage:
            return hidden
        self.mesh.send_hidden(hidden)
        return None

    def _decode_batch(self, items: tuple[DecodeItem, ...]) -> DecodeBatch:
        """Reserve pages for the items' tokens; refuse from the end what does not fit."""
        fitting = [item for item in items if item.slot not in self._refused]
        while (batch := DecodeBatch.reserve(self.kv, items, fitting, self.device)) is None:
            self._refuse(fitting.pop().slot)
        return batch

    def _await_tokens(self, slots: set[int]) -> None:
        """Take in sampled tokens from the last stage, up to the newest that `slots` need."""
        needed = [i for i, ts in enumerate(self._awaited) if any(t.slot in slots for t in ts)]
        for _ in range(max(needed, default=-1) + 1):
            targets = self._awaited.popleft()
            with self._timed("receive"):
                tokens = self.mesh.recv_tokens(len(targets)).tolist()
            for target, token in zip(targets, tokens, strict=True):
                self.slots.put_token(target, token)

    # -- head -------------------------------------------------------------------------------

    def _read_head(
        self,
        plan: StepPlan,
        targets: list[Target],
        finals: dict[int, Tensor],
        decoded_TE: Tensor | None,
    ) -> tuple[tuple[SampledToken, ...], tuple[ScoredTokens, ...]]:
        """Sample and score on the last stage; elsewhere only note which tokens will come."""
        if self.head is None:
            if targets and self.mesh.is_first_stage:
                self._awaited.append(targets)
            return (), ()
        with self._timed("head"):
            sampled = self.head.sample(plan, targets, finals, decoded_TE)
            scored = self.head.score(plan, finals, decoded_TE)
        if targets and not self.mesh.is_first_stage:
            self.mesh.send_tokens(torch.tensor([s.token_id for s in sampled]))
        if self.mesh.tensor_rank != 0:
            return (), ()
        return (
            tuple(s for s in sampled if s.slot not in self._refused),
            tuple(s for s in scored if s.slot not in self._refused),
        )

    def _to_device(self, values: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device, non_blocking=True)
