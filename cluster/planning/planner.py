"""Every way to lay a model out over some GPUs, what fits and how fast it is; the best first.

A replica has `tensor` x `pipeline` ranks, one on each GPU. A tensor group lies on one node; stages
may lie on several.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from saqqara.compression.retention import Retention
from saqqara.workers.footprint import Footprint, stage_layers
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.models.spec import ItemSize

from .cost_model import CostModel, Factors
from .devices import Device
from .memory import EngineSizes, RankMemory, ReplicaMemory
from .models import PlannedModel
from .workload import Workload

FULL = Retention.parse(None)


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype by name; its size is all that counts here."""

    name: str
    itemsize: int


DTYPES = {d.name: d for d in (Dtype("bfloat16", 2), Dtype("float16", 2), Dtype("float32", 4))}


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned.

    Attributes:
        model: to be served.
        device: the GPUs.
        num_gpus: all of them, spread evenly over `num_nodes`.
        workload: what is asked of them.
        dtype: of weights, keys and values.
        sizes: the engine's settings.
        factors: of the cost model.
        hour_price: of one GPU, in dollars; None: not known.
        num_requests: of a job, all there at once; None: no job.
        tensor, pipeline: this layout only; None: any.
        split: layers of each stage; None: balanced.
    """

    model: PlannedModel
    device: Device
    num_gpus: int
    num_nodes: int
    workload: Workload
    dtype: ItemSize
    sizes: EngineSizes
    factors: Factors
    hour_price: float | None = None
    num_requests: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    split: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_gpus % self.num_nodes:
            even = [str(n) for n in range(1, self.num_gpus + 1) if self.num_gpus % n == 0]
            raise ValueError(
                f"gpus: {self.num_gpus} cannot be spread evenly over {self.num_nodes} nodes, of "
                f"{self.device.gpus_per_node} each if nodes is not given; over "
                f"{', '.join(even[:8])} nodes they can"
            )
        self._check_shape()
        length = self.workload.prompt_tokens + self.workload.new_tokens
        if length > self.sizes.max_model_len:
            raise ValueError(
                f"new_tokens: {self.workload.prompt_tokens} tokens in and "
                f"{self.workload.new_tokens} out are more than max_model_len="
                f"{self.sizes.max_model_len}"
            )

    def _check_shape(self) -> None:
        """Raise a ValueError where no layout at all can be what is asked for."""
        spec, split = self.model.spec, self.split
        if self.tensor is not None and self.tensor > spec.num_query_heads:
            raise ValueError(
                f"tensor_parallel_size: {self.tensor} is more than the model's "
                f"{spec.num_query_heads} query heads"
            )
        if self.pipeline is not None and self.pipeline > spec.num_layers:
            raise ValueError(
                f"pipeline_parallel_size: {self.pipeline} is more than the model's "
                f"{spec.num_layers} layers"
            )
        if split is not None and (min(split) < 1 or sum(split) != spec.num_layers):
            raise ValueError(
                f"layer_split: {','.join(map(str, split))} must be numbers from 1 on that add up "
                f"to the model's {spec.num_layers} layers"
            )
        if split is not None and self.pipeline not in (None, len(split)):
            raise ValueError(
                f"layer_split: it names {len(split)} stages, not pipeline_parallel_size="
                f"{self.pipeline}"
            )
        if next(layouts(self), None) is None:
            raise ValueError(
                f"gpus: no layout of this shape uses all of {self.num_gpus} GPUs; "
                "tensor x pipeline must divide their number"
            )

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node."""
        return self.num_gpus // self.num_nodes


@dataclass(frozen=True, slots=True)
class Rates:
    """What all replicas of a layout do together under one retention.

    Attributes:
        sequences: of one replica that fit at once and never need to be preempted.
        prefill_tokens_per_second: prompt tokens, were nothing else done.
        decode_tokens_per_second: new tokens, were nothing else done, all sequences at once.
        output_tokens_per_second: new tokens where prompts come as fast as answers end.
        step_seconds: between two tokens of an answer, all sequences at once.
        prompt_seconds: from a prompt to its first token on an idle replica.
    """

    sequences: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    output_tokens_per_second: float
    step_seconds: float
    prompt_seconds: float


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """One layout: what each rank of a replica holds, and what it does.

    Attributes:
        tensor, pipeline, replicas: their product is the number of GPUs.
        ranks: of one replica, with as many slots as sequences fit; empty where `why_not`.
        kept: rates under the retention that was asked for.
        full: rates under full retention; None where not even one sequence fits.
        dollars_per_million: new tokens; None without a price.
        job_seconds: for all requests of a job; None without one.
        why_not: why it cannot serve at all; None if it can.
    """

    tensor: int
    pipeline: int
    replicas: int
    ranks: tuple[RankMemory, ...] = ()
    kept: Rates | None = None
    full: Rates | None = None
    dollars_per_million: float | None = None
    job_seconds: float | None = None
    why_not: str | None = None


