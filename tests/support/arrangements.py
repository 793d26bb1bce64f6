"""The sequences of the method suite on workers: alone, together, and on several ranks.

Ranks import this file, so it imports nothing slow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, PrefillGroup, StepPlan
from saqqara.workers.worker import Worker

from .methods import PAGE, Case
from .plans import new_sequence

LAYOUTS = {
    "tp2": MeshLayout(tensor_size=2),  # 2 + 1 kv heads
    "tp4": MeshLayout(tensor_size=4),  # two ranks share a kv head and have one of its queries each
    "pp2": MeshLayout(pipeline_size=2),  # 2 + 3 layers
}

Row = tuple[Case, int, int, int]
"""(case, fed tokens, layer, kv head)"""


@dataclass
class Outcome:
    """Sampled tokens of each case, and what each row held: keys beside values [m, 2 D].

    Rows are numpy arrays: tensors would be shared between processes, which may end too early.
    """

    tokens: dict[Case, list[int]] = field(default_factory=dict)
    rows: dict[Row, Any] = field(default_factory=dict)

    def join(self, other: "Outcome") -> None:
        """Add what another rank or run has."""
        for case, tokens in other.tokens.items():
            self.tokens.setdefault(case, []).extend(tokens)
        self.rows |= other.rows


def is_run(case: Case, arrangement: str) -> bool:
    """Whether a case is part of an arrangement: steps of four ranks are slow on two cores."""
    return arrangement != "tp4" or case.stage_name == "prefill"


def is_looked_at(case: Case, fed_tokens: int) -> bool:
    """Whether rows are compared after so many tokens: after the prefill, halfway, at the end."""
    return fed_tokens in (0, case.stage.num_steps // 2, case.stage.num_steps)


def config_of(
    folder: Path, layout: MeshLayout, num_cases: int, attention: str = "torch"
) -> EngineConfig:
    """Settings of one rank."""
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=num_cases,
        page_tokens=PAGE,
        num_threads=1,
        kv_memory_gib=0.05,
        warmup=False,
        attention_backend=attention,
        layer_split=(2, 3) if layout.pipeline_size == 2 else None,
        pipeline_parallel_size=layout.pipeline_size,
        tensor_parallel_size=layout.tensor_size,
        executor="local" if layout.world_size == 1 else "ray",
    )


def run_cases(worker: Worker, cases: Sequence[Case]) -> Outcome:
    """All cases in one packed prefill group; then they decode together."""
    outcome = Outcome()
    new = [
        new_sequence(slot, list(case.prompt), retention=case.retention)
        for slot, case in enumerate(cases)
    ]
    group = PrefillGroup(tuple(range(len(cases))), 0, worker.spec.num_layers)
    plan = StepPlan(0, new=tuple(new), prefill=(group,))
    for fed in range(max(case.stage.num_steps for case in cases) + 1):
        result = worker.execute(plan)
        assert result.refused == ()
        worker.check_integrity()
        for sampled in result.sampled:
            outcome.tokens.setdefault(cases[sampled.slot], []).append(sampled.token_id)
        for slot, case in enumerate(cases):
            if is_looked_at(case, fed):
                outcome.rows |= _rows(worker, slot, case, fed)
        items = tuple(
            DecodeItem(slot, len(case.prompt) + fed)
            for slot, case in enumerate(cases)
            if fed < case.stage.num_steps
        )
        plan = StepPlan(fed + 1, decode=items)
    worker.execute(StepPlan(plan.step + 1, free=tuple(range(len(cases)))))
    worker.check_integrity()
    assert worker.kv.pages_free == worker.kv.num_pages
    return outcome


def replay_cases(worker: Worker, cases: Sequence[Case], known: dict[Case, list[int]]) -> Outcome:
    """All cases at once, as they go on after a preemption: half of their tokens are known already.

    They are prefilled anew and fed these tokens one by one, then they generate the rest.
    """
    outcome, halves = Outcome(), {case: case.stage.num_steps // 2 for case in cases}
    new = tuple(
        new_sequence(slot, list(case.prompt), known[case][: halves[case]], retention=case.retention)
        for slot, case in enumerate(cases)
    )
    group = PrefillGroup(tuple(range(len(cases))), 0, worker.spec.num_layers)
    plan = StepPlan(0, new=new, prefill=(group,))
    for fed in range(max(case.stage.num_steps for case in cases) + 1):
        for sampled in worker.execute(plan).sampled:
            outcome.tokens.setdefault(cases[sampled.slot], []).append(sampled.token_id)
        worker.check_integrity()
        for slot, case in enumerate(cases):
            if fed == case.stage.num_steps:
                outcome.rows |= _rows(worker, slot, case, fed)
        items = tuple(
            DecodeItem(slot, len(case.prompt) + fed, sample=fed >= halves[case] - 1)
            for slot, case in enumerate(cases)
            if fed < case.stage.num_steps
        )
        plan = StepPlan(fed + 1, decode=items)
    worker.execute(StepPlan(plan.step + 1, free=tuple(range(len(cases)))))
    return outcome


def _rows(worker: Worker, slot: int, case: Case, fed: int) -> dict[Row, Any]:
    info = worker.info
    return {
        (case, fed, layer, head): torch.cat(
            worker.kv.read(slot, layer - info.start_layer, head - info.start_head), dim=1
        ).numpy()
        for layer in range(info.start_layer, info.stop_layer)
        for head in range(info.start_head, info.stop_head)
    }


def run_all_layouts(
    folder: Path, cases: Sequence[Case], rank: int, stores: Sequence[tuple[str, int]]
) -> dict[str, Outcome]:
    """What one of four rank processes does: the layouts that have such a rank, in turns."""
    found = {}
    for (name, layout), store in zip(LAYOUTS.items(), stores, strict=True):
        if rank < layout.world_size:
            mine = [case for case in cases if is_run(case, name)]
            worker = Worker(config_of(folder, layout, len(mine)).for_worker(), layout, rank, store)
            found[name] = run_cases(worker, mine)
            worker._shard.part.mesh.barrier()  # who leaves first drops what the others still read
            worker.close()
    return found
