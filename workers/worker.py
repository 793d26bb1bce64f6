"""One rank of a replica: executes step plans on its shard.

A plan is executed in the order *free, new, prefill, decode*; then the last stage samples.

Shapes: T packed tokens, E hidden size.
"""

import os

import numpy as np
import torch
from torch import Tensor

from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings

from .clock import Span
from .grammar.compiler import Compiler
from .grammar.matchers import Matchers
from .kv.store import KVStore
from .mesh.layout import MeshLayout
from .models.spec import ModelSpec
from .part import Part
from .passes.decode import Decode
from .passes.head import Head
from .passes.parked import Finals
from .passes.prefill import Prefill
from .plan import (
    DecodeItem,
    Grammar,
    KeptCounts,
    NewSequence,
    PrefillGroup,
    PromptScores,
    SampledToken,
    SamplingSpec,
    ScoredTokens,
    StepPlan,
    StepResult,
)
from .process import prepare_process
from .shard import Shard
from .state.slots import Target, ended


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
        self._decode = Decode(shard)
        self._head: Head | None = None
        self._compiler: Compiler | None = None
        if part.mesh.is_last_stage:
            self._head = self._make_head(part)
        if config.warmup:
            self.warm_up()
        self.info = shard.info(os.uname().nodename, os.getpid(), log_file)

    @classmethod
    def local(cls, config: WorkerSettings) -> "Worker":
        """The only rank of an engine that runs in this process, whose threads it sets."""
        prepare_process(config)
        return cls(config, MeshLayout(1, 1))

    def _make_head(self, part: Part) -> Head:
        """The end of the last stage; its tensor rank 0 samples, and knows the grammars."""
        matchers, config = None, part.config
        if part.mesh.tensor_rank == 0:
            self._compiler = Compiler(config.tokenizer or config.model, part.spec.vocab_size)
            matchers = Matchers(self._compiler, config.num_threads)
        return Head(part.decoder, part.mesh, self._shard.slots, self._shard.faults, matchers)

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

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run this rank's part of a plan. Every rank of the replica runs every plan, in order."""
        shard = self._shard
        shard.clock.begin_step()
        with shard.clock.phase("total"):
            result = self._execute(plan)
        shard.clock.close_step()
        return result

    def _execute(self, plan: StepPlan) -> StepResult:
        shard = self._shard
        for slot in plan.free:
            self._prefill.drop(slot)
            shard.free(slot)
            if self._head is not None:
                self._head.close(slot)
        already_refused = frozenset(shard.faults.refused)
        for new in plan.new:
            shard.add(new)
            if self._head is not None:
                self._head.open(new)
        targets = shard.slots.samples(plan, shard.part.spec.num_layers)
        finals = self._prefill.run(plan)
        decoded = self._decode.run(plan.decode)
        sampled, scored, prompts = self._read_head(plan, targets, finals, decoded)
        return StepResult(
            step=plan.step,
            rank=shard.part.mesh.rank,
            sampled=sampled,
            scored=scored,
            prompts=prompts,
            kept=self._kept(plan),
            refused=tuple(sorted(shard.faults.refused - already_refused)),
            faults=shard.faults.take(),
            pages_free=shard.kv.pages_free,
            prefill_layer_tokens=self._prefill.take_layer_tokens(),
            seconds=shard.clock.seconds,
            memory=shard.meter.snapshot(
                self._prefill.parked_bytes, shard.rings.num_bytes, shard.sums.num_bytes
            ),
        )

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
        self._prefill.watched = watched
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
        self._decode.warm_up()
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
    ) -> tuple[tuple[SampledToken, ...], tuple[ScoredTokens, ...], tuple[PromptScores, ...]]:
        """Sample and score on the last stage; elsewhere only note which tokens will come."""
        shard, mesh = self._shard, self._shard.part.mesh
        if self._head is None:
            if targets and mesh.is_first_stage:
                self._decode.expect(targets)
            return (), (), ()
        with shard.clock.phase("head"):
            sampled = self._head.sample(plan, targets, finals.last, decoded_TE)
            scored = self._head.score(plan, finals.last, decoded_TE)
            prompts = self._head.score_prompts(finals.whole)
        if targets and not mesh.is_first_stage:
            mesh.send_tokens(torch.tensor([s.token_id for s in sampled]))
        if mesh.tensor_rank != 0:
            return (), (), ()
        return (
            tuple(s for s in sampled if s.slot not in shard.faults.refused),
            tuple(s for s in scored if s.slot not in shard.faults.refused),
            tuple(p for p in prompts if p.slot not in shard.faults.refused),
        )
