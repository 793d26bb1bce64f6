"""A decode step on the device makes no call that waits for it: results are read one step late."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter", allow_module_level=True)

from support import device_runs
from support.device_runs import CASES, PUBLISHED, WITH_CUTS, Case
from support.host_waits import HostWaitError, HostWaits
from support.plans import prefill_plan
from support.tiny import save_tiny

from saqqara.workers import transfer
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, NewSequence, SamplingSpec, StepPlan
from saqqara.workers.worker import StepInFlight, Worker


def allow_transfers(watch: HostWaits, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let through what `workers/transfer.py` takes to the device, which on a GPU does not wait.

    Returns:
        The shapes of what was taken there.
    """
    shapes: list[tuple[int, ...]] = []

    def take(values: NDArray[np.generic], device: torch.device) -> torch.Tensor:
        shapes.append(values.shape)
        return transfer.to_device(values, device)

    for name, module in list(sys.modules.items()):
        uses = name.startswith("saqqara.workers.") and hasattr(module, "to_device")
        if uses and module is not transfer:
            monkeypatch.setattr(module, "to_device", watch.allowed(take))
    return shapes


def started(
    folder: Path, attention: str, specs: list[SamplingSpec], cases: Sequence[Case] = CASES
) -> tuple[Worker, StepPlan]:
    """A worker whose sequences are prefilled, and the plan of their first decode step."""
    config = device_runs.make_config(folder, MeshLayout(), attention)
    worker = Worker.local(config.for_worker())
    new: list[NewSequence] = [
        replace(sequence, sampling=spec)
        for sequence, spec in zip(device_runs.sequences(cases), specs, strict=False)
    ]
    worker.execute(prefill_plan(worker, new))
    return worker, StepPlan(1, decode=tuple(DecodeItem(n.slot, n.prompt_tokens) for n in new))


def begin(worker: Worker, plan: StepPlan, watch: HostWaits) -> StepInFlight:
    with watch.watching():
        return worker.begin(plan)


PLAIN = [SamplingSpec(temperature=0.0), SamplingSpec(top_p=0.5, seed=3), SamplingSpec(seed=1)]
WANTING = [
    SamplingSpec(temperature=0.0, logit_bias=((5, 2.0),), num_logprobs=3),
    SamplingSpec(repetition_penalty=1.2, bad_words=((4, 5), (6,)), seed=2),
    SamplingSpec(min_tokens=9, blocked_token_ids=(2,), allowed_token_ids=bytes([3, 0, 0, 0]) * 2),
]


# Rows that are cut, but not yet in these steps.
LATER = PUBLISHED | {"decode": {"trigger": "published", "exceed": 9}}
CUT = [CASES[0], ("pyramidinfer", LATER, SamplingSpec()), WITH_CUTS[-1]]


@pytest.mark.parametrize(
    ("specs", "cases"),
    [(PLAIN, CASES), (WANTING, CASES), (PLAIN, CUT)],
    ids=["plain", "wanting", "cut"],
)
def test_a_decode_step_never_waits(
    specs: list[SamplingSpec],
    cases: Sequence[Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tiny("llama-gqa", tmp_path, num_layers=1)
    worker, plan = started(tmp_path, "triton", specs, cases)
    watch = HostWaits()
    taken = allow_transfers(watch, monkeypatch)
    first = begin(worker, plan, watch)
    taken.clear()
    again = tuple(replace(item, position=item.position + 1) for item in plan.decode)
    second = begin(worker, StepPlan(2, decode=again), watch)  # before the first one's result
    assert watch.num_operators > 20
    if specs is PLAIN and cases is CASES:
        assert taken == [(3, 3), (2, 3)]  # who takes part, and where: for the layers, for the head
    assert [len(step.result().sampled) for step in (first, second)] == [3, 3]
    worker.check_integrity()  # lengths on the device are the host's


def test_the_general_way_waits_and_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama-gqa", tmp_path, num_layers=1)
    worker, plan = started(tmp_path, "torch", PLAIN)
    watch = HostWaits()
    allow_transfers(watch, monkeypatch)
    with pytest.raises(HostWaitError, match="in a step"):
        begin(worker, plan, watch)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
        lambda x: torch.tensor([1.0]),
        lambda x: torch.ops.aten._local_scalar_dense(x[0]),
    ],
)
def test_what_waits_is_caught(wait: object) -> None:
    assert callable(wait)
    with HostWaits().watching(), pytest.raises(HostWaitError):
        wait(torch.arange(3.0))
