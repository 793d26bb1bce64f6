"""A whole deployment: its replicas are simulated one by one, in as many processes as are wanted.

Shapes: N requests.
"""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np

from saqqara.cluster.planning.planner import (
    LayoutPlan,
    Question,
    cost_model_of,
    estimate,
    plan,
    replica_memory,
)
from saqqara.compression.retention import Retention
from saqqara.configs.quantum import prefill_quantum
from saqqara.workers.mesh.layout import MeshLayout

from .arrivals import Floats, Ints, Trace
from .faults import Outage, Placement
from .measures import Measured, Objective, ReplicaRun, bin_seconds_of, measured
from .replica import Progress, Replica, ReplicaSettings
from .routing import route

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Deployment:
    """A layout of a model over GPUs, and the engine's settings that a plan knows nothing of.

    `prefill_quantum` is as in `EngineConfig`.
    """

    question: Question
    layout: LayoutPlan
    prefill_quantum: int | str | None
    max_extend_tokens: int

    @classmethod
    def best(
        cls, question: Question, prefill_quantum: int | str | None, max_extend_tokens: int
    ) -> "Deployment":
        """The layout that the planner puts first.

        Raises:
            ValueError: none can serve; says why not.
        """
        first = plan(question)
        if first[0].kept is None:
            raise ValueError(f"gpus: no layout can serve: {first[0].why_not}")
        return cls(question, first[0], prefill_quantum, max_extend_tokens)

    @property
    def mesh(self) -> MeshLayout:
        """The layout of a replica."""
        return MeshLayout(self.layout.tensor, self.layout.pipeline)

    @property
    def placement(self) -> Placement:
        """Where the replicas lie."""
        layout, per_node = self.layout, self.question.gpus_per_node
        return Placement(layout.tensor, layout.pipeline, layout.replicas, per_node)

    @property
    def max_num_seqs(self) -> int:
        """Slots of each replica; by default as many as never need to be preempted."""
        assert self.layout.kept is not None
        return self.question.sizes.max_num_seqs or self.layout.kept.sequences

    def under(self, retention: Retention) -> "Deployment":
        """The same layout under another retention, with as many slots as fit under that.

        Raises:
            ValueError: not even one sequence fits.
        """
        workload = replace(self.question.workload, retention=retention)
        question = replace(self.question, workload=workload)
        rates = estimate(question, self.mesh, self.layout.replicas)
        if rates is None:
            raise ValueError(f"against: under {retention.label} not even one sequence fits")
        return replace(self, question=question, layout=replace(self.layout, kept=rates))

    def settings(self) -> ReplicaSettings:
        """Of one replica."""
        question = self.question
        return ReplicaSettings(
            memory=replica_memory(question, self.mesh),
            cost=cost_model_of(question, self.mesh),
            max_num_seqs=self.max_num_seqs,
            prefill_quantum=prefill_quantum(
                self.prefill_quantum,
                question.device.kind,
                self.layout.tensor,
                question.model.spec.layer_parameters,
            ),
            max_extend_tokens=self.max_extend_tokens,
        )

    def work_seconds(self, trace: Trace) -> Floats:
        """For how long each request keeps a replica busy that works on many, float64 [N]."""
        rates, replicas = self.layout.kept, self.layout.replicas
        assert rates is not None
        prompts = trace.prompt_tokens * replicas / rates.prefill_tokens_per_second
        work: Floats = prompts + trace.new_tokens * replicas / rates.decode_tokens_per_second
        return work


def simulate(
    deployment: Deployment,
    trace: Trace,
    outages: Sequence[Sequence[Outage]],
    objective: Objective,
    *,
    processes: int = 1,
    progress: Progress = lambda _: None,
) -> Measured:
    """Run a deployment until every request has ended; the same input gives the same numbers.

    Args:
        deployment: what runs.
        trace: what arrives.
        outages: of each replica.
        objective: what counts as good.
        processes: that replicas are simulated in.
        progress: told of ended requests, from this thread.
    """
    replicas = route(trace.seconds, deployment.work_seconds(trace), outages)
    order = np.argsort(replicas, kind="stable")
    bounds = np.searchsorted(replicas[order], np.arange(len(outages) + 1)).tolist()
    parts = [order[start:stop] for start, stop in pairwise(bounds)]
    span = max([float(trace.seconds[-1]), *(o.back for known in outages for o in known)])
    jobs = [
        (trace.part(part), tuple(known), bin_seconds_of(span))
        for part, known in zip(parts, outages, strict=True)
    ]
    if processes == 1:
        settings = deployment.settings()
        runs = [Replica(settings, *job, progress).simulate() for job in jobs]
    else:
        runs = _in_processes(deployment, jobs, processes, progress)
    prompts: Ints = trace.prompt_tokens[order]
    return measured(runs, prompts, objective, deployment.layout.pipeline)


# Processes ----------------------------------------------------------------------------------------

Job = tuple[Trace, tuple[Outage, ...], float]
_mine: dict[str, Any] = {}  # of a process that simulates replicas


def _in_processes(
    deployment: Deployment, jobs: Sequence[Job], processes: int, progress: Progress
) -> list[ReplicaRun]:
    context = multiprocessing.get_context("spawn")
    ended: Synchronized[int] = context.Value("q", 0)
    known = 0
    with ProcessPoolExecutor(
        min(processes, len(jobs)), context, _start_process, (deployment, ended)
    ) as pool:
        futures = [pool.submit(_simulate_one, job) for job in jobs]
        left: set[Future[ReplicaRun]] = set(futures)
        try:
            while left:
                _, left = wait(left, _POLL_SECONDS, FIRST_COMPLETED)
                now = ended.value
                progress(now - known)
                known = now
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _start_process(deployment: Deployment, ended: "Synchronized[int]") -> None:
    _mine.update(settings=deployment.settings(), ended=ended)


def _simulate_one(job: Job) -> ReplicaRun:
    ended: Synchronized[int] = _mine["ended"]

    def add(number: int) -> None:
        with ended.get_lock():
            ended.value += number

    return Replica(_mine["settings"], *job, add).simulate()
