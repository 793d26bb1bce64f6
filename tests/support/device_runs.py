"""The same plans by the device's own decode steps, on one rank or several, and in the general way.

Ranks import this file, so it imports nothing slow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, NewSequence, SamplingSpec, StepPlan, StepResult
from saqqara.workers.worker import Worker

from .plans import new_sequence, prefill_plan
from .ranks import Store, leave_together
from .tiny import VOCAB

PAGE = 8
NUM_LAYERS = 2
NUM_STEPS = 4
REFUSED_SLOT, REFUSED_STEP = 3, 0  # the last of the device's own, where pages are short
LAYOUTS = {
    "tp2": MeshLayout(tensor_size=2),  # 2 + 1 kv heads
    "pp2": MeshLayout(pipeline_size=2),
    "tp2pp2": MeshLayout(tensor_size=2, pipeline_size=2),
}
PUBLISHED = {
    "rho": 0.5,
    "min_context": 4,
    "recent_ratio": 0.05,
    "decode": {"trigger": "published", "exceed": 2},
}
CASES: tuple[tuple[str, dict[str, Any] | None, SamplingSpec], ...] = (
    ("full", None, SamplingSpec(temperature=0.0)),
    ("snapkv", {"budget": 10, "window": 4}, SamplingSpec(temperature=0.9, seed=7)),
    ("pyramidkv", {"budget": 10, "window": 4}, SamplingSpec(seed=5, top_p=0.8, num_logprobs=2)),
    (
        "adakv",
        {"budget": 10, "window": 4},
        SamplingSpec(temperature=0.0, repetition_penalty=1.3, logit_bias=((9, 1.0),)),
    ),
    ("pyramidinfer", PUBLISHED, SamplingSpec(temperature=0.0)),  # cuts in the third step
)


def sequences() -> list[NewSequence]:
    """One of each case."""
    rng = np.random.default_rng(11)
    return [
        new_sequence(
            slot,
            rng.integers(3, VOCAB, 13 + 2 * slot).tolist(),
            sampling=spec,
            retention=Retention.parse(None if given is None else {"method": method, **given}),
        )
        for slot, (method, given, spec) in enumerate(CASES)
    ]


def make_config(folder: Path, layout: MeshLayout, attention: str) -> EngineConfig:
    """Settings of one rank."""
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=len(CASES),
        max_model_len=128,
        page_tokens=PAGE,
        num_threads=1,
        kv_memory_gib=0.01,
        warmup=False,
        attention_backend=attention,
        layer_split=(1, 1) if layout.pipeline_size == 2 else None,
        pipeline_parallel_size=layout.pipeline_size,
        tensor_parallel_size=layout.tensor_size,
        executor="local" if layout.world_size == 1 else "ray",
    )


@dataclass
class Run:
    """What one rank did.

    Attributes:
        results: of each plan.
        on_device: how many steps were the device's own.
    """

    results: list[StepResult] = field(default_factory=list)
    on_device: int = 0

    def tokens(self) -> dict[int, list[int]]:
        """Those that were sampled, by slot."""
        found: dict[int, list[int]] = {}
        for token in (token for result in self.results for token in result.sampled):
            found.setdefault(token.slot, []).append(token.token_id)
        return found


def run(worker: Worker, *, short: bool = False) -> Run:
    """Prefill all together, then decode; two plans are in flight where results may come late.

    Where it is `short`, the worker finds no pages once, and gives its last slot up.
    """
    done, new = Run(), sequences()
    device = worker._decode._on_device
    if device is not None:
        _count(device, done)
    in_flight = [worker.begin(prefill_plan(worker, new))]
    for step in range(NUM_STEPS):
        if short and step == REFUSED_STEP:
            _fail_once(worker)
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
        in_flight.append(worker.begin(StepPlan(step + 1, decode=items)))
        done.results.append(in_flight.pop(0).result())
        worker.check_integrity()
    done.results.append(in_flight.pop().result())
    done.results.append(worker.execute(StepPlan(9, free=tuple(n.slot for n in new))))
    worker.check_integrity()
    assert done.results[-1].pages_free == worker.info.num_pages
    return done


def run_layouts(folder: Path, rank: int, stores: Sequence[Store]) -> dict[str, Run]:
    """What one of four rank processes does: the layouts that have such a rank, in turns."""
    found = {}
    for (name, layout), store in zip(LAYOUTS.items(), stores, strict=True):
        if rank < layout.world_size:
            settings = make_config(folder, layout, "triton").for_worker()
            worker = Worker(settings, layout, rank, store)
            found[name] = run(worker, short=rank == 1)
            leave_together(worker)
    return found


def _count(device: Any, done: Run) -> None:
    step = device._step

    def counted(*args: Any) -> Any:
        done.on_device += 1
        return step(*args)

    device._step = counted


def _fail_once(worker: Worker) -> None:
    grow = worker.kv.grow
    answers = iter([False])
    worker.kv.grow = lambda slots: next(answers, True) and grow(slots)  # type: ignore[method-assign]
