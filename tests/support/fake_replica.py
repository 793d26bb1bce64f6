"""A replica that follows the wire format to the letter, without a model.

It keeps the books of pages row by row in plain loops, refuses what does not fit, and asserts that
every plan is one that real workers could run. The next token is a hash of all tokens before it, so
any run of a sequence, preempted or not, must give the same tokens.
"""

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from saqqara.cluster.errors import WorkerDiedError
from saqqara.compression.decode import DecodeStage
from saqqara.compression.retention import Retention
from saqqara.workers.plan import (
    DecodeItem,
    Fault,
    Grammar,
    KeptCounts,
    NewSequence,
    PrefillGroup,
    PromptScores,
    SampledToken,
    ScoredTokens,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WorkerInfo,
    WorkerMemory,
)

from .fake_blocks import FakeBlocks
from .fake_parked import FakeParkedSequences

PAGE_BYTES = 1024


def next_token(tokens: Sequence[int], vocab_size: int = 128) -> int:
    """The token that follows these."""
    data = np.array(tokens, dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest()) % vocab_size


def token_logprob(tokens: Sequence[int], token_id: int) -> tuple[float, int]:
    """Log-probability and rank of a token after these."""
    number = next_token([*tokens, token_id], 1000)
    return -number / 100, 1 + number % 3


class RaggedRetention(Retention):
    """A retention whose heads divide their layer's tokens unevenly, for any score and shape."""

    __slots__ = ()

    @property
    def ragged(self) -> bool:
        return True


def make_workers(
    num_pages: int,
    *,
    stages: Sequence[int] = (4,),
    head_ranges: Sequence[tuple[int, int]] = ((0, 2),),
    page_tokens: int = 4,
    windows: tuple[int, ...] = (),
    host_pages: int = 0,
) -> list[WorkerInfo]:
    """One worker per stage and head range; `stages` are layers per stage, `num_pages` is each's.

    Each has room for `host_pages` more in the host's memory.
    """
    workers: list[WorkerInfo] = []
    start_layer = 0
    for pipeline_rank, num_layers in enumerate(stages):
        for tensor_rank, (start_head, stop_head) in enumerate(head_ranges):
            workers.append(
                WorkerInfo(
                    rank=len(workers),
                    pipeline_rank=pipeline_rank,
                    tensor_rank=tensor_rank,
                    start_layer=start_layer,
                    stop_layer=start_layer + num_layers,
                    start_head=start_head,
                    stop_head=stop_head,
                    num_pages=num_pages,
                    page_tokens=page_tokens,
                    page_bytes=PAGE_BYTES,
                    device="cpu",
                    dtype="float32",
                    attention_backend="none",
                    attention_reason="there is no model",
                    linear_backend="none",
                    linear_reason="",
                    dtype_reason="",
                    memory=WorkerMemory(),
                    hostname="localhost",
                    pid=0,
                    windows=windows,
                    host_kv_bytes=host_pages * PAGE_BYTES,
                )
            )
        start_layer += num_layers
    return workers


def split_ragged(total: int, num_heads: int, most: int, seed: str) -> list[int]:
    """Divide a layer's tokens over its heads in some uneven way."""
    rng = random.Random(seed)
    counts = [0] * num_heads
    for _ in range(total):
        open_heads = [h for h in range(num_heads) if counts[h] < most]
        counts[min(rng.choice(open_heads), rng.choice(open_heads))] += 1
    return counts


@dataclass
class FakeSlot:
    """What a replica knows of the sequence in a slot."""

    new: NewSequence
    tokens: list[int]
    fed: int = 0
    prefilled_layers: int = 0
    group: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()  # whose pages its rows hold


