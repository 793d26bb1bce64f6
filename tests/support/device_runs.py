"""The same plans by the device's own decode steps, on one rank or several, and in the general way.

Ranks import this file, so it imports nothing slow.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, NewSequence, SamplingSpec, StepPlan, StepResult
from saqqara.workers.worker import Worker

from .plans import new_sequence, prefill_plan
from .ranks import TIMEOUT_SECONDS, Store, leave_together, run_ranks
from .tiny import VOCAB

PAGE = 8
NUM_LAYERS = 2
NUM_STEPS = 4
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
Case = tuple[str, dict[str, Any] | None, SamplingSpec]
CASES: tuple[Case, ...] = (
    ("full", None, SamplingSpec(temperature=0.0)),
    ("snapkv", {"budget": 10, "window": 4}, SamplingSpec(temperature=0.9, seed=7)),
    ("pyramidkv", {"budget": 10, "window": 4}, SamplingSpec(seed=5, top_p=0.8, num_logprobs=2)),
    (
        "adakv",
        {"budget": 10, "window": 4},
        SamplingSpec(temperature=0.0, repetition_penalty=1.3, logit_bias=((9, 1.0),)),
    ),
    ("pyramidinfer", PUBLISHED, SamplingSpec(temperature=0.0)),  # cuts in the third step
    ("h2o", {"budget": 10, "decode": {"slack_pages": 1}}, SamplingSpec(temperature=0.0)),
)
SUMMED = 5  # the slot that is never in the device's own step: its attention is summed up


# The same, and others whose rows are cut while they decode; for many steps.
WITH_CUTS = (
    *CASES,
    (
        "snapkv",
        {"budget": 10, "window": 4, "decode": {"slack_pages": 1}},
        SamplingSpec(temperature=0.0),
    ),
    ("adakv", {"budget": 10, "window": 4, "decode": {"slack_pages": 1}}, SamplingSpec(seed=3)),
)


@dataclass(frozen=True)
class Refusal:
    """In a step a rank finds no pages once and gives this slot up: rank 1, or the only one."""

    slot: int
    step: int


def sequences(cases: Sequence[Case] = CASES) -> list[NewSequence]:
    """One of each case."""
    rng = np.random.default_rng(11)
    return [
        new_sequence(
            slot,
            rng.integers(3, VOCAB, 13 + 2 * slot).tolist(),
            sampling=spec,
            retention=Retention.parse(None if given is None else {"method": method, **given}),
        )
        for slot, (method, given, spec) in enumerate(cases)
    ]


def make_config(
    folder: Path, layout: MeshLayout, attention: str, retention: str | dict[str, Any] = "full"
) -> EngineConfig:
    """Settings of one rank."""
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=len(WITH_CUTS),
        max_model_len=128,
        page_tokens=PAGE,
        num_threads=1,
        kv_memory_gib=0.01,
        warmup=False,
        attention_backend=attention,
        layer_split=(1, 1) if layout.pipeline_size == 2 else None,
        pipeline_parallel_size=layout.pipeline_size,
        tensor_parallel_size=layout.tensor_size,
        retention=retention,
        executor="local" if layout.world_size == 1 else "ray",
    )


@dataclass
class Run:
    """What one rank did.

    Attributes:
        results: of each plan.
        on_device: how many steps were the device's own.
        otherwise: the slots that were fed in the general way.
        remembered: queries, and normalisers, for the cuts to come.
    """

    results: list[StepResult] = field(default_factory=list)
    on_device: int = 0
    otherwise: set[int] = field(default_factory=set)
    remembered: list[Tensor] = field(default_factory=list)

    def tokens(self) -> dict[int, list[int]]:
        """Those that were sampled, by slot."""
        found: dict[int, list[int]] = {}
        for token in (token for result in self.results for token in result.sampled):
            found.setdefault(token.slot, []).append(token.token_id)
        return found


def run(
    worker: Worker,
    refusal: Refusal | None = None,
    cases: Sequence[Case] = CASES,
    num_steps: int = NUM_STEPS,
) -> Run:
    """Prefill all together, then decode; two plans are in flight where results may come late.

    Args:
        worker: of one rank.
        refusal: which slot comes last in which step; if it is this rank's, it finds no pages there.
        cases: the sequences.
        num_steps: decode steps.
    """
    done, new = Run(), sequences(cases)
    in_flight = [worker.begin(prefill_plan(worker, new))]
    with _counted(worker, done):
        for step in range(num_steps):
            items = [DecodeItem(n.slot, n.prompt_tokens + step) for n in new]
            if refusal is not None and step == refusal.step:
                items.append(items.pop(refusal.slot))  # the last of a kind is refused
                if worker.info.rank == min(1, worker._shard.part.mesh.layout.world_size - 1):
                    _fail_once(worker, is_plain=refusal.slot != SUMMED)
            in_flight.append(worker.begin(StepPlan(step + 1, decode=tuple(items))))
            done.results.append(in_flight.pop(0).result())
            worker.check_integrity()
    done.results.append(in_flight.pop().result())
    rings = worker._shard.rings
    done.remembered = [rings._buffer.clone(), rings._lse.clone()]
    slots = tuple(n.slot for n in new)
    done.results.append(worker.execute(StepPlan(num_steps + 1, free=slots)))
    worker.check_integrity()
    assert done.results[-1].pages_free == worker.info.num_pages
    return done


def run_layouts(
    folder: Path, refusals: Sequence[Refusal], is_long: bool, rank: int, stores: Sequence[Store]
) -> dict[tuple[str, Refusal], Run]:
    """What one of four rank processes does: the layouts that have such a rank, in turns."""
    found = {}
    sizes = (WITH_CUTS, 3 * NUM_STEPS) if is_long else (CASES, NUM_STEPS)
    for (name, layout), store in zip(LAYOUTS.items(), stores, strict=True):
        if rank < layout.world_size:
            settings = make_config(folder, layout, "triton").for_worker()
            worker = Worker(settings, layout, rank, store)
            for refusal in refusals:
                found[name, refusal] = run(worker, refusal, *sizes)
            leave_together(worker)
    return found


def check_ranks(
    folder: Path, general: Run, refusals: Sequence[Refusal], is_long: bool = False
) -> None:
    """Assert that ranks in every layout sample what one rank does in the general way.

    Rank 1, and no other, refuses what it has no pages for; from there on that slot is void.
    """
    timeout = 1800 if is_long else TIMEOUT_SECONDS
    by_rank = run_ranks(partial(run_layouts, folder, refusals, is_long), 4, len(LAYOUTS), timeout)
    for name, layout in LAYOUTS.items():
        last_stage = layout.rank(layout.pipeline_size - 1, 0)
        for refusal in refusals:
            for rank in range(layout.world_size):
                check_refusals(by_rank[rank][name, refusal], refusal if rank == 1 else None)
            check_tokens(by_rank[last_stage][name, refusal], general, refusal)


def check_refusals(done: Run, refusal: Refusal | None) -> None:
    """Assert that a rank took every step itself, and refused this and nothing else."""
    assert done.on_device == len(done.results) - 2  # a prefill, and what frees the slots
    assert done.otherwise == {SUMMED}
    refused = [(place, slot) for place, r in enumerate(done.results) for slot in r.refused]
    assert refused == ([] if refusal is None else [(1 + refusal.step, refusal.slot)])
    assert not any(r.faults for r in done.results)


def check_tokens(done: Run, general: Run, refusal: Refusal) -> None:
    """Assert that all tokens are those of the general way, but for what was refused."""
    tokens = done.tokens()
    for slot, wanted in general.tokens().items():
        most = 1 + refusal.step if slot == refusal.slot else len(wanted)
        assert tokens[slot][:most] == wanted[:most], (refusal, slot)


def check_remembered(done: Run, general: Run) -> None:
    """Assert that cuts would go by the same queries and normalisers, but for rounding."""
    for ours, theirs in zip(done.remembered, general.remembered, strict=True):
        assert len(theirs.flatten()), "no sequence remembers any"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@contextmanager
def _counted(worker: Worker, done: Run) -> Iterator[None]:
    """Count the steps that are the device's own, and note who is fed otherwise."""
    decode = worker._decode
    if decode._on_device is None:
        yield
        return
    step, feed = decode._on_device._step, decode._feed_generally

    def counted(*args: Any) -> Any:
        done.on_device += 1
        return step(*args)

    def noted(items: tuple[DecodeItem, ...], *args: Any) -> Any:
        done.otherwise.update(item.slot for item in items)
        return feed(items, *args)

    of_device = patch.object(decode._on_device, "_step", counted)
    with of_device, patch.object(decode, "_feed_generally", noted):
        yield


def _fail_once(worker: Worker, *, is_plain: bool) -> None:
    name = "grow" if is_plain else "begin_append"
    reserve = getattr(worker.kv, name)
    answers = iter([False if is_plain else None])
    setattr(worker.kv, name, lambda *args: next(answers, True) and reserve(*args))
