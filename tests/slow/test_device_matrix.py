"""Device steps of all layouts and methods, with refusals of any slot, against the general way."""

import importlib.util
import os
from pathlib import Path

import pytest
from support import device_runs
from support.device_runs import NUM_STEPS, WITH_CUTS, Refusal
from support.tiny import save_tiny

from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.worker import Worker

pytestmark = pytest.mark.slow
if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter", allow_module_level=True)


@pytest.mark.timeout(1800)
def test_any_slot_may_be_refused_in_any_layout(tmp_path: Path) -> None:
    """Full, SnapKV, PyramidKV, AdaKV; PyramidInfer and others whose rows are cut meanwhile.

    One rank refuses each slot once, several ranks every third: they differ in who is told.
    """
    save_tiny("llama-gqa", tmp_path, num_layers=device_runs.NUM_LAYERS)
    sizes = WITH_CUTS, 3 * NUM_STEPS
    refusals = [Refusal(slot, (5 * slot) % sizes[1]) for slot in range(len(WITH_CUTS))]
    config = device_runs.make_config(tmp_path, MeshLayout(), "torch")
    general = device_runs.run(Worker.local(config.for_worker()), None, *sizes)
    assert all(len(tokens) == sizes[1] + 1 for tokens in general.tokens().values())
    config = device_runs.make_config(tmp_path, MeshLayout(), "triton")
    alone = Worker.local(config.for_worker())
    for refusal in refusals:
        run = device_runs.run(alone, refusal, *sizes)
        device_runs.check_refusals(run, refusal)
        device_runs.check_tokens(run, general, refusal)
    device_runs.check_ranks(tmp_path, general, refusals[::3], is_long=True)