@dataclass
class FakeWorker:
    """Row lengths of one worker, by slot, layer and head."""

    info: WorkerInfo
    rows: dict[int, dict[tuple[int, int], int]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    shared: dict[int, dict[int, int]] = field(default_factory=dict)  # pages of a row, by layer
    rings: dict[int, dict[tuple[int, int], int]] = field(default_factory=dict)  # out of their pages
    blocks: FakeBlocks | None = None
    parked: FakeParkedSequences | None = None

    @property
    def pages_free(self) -> int:
        held = (
            -(-length // self.info.page_tokens) - self.shared.get(slot, {}).get(row[0], 0)
            for slot, rows in self.rows.items()
            for row, length in rows.items()
        )
        blocks = 0 if self.blocks is None else self.blocks.pages(self.info.rank)
        parked = 0 if self.parked is None else self.parked.pages(self.info.rank)
        return self.info.num_pages - sum(held) - blocks - parked

    def give_up(self, slot: int) -> None:
        """Hold nothing of a slot any more."""
        self.rows.pop(slot, None)
        self.refused.add(slot)

    def begin_prefill(self, slot: int) -> None:
        """Take a slot's rows with a window out of their pages: all layers are written anew."""
        rows, windows = self.rows.get(slot, {}), self.info.windows
        windowed = [row for row in rows if windows and windows[row[0]]]
        self.rings[slot] = {row: rows.pop(row) for row in windowed}

    def try_add(self, slot: int, more: dict[tuple[int, int], int]) -> None:
        """Lengthen rows of a slot; without room for all of them the slot is refused."""
        if slot in self.refused:
            return
        rows = self.rows.setdefault(slot, {})
        before = dict(rows)
        for row, num in more.items():
            rows[row] = rows.get(row, 0) + num
        if self.pages_free < 0:
            rows.clear()
            rows.update(before)
            del self.rows[slot]
            self.refused.add(slot)


class FakeReplica:
    """An `Executor` whose steps are done when `execute` returns.

    Args:
        workers: from `make_workers`.
        vocab_size: tokens are below it.
        fail_at_step: step whose future raises.
        faults: messages by (step, slot): the last worker finds the slot's sequence at fault when it
            is worked on in that step or, first, in a later one.
        step_seconds: how long a step takes, beside the work of faking it.
    """

    def __init__(
        self,
        workers: Sequence[WorkerInfo],
        vocab_size: int = 128,
        fail_at_step: int = -1,
        step_seconds: float = 0.0,
        faults: Mapping[tuple[int, int], str] = MappingProxyType({}),
    ) -> None:
        self._infos = list(workers)
        self.blocks = FakeBlocks(workers)
        self.parked = FakeParkedSequences(workers[0].page_tokens)
        self.fakes = [FakeWorker(info, blocks=self.blocks, parked=self.parked) for info in workers]
        self.vocab_size = vocab_size
        self.fail_at_step = fail_at_step
        self._faults = dict(faults)
        self.step_seconds = step_seconds
        self.slots: dict[int, FakeSlot] = {}
        self.num_layers = max(w.stop_layer for w in workers)
        self.num_heads = max(w.stop_head for w in workers)
        self.windows = workers[0].windows or (0,) * self.num_layers
        self.stages = sorted({(w.start_layer, w.stop_layer) for w in workers})
        self.num_integrity_checks = 0
        self.is_shut_down = False
        self.plans: list[StepPlan] = []
        self.compiled: list[Grammar] = []
        self.prefilled_tokens = 0  # of prompts, computed to the end
        self.num_prompts_scored = 0

    @property
    def workers(self) -> list[WorkerInfo]:
        return self._infos

    @property
    def failure(self) -> WorkerDiedError | None:
        return None

    def give_up(self, seconds: float) -> WorkerDiedError:
        raise AssertionError("its steps take no time")

    def compile_grammar(self, grammar: Grammar) -> Future[None]:
        """It is compiled at once, unless it says that it cannot be."""
        future: Future[None] = Future()
        self.compiled.append(grammar)
        if "bad" in grammar.text:
            future.set_exception(ValueError("it is bad"))
        else:
            future.set_result(None)
        return future

    def recover(self) -> Future[None]:
        raise AssertionError("its workers are never lost")

    def check_integrity(self) -> None:
        self.num_integrity_checks += 1

    def shutdown(self) -> None:
        self.is_shut_down = True

    def execute(self, plan: StepPlan) -> Future[list[StepResult]]:
        future: Future[list[StepResult]] = Future()
        if plan.step == self.fail_at_step:
            future.set_exception(RuntimeError("a worker died"))
        else:
            time.sleep(self.step_seconds)
            future.set_result(self.run(plan))
        return future

    def run(self, plan: StepPlan) -> list[StepResult]:
        """Carry out a plan on every worker."""
        self.plans.append(plan)
        self.parked.drop(plan)
        self.parked.park(plan, self)
        self.parked.check(self.fakes)
        for slot in plan.free:
            self._free(slot)
        before = [set(worker.refused) for worker in self.fakes]
        self.blocks.evict(plan, {**self.slots, **self.parked.slots}, self.num_layers)
        self.parked.offload(plan)
        self.parked.check(self.fakes)
        for new in plan.new:
            assert new.slot not in self.slots, f"slot {new.slot} is taken"
            if new.resumes is not None and new.resumed_tokens >= new.prompt_tokens:
                self.slots[new.slot] = self.parked.put_back(new, self.fakes)
                continue
            self.slots[new.slot] = FakeSlot(new, new.tokens().tolist())
            self._check_leader(new)
            self._take_blocks(new)
            if new.resumes is not None:
                self.slots[new.slot].blocks = self.parked.resume(new, self.fakes)
        self._check_stages(plan.prefill)
        ended = [slot for group in plan.prefill for slot in self._prefill(group)]
        refused = set().union(*(worker.refused for worker in self.fakes))
        for slot in ended:
            if slot not in refused:  # what it was filling is void
                self.blocks.fill(self.slots[slot].new, plan.step)
        kept = {worker.info.rank: self._kept(worker, plan.prefill) for worker in self.fakes}
        for item in plan.decode:
            self._decode(item)
        for item in plan.decode:
            self._compact(item)
        faults = self._take_faults(plan)
        for fault in faults:
            self.fakes[-1].give_up(fault.slot)
        prompts = self._score_prompts(ended)
        sampled, scored = self._read_out(plan, ended)
        last = len(self.stages) - 1
        return [
            StepResult(
                step=plan.step,
                rank=worker.info.rank,
                sampled=sampled if self._speaks(worker, last) else (),
                scored=scored if self._speaks(worker, last) else (),
                prompts=prompts if self._speaks(worker, last) else (),
                kept=kept[worker.info.rank],
                refused=tuple(sorted(worker.refused - before[worker.info.rank])),
                faults=faults if worker is self.fakes[-1] else (),
                pages_free=worker.pages_free,
                seconds={"prefill": 0.25, "decode": 0.5} if plan.prefill else {"decode": 0.5},
                memory=WorkerMemory(weight_bytes=7, resident_bytes_peak=11),
            )
            for worker in self.fakes
        ]

    def _take_faults(self, plan: StepPlan) -> tuple[Fault, ...]:
        slots = {slot for group in plan.prefill for slot in group.slots}
        slots |= {item.slot for item in plan.decode}
        due = [(step, slot) for step, slot in self._faults if step <= plan.step and slot in slots]
        return tuple(Fault(slot, self._faults.pop((step, slot))) for step, slot in due)

    def _free(self, slot: int) -> None:
        held = self.slots.pop(slot)
        others = [s for s in held.group if s in self.slots]
        under_way = 0 < held.prefilled_layers < self.num_layers
        if under_way:
            # A group keeps its slots: it is freed as a whole (checked by the last of them).
            for other in others:
                assert 0 < self.slots[other].prefilled_layers < self.num_layers
                self.slots[other].group = tuple(s for s in held.group if s != slot)
        for worker in self.fakes:
            worker.rows.pop(slot, None)
            worker.shared.pop(slot, None)
            worker.rings.pop(slot, None)
            worker.refused.discard(slot)

    def _take_blocks(self, new: NewSequence) -> None:
        leader = new if new.shares_prefill_with is None else self.slots[new.shares_prefill_with].new
        for rank in self.blocks.take(new, leader, [w.pages_free for w in self.fakes]):
            self.fakes[rank].refused.add(new.slot)
        if new.prefix is not None and new.prefix.is_shared:
            assert new.retention.budget_tokens(new.prompt_tokens) == new.prompt_tokens
            assert new.retention.decode is None
            pages = len(new.prefix.cached)
            layers = (layer for layer, window in enumerate(self.windows) if not window)
            shared = dict.fromkeys(layers, pages)
            self.slots[new.slot].blocks = new.prefix.cached
            for worker in self.fakes:
                worker.shared[new.slot] = shared

    def _check_stages(self, groups: tuple[PrefillGroup, ...]) -> None:
        used = []
        for group in groups:
            touched = [
                stage
                for stage, (start, stop) in enumerate(self.stages)
                if group.start_layer < stop and start < group.stop_layer
            ]
            assert len(touched) == 1, "a range lies within one stage"
            used += touched
        assert len(used) == len(set(used)), "one group per stage"

    def _prefill(self, group: PrefillGroup) -> list[int]:
        """Run a range; returns the slots that are through."""
        assert group.start_layer < group.stop_layer <= self.num_layers
        retentions = {s.retention for s in self._leaders(group)}
        assert len(retentions) == 1, "those that are computed in a group share their retention"
        assert {s.slot for s in self._leaders(group)} >= {
            self.slots[slot].new.shares_prefill_with for slot in group.slots
        } - {None}, "leaders are in the group"
        if group.stop_layer == self.num_layers:
            page_tokens = self._infos[0].page_tokens
            for new in self._leaders(group):
                cached = len(new.prefix.cached) if new.prefix else 0
                num_tokens = new.prompt_tokens - cached * page_tokens - new.resumed_tokens
                assert num_tokens > 0, "the last token is computed"
                self.prefilled_tokens += num_tokens
        for slot in group.slots:
            held = self.slots[slot]
            assert held.prefilled_layers == group.start_layer, "ranges follow each other"
            if group.start_layer == 0:
                held.group = group.slots
            assert held.group == group.slots, "a group keeps its slots"
            held.prefilled_layers = group.stop_layer
            for worker in self.fakes:
                is_handed_over = group.start_layer < worker.info.start_layer == group.stop_layer
                if is_handed_over or group.start_layer == worker.info.start_layer == 0:
                    worker.begin_prefill(slot)
        for layer in range(group.start_layer, group.stop_layer):
            for slot in group.slots:
                new = self.slots[slot].new
                counts = self._counts(new, layer)
                num_new = new.prompt_tokens - new.resumed_tokens
                for worker in self.fakes:
                    info = worker.info
                    if info.start_layer <= layer < info.stop_layer:
                        more = {}
                        for head in range(info.start_head, info.stop_head):
                            row = layer, head
                            length = worker.rows.get(slot, {}).get(row, 0)
                            known = worker.rings[slot].pop(row, length)
                            more[row] = min(counts[head], known + num_new) - length
                        worker.try_add(slot, more)
        if group.stop_layer < self.num_layers:
            return []
        for slot in group.slots:
            self.slots[slot].fed = self.slots[slot].new.prompt_tokens
        return list(group.slots)

    def _leaders(self, group: PrefillGroup) -> list[NewSequence]:
        """The sequences of a group that are computed."""
        new = [self.slots[slot].new for slot in group.slots]
        return [n for n in new if n.shares_prefill_with is None]

    def _check_leader(self, new: NewSequence) -> None:
        if new.shares_prefill_with is None:
            return
        leader = self.slots[new.shares_prefill_with].new
        assert leader.shares_prefill_with is None, "a leader follows nobody"
        assert self.slots[leader.slot].prefilled_layers == 0, "a leader is new, too"
        length = 4 * new.prompt_tokens
        assert leader.prompt_tokens == new.prompt_tokens
        assert leader.token_ids[:length] == new.token_ids[:length], "they have the same prompt"
        assert leader.retention.propagate == new.retention.propagate

    def _counts(self, new: NewSequence, layer: int) -> list[int]:
        """Tokens that each head of a layer keeps of the prompt."""
        retention: Retention = new.retention
        if self.windows[layer]:
            return [min(new.prompt_tokens, self.windows[layer])] * self.num_heads
        numbers = [number for number, window in enumerate(self.windows) if not window]
        # Only for such shapes as do not name layers: the global ones as if they were all.
        globally = retention.row_tokens(new.prompt_tokens, len(numbers), self.num_heads)
        rows = globally[numbers.index(layer)]
        if not retention.ragged:
            return [int(n) for n in rows]
        seed = f"{new.token_ids[: 4 * new.prompt_tokens].hex()}/{layer}"
        return split_ragged(int(rows.sum()), self.num_heads, new.prompt_tokens, seed)

    def _kept(self, worker: FakeWorker, groups: tuple[PrefillGroup, ...]) -> tuple[KeptCounts, ...]:
        info = worker.info
        kept = []
        for group in groups:
            if not group.start_layer < info.stop_layer <= group.stop_layer:
                continue
            for slot in group.slots:
                if slot in worker.refused:
                    continue
                counts = [
                    [
                        worker.rows[slot][layer, head]
                        for head in range(info.start_head, info.stop_head)
                    ]
                    for layer in range(info.start_layer, info.stop_layer)
                ]
                kept.append(KeptCounts(slot, np.array(counts, dtype=np.int32).tobytes()))
        return tuple(kept)

    def _decode(self, item: DecodeItem) -> None:
        held = self.slots[item.slot]
        assert held.prefilled_layers == self.num_layers, "decode before prefill has ended"
        assert item.position == held.fed, "tokens are fed in order"
        held.fed += item.num_tokens
        assert held.fed <= len(held.tokens), "a token is fed before it is known"
        for worker in self.fakes:
            more = {
                (layer, head): min(item.num_tokens, (self.windows[layer] or 10**9) - length)
                for (layer, head), length in worker.rows.get(item.slot, {}).items()
            }
            worker.try_add(item.slot, more)

    def _compact(self, item: DecodeItem) -> None:
        """Cut rows back that have grown by the slack beyond their target, counted one by one."""
        held = self.slots[item.slot]
        retention, prompt_tokens = held.new.retention, held.new.prompt_tokens
        if retention.decode is None:
            return
        assert retention.budget is not None
        assert isinstance(retention.decode, DecodeStage), "the books know no other stage"
        slack = retention.decode.slack_pages * self._infos[0].page_tokens
        most = max(retention.budget - prompt_tokens, 0) + slack
        grown = 0
        for position in range(prompt_tokens, held.fed):
            if grown == most:
                assert position <= item.position, "a step spans a compaction"
                grown -= slack
            grown += 1
        if grown == most:
            for worker in self.fakes:
                rows = worker.rows.get(item.slot, {})
                cut = {row: n - slack for row, n in rows.items() if not self.windows[row[0]]}
                rows.update(cut)

    def _read_out(
        self, plan: StepPlan, ended: list[int]
    ) -> tuple[tuple[SampledToken, ...], tuple[ScoredTokens, ...]]:
        sampled: list[SampledToken] = []
        scored: list[ScoredTokens] = []
        for slot in ended:
            held = self.slots[slot]
            if held.new.score:
                scored.append(self._score(slot, held.fed, 1))
            elif len(held.tokens) == held.fed:
                sampled.append(self._sample(slot))
        for item in plan.decode:
            if item.sample:
                assert not self.slots[item.slot].new.score
                sampled.append(self._sample(item.slot))
            elif self.slots[item.slot].new.score:
                scored.append(self._score(item.slot, item.position + 1, item.num_tokens))
        refused = set().union(*(worker.refused for worker in self.fakes))
        # As on real workers: only refusals that the last stage knows of hold results back.
        refused &= {
            s for w in self.fakes if self._speaks(w, len(self.stages) - 1) for s in w.refused
        }
        return (
            tuple(s for s in sampled if s.slot not in refused),
            tuple(s for s in scored if s.slot not in refused),
        )

    def _score_prompts(self, ended: list[int]) -> tuple[PromptScores, ...]:
        """Scores of prompts that ask for them, the best tokens left out."""
        found = []
        refused = set().union(*(worker.refused for worker in self.fakes))
        for slot in ended:
            new = self.slots[slot].new
            if new.sampling.num_prompt_logprobs is None or slot in refused:
                continue
            tokens = self.slots[slot].tokens[: new.prompt_tokens]
            scores = [token_logprob(tokens[:p], tokens[p]) for p in range(1, len(tokens))]
            logprobs = np.array([logprob for logprob, _ in scores], dtype=np.float32)
            ranks = np.array([rank for _, rank in scores], dtype=np.int32)
            found.append(PromptScores(slot, logprobs.tobytes(), ranks.tobytes()))
        self.num_prompts_scored += len(found)
        return tuple(found)

    def _sample(self, slot: int) -> SampledToken:
        held = self.slots[slot]
        assert held.fed == len(held.tokens), "sampling needs all tokens fed"
        token = next_token(held.tokens, self.vocab_size)
        if held.new.sampling.blocked_token_ids:
            generated = len(held.tokens) - held.new.prompt_tokens
            while generated < held.new.sampling.min_tokens:
                if token not in held.new.sampling.blocked_token_ids:
                    break
                token = (token + 1) % self.vocab_size
        logprobs = None
        if held.new.sampling.num_logprobs is not None:
            logprob, rank = token_logprob(held.tokens, token)
            best = tuple(range(held.new.sampling.num_logprobs))
            logprobs = TokenLogprobs(logprob, rank, best, tuple(-float(i) for i in best))
        held.tokens.append(token)
        return SampledToken(slot, len(held.tokens) - 1, token, logprobs)

    def _score(self, slot: int, position: int, num_tokens: int) -> ScoredTokens:
        tokens = self.slots[slot].tokens
        scores = [
            token_logprob(tokens[:p], tokens[p]) for p in range(position, position + num_tokens)
        ]
        return ScoredTokens(
            slot, position, tuple(s for s, _ in scores), tuple(rank for _, rank in scores)
        )

    def _speaks(self, worker: FakeWorker, last_stage: int) -> bool:
        return worker.info.pipeline_rank == last_stage and worker.info.tensor_rank == 0
