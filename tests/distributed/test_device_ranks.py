"""Ranks whose decode steps are the device's own sample what one rank does in the general way.

The kernels run in Triton's interpreter, the ranks meet over gloo. One rank of each layout finds no
pages once: it takes part in the step all the same.
"""

import importlib.util
import os
from pathlib import Path

import pytest
from support import device_runs
from support.device_runs import NUM_STEPS, PUBLISHED, SUMMED, Refusal, Run
from support.replays import replay_steps
from support.tiny import save_tiny

from saqqara.workers.device_steps.device_decode import Kind
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
    refusal = Refusal(slot=5, step=2)
    run = device_runs.run(Worker.local(config.for_worker()), refusal)
    device_runs.check_refusals(run, refusal)
    device_runs.check_tokens(run, general, refusal)
    device_runs.check_remembered(run, general)
    assert [len(t) for t in run.tokens().values()] == 5 * [NUM_STEPS + 1] + [1 + refusal.step]
    logprobs, expected = (
        {(t.slot, t.position): t.logprobs for r in of.results for t in r.sampled if t.logprobs}
        for of in (run, general)
    )
    assert logprobs.keys() == expected.keys()
    for place, ours in logprobs.items():
        theirs = expected[place]
        assert (ours.rank, ours.top_ids) == (theirs.rank, theirs.top_ids)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_replayed_steps_with_padding_and_a_refusal(tiny: Path, general: Run) -> None:
    """What graphs read and write is used as if they were replayed; they note what cuts need."""
    published = {"method": "pyramidinfer", **PUBLISHED}
    config = device_runs.make_config(tiny, MeshLayout(), "triton", published)
    worker, refusal = Worker.local(config.for_worker()), Refusal(slot=3, step=1)
    replays = replay_steps(worker)
    run = device_runs.run(worker, refusal)
    device_runs.check_tokens(run, general, refusal)
    device_runs.check_remembered(run, general)
    assert run.otherwise == {SUMMED}
    assert ("decode", 8, Kind.NORMALISERS) in replays.recorded  # for five sequences


def test_layouts_with_a_refusal(tiny: Path, general: Run) -> None:
    device_runs.check_ranks(tiny, general, [Refusal(slot=3, step=0)])
