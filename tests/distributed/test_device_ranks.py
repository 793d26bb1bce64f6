"""Ranks whose decode steps are the device's own sample what one rank does in the general way.

The kernels run in Triton's interpreter, the ranks meet over gloo. One rank of each layout finds no
pages once: it takes part in the step all the same.
"""

import importlib.util
import os
from functools import partial
from pathlib import Path

import pytest
from support import device_runs
from support.device_runs import LAYOUTS, NUM_STEPS, REFUSED_SLOT, REFUSED_STEP, Run
from support.ranks import run_ranks
from support.tiny import save_tiny

from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.worker import Worker

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter", allow_module_level=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder, num_layers=device_runs.NUM_LAYERS)
    return folder


@pytest.fixture(scope="module")
def general(tiny: Path) -> Run:
    config = device_runs.make_config(tiny, MeshLayout(), "torch")
    return device_runs.run(Worker.local(config.for_worker()))


def test_one_rank_with_two_steps_in_flight(tiny: Path, general: Run) -> None:
    config = device_runs.make_config(tiny, MeshLayout(), "triton")
    run = device_runs.run(Worker.local(config.for_worker()))
    assert run.on_device == NUM_STEPS
    assert run.tokens() == general.tokens()
    assert all(len(tokens) == NUM_STEPS + 1 for tokens in run.tokens().values())
    logprobs = [t.logprobs for r in run.results for t in r.sampled]
    expected = [t.logprobs for r in general.results for t in r.sampled]
    for ours, theirs in zip(logprobs, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.rank, ours.top_ids) == (theirs.rank, theirs.top_ids)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_layouts_with_a_refusal(tiny: Path, general: Run) -> None:
    by_rank = run_ranks(partial(device_runs.run_layouts, tiny), 4, len(LAYOUTS))
    for name, layout in LAYOUTS.items():
        last_stage = layout.rank(layout.pipeline_size - 1, 0)
        for rank in range(layout.world_size):
            run = by_rank[rank][name]
            assert run.on_device == NUM_STEPS, name
            refused = [r.refused for r in run.results]
            expected = [()] * len(run.results)
            if rank == 1:
                expected[1 + REFUSED_STEP] = (REFUSED_SLOT,)  # after the prefill's
            assert refused == expected, name
            assert not any(r.faults for r in run.results), name
        tokens = by_rank[last_stage][name].tokens()
        for slot, wanted in general.tokens().items():
            if slot == REFUSED_SLOT:  # void from the refused step on
                wanted = wanted[: 1 + REFUSED_STEP]
                tokens[slot] = tokens[slot][: 1 + REFUSED_STEP]
            assert tokens[slot] == wanted, (name, slot)
