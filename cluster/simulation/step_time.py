"""How long each pipeline stage takes for a plan, by the cost model.

Shapes: S slots, W ranks, N decoded slots of a plan, L layers.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.planning.cost_model import CostModel
from saqqara.cluster.planning.memory import ReplicaMemory
from saqqara.compression.growth import TrimmedRows, cycle_of, grown, trimmed_rows
from saqqara.compression.retention import Retention
from saqqara.workers.footprint import Footprint
from saqqara.workers.plan import NewSequence, PrefillGroup, StepPlan

_REMEMBERED = 16384  # kinds of prefill groups, by the lengths of their prompts


class Pipeline:
    """When plans end that go through the stages one after the other.

    Args:
        num_stages: each works on one plan at a time.
        controller_seconds: that a stage waits between two plans.
    """

    def __init__(self, num_stages: int, controller_seconds: float) -> None:
        self._controller_seconds = controller_seconds
        self._free = [0.0] * num_stages
        self._ends = [0.0] * num_stages

    def end_of(self, seconds: Sequence[float], now: float) -> float:
        """When a plan ends that is given now and takes each stage so long."""
        reached = now
        for stage, mine in enumerate(seconds):
            reached = max(reached, self._free[stage]) + mine
            self._ends[stage] = reached
            self._free[stage] = reached + self._controller_seconds
        return reached + self._controller_seconds

    def unfinished(self, now: float) -> float:
        """Seconds that the stages would still work on what they were given, at most one plan's."""
        return sum(max(end - now, 0.0) for end in self._ends)

    def start(self, now: float) -> None:
        """Begin with nothing."""
        self._free = [now] * len(self._free)
        self._ends = [now] * len(self._ends)


class StepTimes:
    """Follows the plans of a replica, which must come in order, and says what each takes.

    A part of a prefill takes its share of the group's time, by tokens x layers. A step that feeds
    several known tokens of a sequence takes as long as one that feeds as many sequences one.

    Args:
        memory: the replica.
        cost: of its ranks.
        max_num_seqs: slots.
    """

    def __init__(self, memory: ReplicaMemory, cost: CostModel, max_num_seqs: int) -> None:
        self._spec = memory.model.spec
        self._page_tokens = memory.sizes.page_tokens
        self._cost = cost
        self._ranks = memory.ranks
        self._kinds, self._kind_W = _kinds(memory.ranks)
        layout = memory.ranks[0].layout
        self.num_stages = layout.pipeline_size
        self._stage_of_kind = [layout.pipeline_rank(rank.rank) for rank in self._kinds]
        self._rows_W, self._local_rows_W = _rows(memory.ranks)
        num_ranks = len(self._ranks)
        self._prompt_S = np.zeros(max_num_seqs, dtype=np.int64)
        self._grace_S = np.zeros(max_num_seqs, dtype=np.int64)
        self._slack_S = np.zeros(max_num_seqs, dtype=np.int64)
        self._kept_SW = np.zeros((max_num_seqs, num_ranks), dtype=np.int64)
        self._leaders: dict[int, tuple[Retention, int]] = {}
        self._trimmed: dict[int, _TrimmedReads] = {}
        self._reads = lru_cache(maxsize=_REMEMBERED)(self._reads_of)
        self._group = lru_cache(maxsize=_REMEMBERED)(self._group_seconds)

    def seconds(self, plan: StepPlan) -> list[float]:
        """What each stage takes, one after the other, for what a plan gives it."""
        for slot in plan.free:
            self._leaders.pop(slot, None)
            self._trimmed.pop(slot, None)
        for new in plan.new:
            self._open(new)
        seconds_S = [0.0] * self.num_stages
        for group in plan.prefill:
            for stage, seconds in enumerate(self._prefill(group)):
                seconds_S[stage] += seconds
        if plan.decode:
            for stage, seconds in enumerate(self._decode(plan)):
                seconds_S[stage] += seconds
        return seconds_S

    def forget(self) -> None:
        """Other ranks start, which hold nothing."""
        self._leaders.clear()
        self._trimmed.clear()

    def _open(self, new: NewSequence) -> None:
        slot, prompt, retention = new.slot, new.prompt_tokens, new.retention
        kept_W, trimmed = self._reads(retention, prompt)
        self._prompt_S[slot] = prompt
        self._kept_SW[slot] = kept_W
        cycle = cycle_of(retention, prompt, self._page_tokens)
        self._grace_S[slot], self._slack_S[slot] = (cycle.grace, cycle.slack) if cycle else (0, 0)
        if trimmed is not None:
            self._trimmed[slot] = trimmed
        if new.shares_prefill_with is None:
            self._leaders[slot] = (retention, prompt)

    def _reads_of(
        self, retention: Retention, prompt: int
    ) -> "tuple[NDArray[np.int64], _TrimmedReads | None]":
        """Tokens that each rank's global rows keep of a prompt, int64 [W]; how they are trimmed."""
        spec = self._spec
        kept_LH = retention.row_tokens(prompt, spec.layers, spec.num_kv_heads).copy()
        kept_LH[list(spec.layers.local_layers)] = 0
        kept_W = np.array(
            [
                kept_LH[r.layers.start : r.layers.stop, r.heads.kv.start : r.heads.kv.stop].sum()
                for r in self._ranks
            ],
            dtype=np.int64,
        )
        rows = trimmed_rows(retention, prompt, spec.layers)
        if rows is None:
            return kept_W, None
        layers = np.arange(spec.num_layers)
        heads = [
            ((r.layers.start <= layers) & (layers < r.layers.stop)) * len(r.heads.kv)
            for r in self._ranks
        ]
        return kept_W, _TrimmedReads(rows, np.array(heads, dtype=np.int64))

    def _decode(self, plan: StepPlan) -> list[float]:
        items = np.array([(i.slot, i.position, i.num_tokens) for i in plan.decode], dtype=np.int64)
        slots, num_tokens = items[:, 0], items[:, 2]
        # Of several tokens of a sequence the one in the middle stands for all.
        fed = items[:, 1] - self._prompt_S[slots] + num_tokens // 2
        growth = grown(fed, self._grace_S[slots], self._slack_S[slots]) + 1
        reads_NW = self._kept_SW[slots] + growth[:, None] * self._rows_W
        local_N = np.minimum(self._prompt_S[slots] + fed + 1, self._spec.layers.window)
        reads_NW += local_N[:, None] * self._local_rows_W
        if self._trimmed:
            for place, slot in enumerate(slots.tolist()):
                if slot in self._trimmed:
                    reads_NW[place] = self._trimmed[slot].reads(int(fed[place]))
        reads_W = (reads_NW * num_tokens[:, None]).sum(axis=0).tolist()
        most = [0] * len(self._kinds)  # of the rank of its kind that reads most
        for kind, reads in zip(self._kind_W, reads_W, strict=True):
            most[kind] = max(most[kind], reads)
        total = int(num_tokens.sum())
        per_kind = [
            self._cost.decode_seconds(rank, total, reads / total)
            for rank, reads in zip(self._kinds, most, strict=True)
        ]
        return self._by_stage(per_kind)

    def _prefill(self, group: PrefillGroup) -> list[float]:
        """What each stage takes for its part of a group's layers."""
        leaders = tuple(self._leaders[slot] for slot in group.slots if slot in self._leaders)
        if not leaders:
            return [0.0] * self.num_stages
        whole_S, layer_tokens = self._group(leaders)
        start, stop = group.start_layer, group.stop_layer
        part_S = [0.0] * self.num_stages
        for kind, rank in enumerate(self._kinds):
            stage = self._stage_of_kind[kind]
            layers = rank.layers
            if start < layers.stop and layers.start < stop:
                mine = layer_tokens[layers.start : layers.stop].sum()
                here = layer_tokens[max(start, layers.start) : min(stop, layers.stop)].sum()
                part_S[stage] = whole_S[stage] * float(here / mine)
        return part_S

    def _group_seconds(
        self, leaders: tuple[tuple[Retention, int], ...]
    ) -> tuple[list[float], NDArray[np.int64]]:
        """Of a whole group: seconds of each stage, and tokens that enter each layer, int64 [L]."""
        layers = self._spec.layers
        entering = [of.entering_tokens(prompt, layers) for of, prompt in leaders]
        per_kind = [self._cost.group_seconds(rank, entering) for rank in self._kinds]
        return self._by_stage(per_kind), np.array(entering, dtype=np.int64).sum(axis=0)

    def _by_stage(self, per_kind: Sequence[float]) -> list[float]:
        """The slowest rank of each stage sets its pace."""
        seconds_S = [0.0] * self.num_stages
        for stage, seconds in zip(self._stage_of_kind, per_kind, strict=True):
            seconds_S[stage] = max(seconds_S[stage], seconds)
        return seconds_S


