"""One rank of a replica: executes step plans on its shard.

A plan is executed in the order *drop, park, free, evict, offload, new, prefill, decode*; then the
last stage samples.

Shapes: T packed tokens, E hidden size.
"""

import logging
import os
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings

from .clock import Span
from .device_steps.device_head import DeviceHead
from .device_steps.graphs import Graphs
from .grammar.compiler import Compiler
from .grammar.matchers import Matchers
from .kv.store import KVStore
from .mesh.layout import MeshLayout
from .models.spec import ModelSpec
from .part import Part
from .passes.decode import Decode
from .passes.head import Head, Sampling
from .passes.parked import Finals
from .passes.prefill import Prefill
from .plan import (
    DecodeItem,
    Grammar,
    KeptCounts,
    NewSequence,
    PrefillGroup,
    PromptScores,
    SamplingSpec,
    ScoredTokens,
    StepPlan,
    StepResult,
)
from .process import prepare_process
from .shard import Shard
from .sizing import why_no_graphs
from .state.slots import Target, ended

logger = logging.getLogger(__name__)


class StepInFlight:
    """A plan that was begun: the device may still be at it.

    Args:
        shard: of the rank.
        begun: its result, as far as it was known when all was begun.
        refused: slots that the rank held nothing of by then.
        sampling: what it samples.
    """

    def __init__(
        self, shard: Shard, begun: StepResult, refused: frozenset[int], sampling: Sampling
    ) -> None:
        self._shard = shard
        self._begun = begun
        self._refused = refused
        self._sampling = sampling
        self._result: StepResult | None = None

    @property
    def is_done(self) -> bool:
        """Whether its result is known here."""
        return self._result is not None

    @property
    def is_ready(self) -> bool:
        """Whether its result can be had without waiting."""
        return self.is_done or self._sampling.is_ready()

    @torch.inference_mode()
    def result(self) -> StepResult:
        """What the rank did; waits for the device where it has to."""
        if self._result is None:
            self._result = self._finish()
        return self._result

    def _finish(self) -> StepResult:
        begun, faults = self._begun, self._shard.faults
        refused_by_now, started = frozenset(faults.refused), time.perf_counter()
        sampled = self._sampling.take()
        late = frozenset(faults.refused) - refused_by_now
        waited = time.perf_counter() - started
        waiting = ("total",) if self._shard.clock.is_of_device else ("head", "total")
        told = self._sampling.is_told
        return replace(
            begun,
            sampled=tuple(
                s for s in sampled if told and s.slot not in self._refused and s.slot not in late
            ),
            refused=tuple(sorted({*begun.refused, *late})),
            faults=begun.faults + faults.take(),
            pages_free=self._shard.kv.pages_free,
            seconds={
                name: seconds + waited if name in waiting else seconds
                for name, seconds in begun.seconds.items()
            },
        )