def plan(question: Question) -> list[LayoutPlan]:
    """All layouts, the most new tokens a second first, then those that cannot serve.

    Raises:
        ValueError: the retention does not go with the model.
    """
    question.workload.attended_tokens(question.model.spec, question.sizes.page_tokens)
    plans = [_planned(question, *sizes) for sizes in layouts(question)]
    return sorted(plans, key=_rank_of)


def layouts(question: Question) -> Iterator[tuple[MeshLayout, int]]:
    """Each layout of a replica that uses all GPUs, and how many replicas there are."""
    for tensor in range(1, question.num_gpus + 1):
        for pipeline in range(1, question.num_gpus // tensor + 1):
            if question.num_gpus % (tensor * pipeline):
                continue
            if question.tensor not in (None, tensor) or question.pipeline not in (None, pipeline):
                continue
            if question.split is not None and len(question.split) != pipeline:
                continue
            yield MeshLayout(tensor, pipeline), question.num_gpus // (tensor * pipeline)


def estimate(question: Question, layout: MeshLayout, replicas: int) -> Rates | None:
    """The rates of one layout under the question's retention; None where nothing fits.

    Raises:
        ValueError: the model cannot be cut like this.
    """
    memory = replica_memory(question, layout)
    sequences = memory.most_sequences()
    return _rates(question, memory, replicas, sequences) if sequences else None


def cost_model_of(question: Question, layout: MeshLayout) -> CostModel:
    """The cost model of a replica's ranks where its stages lie."""
    per_node = question.gpus_per_node
    return CostModel(
        question.model,
        question.device,
        question.factors,
        ranks_on_node=per_node,
        hops_between_nodes=layout.world_size > per_node,
    )


def _planned(question: Question, layout: MeshLayout, replicas: int) -> LayoutPlan:
    plan = LayoutPlan(layout.tensor_size, layout.pipeline_size, replicas)
    if (why_not := _unplaceable(question, layout, replicas)) is not None:
        return replace(plan, why_not=why_not)
    try:
        memory = replica_memory(question, layout)
    except ValueError as error:
        return replace(plan, why_not=str(error))
    sequences = memory.most_sequences()
    if sequences == 0:
        return replace(plan, why_not=memory.why_not() + _fitting_split(question, layout))
    kept = _rates(question, memory, replicas, sequences)
    asked_full = question.workload.retention == FULL
    full_question = replace(question, workload=replace(question.workload, retention=FULL))
    full = kept if asked_full else estimate(full_question, layout, replicas)
    dollars = None
    if question.hour_price is not None:
        an_hour = question.hour_price * question.num_gpus
        dollars = an_hour / (3600 * kept.output_tokens_per_second) * 1e6
    job = None
    if question.num_requests is not None:
        job = _job_seconds(question, memory, replicas, sequences, question.num_requests)
    return replace(
        plan,
        ranks=memory.at(question.sizes.max_num_seqs or sequences),
        kept=kept,
        full=full,
        dollars_per_million=dollars,
        job_seconds=job,
    )


def _job_seconds(
    question: Question, memory: ReplicaMemory, replicas: int, sequences: int, num_requests: int
) -> float:
    """Time for so many requests that are there at once, as many running as fit.

    Later stages have nothing to do until the first group of prompts comes to them.
    """
    each, prompt_tokens = -(-num_requests // replicas), question.workload.prompt_tokens
    rates = _rates(question, memory, 1, min(sequences, each))
    group = min(each, max(question.sizes.max_prefill_tokens // prompt_tokens, 1))
    stages = memory.ranks[0].layout.pipeline_size
    filling = (stages - 1) * group * prompt_tokens / rates.prefill_tokens_per_second
    return each * question.workload.new_tokens / rates.output_tokens_per_second + filling


def _fitting_split(question: Question, layout: MeshLayout) -> str:
    """Which split would fit, where the one that counts what layers keep does not."""
    if question.split is not None:
        return ""
    even = tuple(map(len, stage_layers(question.model.spec, layout.pipeline_size)))
    if not replica_memory(replace(question, split=even), layout).most_sequences():
        return ""
    return f"; --layer-split {','.join(map(str, even))} fits"


def _unplaceable(question: Question, layout: MeshLayout, replicas: int) -> str | None:
    """Why the tensor groups of all replicas cannot each lie on one node."""
    per_node, tensor = question.gpus_per_node, layout.tensor_size
    if tensor > per_node:
        return f"a tensor group of {tensor} does not fit on a node of {per_node}"
    if (per_node // tensor) * question.num_nodes < layout.pipeline_size * replicas:
        return f"nodes of {per_node} cannot be filled with tensor groups of {tensor}"
    return None


def replica_memory(question: Question, layout: MeshLayout) -> ReplicaMemory:
    """What one replica of a layout holds.

    Raises:
        ValueError: the model cannot be cut like this.
    """
    model, workload = question.model, question.workload
    ranks = Footprint.of_ranks(
        model.spec, question.dtype, layout, question.split, workload.retention
    )
    return ReplicaMemory(model, question.device, ranks, question.sizes, workload)


def _rates(question: Question, memory: ReplicaMemory, replicas: int, sequences: float) -> Rates:
    """Rates with so many sequences in each replica.

    With stages as many plans are in flight, each on its part of the sequences, so a sequence gets a
    token each time the slowest stage has seen all of them.
    """
    workload, spec, sizes = question.workload, question.model.spec, question.sizes
    layout = memory.ranks[0].layout
    cost, stages = cost_model_of(question, layout), layout.pipeline_size
    entering = workload.entering_tokens(spec)
    attended_LH = workload.attended_tokens(spec, sizes.page_tokens)
    num_together = _prompts_together(question, sequences)
    kinds, kind_W = memory.kinds
    attended = [0.0] * len(kinds)  # of the rank of its kind that reads most
    for rank, kind in zip(memory.ranks, kind_W, strict=True):
        heads = slice(rank.heads.kv.start, rank.heads.kv.stop)
        rows = attended_LH[rank.layers.start : rank.layers.stop, heads]
        attended[kind] = max(attended[kind], float(rows.sum()))
    prompts_S, alone_S, steps_S = [0.0] * stages, [0.0] * stages, [0.0] * stages
    for rank, tokens in zip(kinds, attended, strict=True):
        stage = layout.pipeline_rank(rank.rank)
        prompt = cost.group_seconds(rank, [entering], num_together) / num_together
        alone_S[stage] = max(alone_S[stage], cost.group_seconds(rank, [entering]))
        step = cost.decode_seconds(rank, max(sequences / stages, 1.0), tokens)
        prompts_S[stage] = max(prompts_S[stage], prompt)
        steps_S[stage] = max(steps_S[stage], step)
    step_seconds = stages * (max(steps_S) + question.factors.step_seconds)
    per_answer = max(
        prompt + workload.fed_tokens / sequences * stages * (step + question.factors.step_seconds)
        for prompt, step in zip(prompts_S, steps_S, strict=True)
    )
    return Rates(
        sequences=int(sequences),
        prefill_tokens_per_second=replicas * workload.prompt_tokens / max(prompts_S),
        decode_tokens_per_second=replicas * sequences / step_seconds,
        output_tokens_per_second=replicas * workload.new_tokens / per_answer,
        step_seconds=step_seconds,
        prompt_seconds=sum(alone_S) + question.factors.step_seconds,
    )


def _prompts_together(question: Question, sequences: float) -> int:
    """Prompts that a step computes: as many as its tokens allow, and as there are."""
    fit = question.sizes.max_prefill_tokens // question.workload.prompt_tokens
    return max(1, min(fit, int(sequences)))


def _rank_of(plan: LayoutPlan) -> tuple[bool, float, int, int]:
    speed = 0.0 if plan.kept is None else plan.kept.output_tokens_per_second
    return plan.why_not is not None, -speed, plan.pipeline, plan.tensor