def _rows(ranks: Sequence[Footprint]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a sequence on each rank, int64 [W]: of global layers, and of local ones."""
    windows = ranks[0].spec.layers.windows
    local = [len(r.heads.kv) * sum(windows[layer] > 0 for layer in r.layers) for r in ranks]
    local_W = np.array(local, dtype=np.int64)
    return np.array([rank.num_rows for rank in ranks], dtype=np.int64) - local_W, local_W


def _kinds(ranks: Sequence[Footprint]) -> tuple[list[Footprint], list[int]]:
    """Ranks that take different times for the same work, one of each kind; the kind of each."""
    kinds: dict[tuple[object, ...], int] = {}
    examples: list[Footprint] = []
    kind_W: list[int] = []
    for rank in ranks:
        numbers = (rank.attention_numbers, rank.mean_mlp_numbers(), rank.head_numbers)
        key = (rank.layers, len(rank.heads.query), len(rank.heads.kv), *numbers)
        if key not in kinds:
            kinds[key] = len(examples)
            examples.append(rank)
        kind_W.append(kinds[key])
    return examples, kind_W


class _TrimmedReads:
    """Tokens that a step reads of trimmed rows, by how many were fed before it.

    Args:
        rows: after prefill.
        heads: of each layer on each rank, int64 [W, L].
    """

    def __init__(self, rows: TrimmedRows, heads: NDArray[np.int64]) -> None:
        self._rows = rows.copy()
        self._heads_WL = heads
        self._known: list[NDArray[np.int64]] = []

    def reads(self, fed: int) -> NDArray[np.int64]:
        """Tokens on each rank, int64 [W]."""
        while len(self._known) <= fed:
            self._known.append(self._heads_WL @ (self._rows.stored + 1))
            self._rows.feed(1)
        return self._known[fed]