class Worker:
    """Executes step plans on one rank, in a process that `prepare_process` has made ready.

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
        config: WorkerSettings,
        layout: MeshLayout,
        rank: int = 0,
        store: tuple[str, int] | None = None,
        log_file: str | None = None,
    ) -> None:
        part = Part.make(config, layout, rank, store)
        self._shard = shard = Shard(part)
        self._prefill = Prefill(shard)
        graphs = None
        if part.samples_on_device:
            reason = why_no_graphs(part)
            logger.info(
                "decode: %s", f"launched by the host ({reason})" if reason else "CUDA graphs"
            )
            graphs = None if reason else Graphs(part.device)
        self._graphs = graphs
        self._decode = Decode(shard, graphs)
        self._head: Head | None = None
        self._device_head: DeviceHead | None = None
        self._compiler: Compiler | None = None
        self._in_flight: list[StepInFlight] = []
        if part.mesh.is_last_stage:
            self._head = self._make_head(part, graphs)
        if config.warmup:
            self.warm_up()
        self.info = shard.info(os.uname().nodename, os.getpid(), log_file)

    @classmethod
    def local(cls, config: WorkerSettings) -> "Worker":
        """The only rank of an engine that runs in this process, whose threads it sets."""
        prepare_process(config)
        return cls(config, MeshLayout(1, 1))

    def _make_head(self, part: Part, graphs: Graphs | None) -> Head:
        """The end of the last stage; its tensor rank 0 samples, and knows the grammars."""
        matchers, config, shard = None, part.config, self._shard
        if shard.device_slots is not None:
            sizes = shard.device_slots, config.max_num_seqs
            self._device_head = DeviceHead(part.decoder, part.mesh, *sizes, graphs)
        if part.mesh.tensor_rank == 0:
            self._compiler = Compiler(config.tokenizer or config.model, part.spec.vocab_size)
            matchers = Matchers(self._compiler, config.num_threads)
        known = shard.slots, shard.faults
        return Head(part.decoder, part.mesh, *known, matchers, self._device_head)

    def compile_grammar(self, grammar: Grammar) -> None:
        """Have a grammar ready before a sequence needs it; nothing to do on ranks without it.

        May be called from another thread while a step runs.

        Raises:
            ValueError: it cannot be compiled.
        """
        if self._compiler is not None:
            self._compiler.compile(grammar)

    @property
    def spec(self) -> ModelSpec:
        """The whole model's sizes."""
        return self._shard.part.spec

    @property
    def kv(self) -> KVStore:
        """This rank's pages."""
        return self._shard.kv

    def execute(self, plan: StepPlan) -> StepResult:
        """Run this rank's part of a plan. Every rank of the replica runs every plan, in order."""
        return self.begin(plan).result()

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> StepInFlight:
        """Start this rank's part of a plan, without waiting for a device that samples by itself.

        The next plan may be begun before this one's result is asked for, by the same thread.
        """
        shard = self._shard
        shard.clock.begin_step()
        with shard.clock.phase("total"):
            step = self._begin(plan)
        shard.clock.close_step()
        return step

    def _begin(self, plan: StepPlan) -> StepInFlight:
        shard = self._shard
        for parked_id in plan.drop:
            shard.parked.drop(parked_id)
        if plan.park:
            with shard.clock.phase("park"):
                for parking in plan.park:
                    shard.park(parking)
        for slot in plan.free:
            self._prefill.drop(slot)
            shard.free(slot)
            if self._head is not None:
                self._head.close(slot)
        shard.blocks.evict(plan.evict)
        already_refused = frozenset(shard.faults.refused)
        if plan.offload:
            with shard.clock.phase("park"):
                for parked_id in plan.offload:
                    shard.parked.offload(parked_id)
        for new in plan.new:
            shard.add(new)
            if self._head is not None:
                self._head.open(new)
        targets = shard.slots.samples(plan, shard.part.spec.num_layers)
        self._await_tokens(targets)
        finals = self._prefill.run(plan)
        decoded = self._decode.run(plan.decode)
        sampling, scored, prompts = self._read_head(plan, targets, finals, decoded)
        refused = frozenset(shard.faults.refused)
        result = StepResult(
            step=plan.step,
            rank=shard.part.mesh.rank,
            scored=tuple(s for s in scored if s.slot not in refused),
            prompts=tuple(p for p in prompts if p.slot not in refused),
            kept=self._kept(plan),
            refused=tuple(sorted(refused - already_refused)),
            faults=shard.faults.take(),
            prefill_layer_tokens=self._prefill.take_layer_tokens(),
            seconds=shard.clock.seconds,
            memory=shard.meter.snapshot(
                self._prefill.parked_bytes, shard.rings.num_bytes, shard.sums.num_bytes
            ),
        )
        step = StepInFlight(shard, result, refused, sampling)
        self._in_flight = [s for s in self._in_flight if not s.is_done]
        self._in_flight.append(step)
        return step

    def _await_tokens(self, targets: list[Target]) -> None:
        """See to it that the host knows the tokens which the masks of these targets depend on."""
        slots = self._shard.slots
        if any(slots[target.slot].sampling.grammar is not None for target in targets):
            for step in self._in_flight:
                step.result()

    def trace(self) -> list[Span]:
        """Begin to record single spans of work; returns the list that they are added to."""
        spans: list[Span] = []
        self._shard.clock.spans = spans
        return spans

    def watch_positions(self) -> dict[tuple[int, int], list[Tensor]]:
        """Begin to record which tokens prefill keeps; returns what they are added to.

        Pages hold keys, not positions, so this is for those who want to look.

        Returns:
            By slot and layer of the whole model: positions in the prompt, int64 and ascending, of
            each local kv head in order. Cuts while decoding do not change them.
        """
        watched: dict[tuple[int, int], list[Tensor]] = {}
        self._prefill.choosing.watched = watched
        return watched

    def check_integrity(self) -> None:
        """Prove that every page has exactly the owners that the tables say.

        Raises:
            AssertionError: what does not match.
        """
        self._shard.kv.check_integrity()

    def close(self) -> None:
        """Leave the process groups."""
        self._shard.part.mesh.close()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one small sequence through prefill and decode, so the first request is not slower."""
        shard = self._shard
        length = max(1, min(16, shard.part.max_model_len - 2))
        tokens = np.zeros(length, dtype=np.int32).tobytes()
        greedy = SamplingSpec(temperature=0.0)
        new = NewSequence(0, tokens, length, greedy, Retention.parse(None))
        group = PrefillGroup((0,), 0, shard.part.spec.num_layers)
        self.execute(StepPlan(-2, new=(new,), prefill=(group,)))
        self.execute(StepPlan(-1, decode=(DecodeItem(0, length),)))
        self.execute(StepPlan(0, free=(0,)))
        if self._graphs is not None:
            with self._graphs.logged():
                self._decode.record_all()
                if self._device_head is not None:
                    self._device_head.record_all()
        shard.meter.reset_peaks()

    def _kept(self, plan: StepPlan) -> tuple[KeptCounts, ...]:
        """What is left of the prompts whose prefill ended on this rank."""
        shard = self._shard
        return tuple(
            KeptCounts(slot, shard.kv.kept(slot).astype(np.int32).tobytes())
            for group in ended(plan, shard.part.layers.stop)
            for slot in group.slots
            if slot not in shard.faults.refused
        )

    def _read_head(
        self,
        plan: StepPlan,
        targets: list[Target],
        finals: Finals,
        decoded_TE: Tensor | None,
    ) -> tuple[Sampling, list[ScoredTokens], list[PromptScores]]:
        """Sample and score on the last stage; elsewhere only note which tokens will come."""
        shard, mesh = self._shard, self._shard.part.mesh
        if self._head is None:
            if targets and mesh.is_first_stage:
                self._decode.expect(targets)
            return Sampling(), [], []
        with shard.clock.phase("head"):
            sampling = self._head.sample(plan, targets, finals.last, decoded_TE)
            scored = self._head.score(plan, finals.last, decoded_TE)
            prompts = self._head.score_prompts(finals.whole)
        if sampling.tokens_S is not None and not mesh.is_first_stage:
            mesh.send_tokens(sampling.tokens_S.clone())  # the next step may overwrite them
        if mesh.tensor_rank != 0:
            return replace(sampling, is_told=False), [], []
        return sampling, scored, prompts
