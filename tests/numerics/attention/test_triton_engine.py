"""A worker with the Triton backend computes what one with torch's does, in Triton's interpreter.

Decode goes through the device's own step here (`workers/device_steps/device_decode.py`), launched
kernel by kernel: what a CUDA graph would replay.
"""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is for Linux only", allow_module_level=True)

from support.launches import Launches
from support.peak_bytes import PeakBytes
from support.tiny import save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers import sizing
from saqqara.workers.device_steps import device_decode
from saqqara.workers.device_steps.device_decode import DeviceDecode, Notes
from saqqara.workers.fixed_sizes import SPLIT_TOKENS, graph_sizes
from saqqara.workers.kernels.decode import PagedRows
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import (
    DecodeItem,
    NewSequence,
    PrefillGroup,
    SamplingSpec,
    StepPlan,
)
from saqqara.workers.worker import Worker

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled: see gpu_check"
)
PROMPTS = ([5, 9, 30, 2, 8, 77, 41, 12, 64, 3, 91, 17, 55, 4], list(range(20, 51)), [7])


def greedy(folder: Path, backend: str, retention: Retention, **settings: Any) -> list[list[int]]:
    """Four tokens after each prompt; the second sequence joins when the first decodes."""
    config = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "page_tokens": 4, **settings}
    worker = Worker.local(
        EngineConfig(model=str(folder), attention_backend=backend, **config).for_worker()
    )
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    spec = SamplingSpec(temperature=0.0)
    layers = worker.spec.num_layers
    for step in range(5):
        new: tuple[NewSequence, ...] = ()
        prefill: tuple[PrefillGroup, ...] = ()
        decode = tuple(
            DecodeItem(slot, len(prompt) + len(tokens[slot]) - 1)
            for slot, prompt in enumerate(PROMPTS)
            if tokens[slot]
        )
        if step < 2:
            joining = (0,) if step == 0 else (1, 2)
            new = tuple(
                NewSequence(
                    slot,
                    b"".join(t.to_bytes(4, "little") for t in PROMPTS[slot]),
                    len(PROMPTS[slot]),
                    spec,
                    retention,
                )
                for slot in joining
            )
            prefill = (PrefillGroup(joining, 0, layers),)
        result = worker.execute(StepPlan(step + 1, new=new, prefill=prefill, decode=decode))
        worker.check_integrity()
        assert not result.refused
        for sampled in result.sampled:
            tokens[sampled.slot].append(sampled.token_id)
    return tokens


@interpreted
@pytest.mark.parametrize(
    "method",
    [
        Retention(),
        Retention.parse({"score": "snapkv", "window": 4, "budget": 12}),
        Retention.parse(
            {
                "method": "pyramidinfer",
                "rho": 0.5,
                "min_context": 4,
                "recent_ratio": 0.05,
                "decode": {
                    "trigger": "published",
                    "exceed": 2,
                },  # fires in the second or third step
            }
        ),
    ],
    ids=["full", "snapkv", "published"],
)
def test_tokens_are_those_of_the_torch_backend(method: Retention, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path, num_layers=2)
    expected = greedy(tmp_path, "torch", method)
    assert greedy(tmp_path, "triton", method) == expected
    assert [len(tokens) for tokens in expected] == [5, 4, 4]


@interpreted
def test_rings_are_counted_on_the_device(tmp_path: Path) -> None:
    """Rows with a window of 9: rings that are full from the start, and one that is not."""
    save_tiny("qwen2", tmp_path)
    cut = {"score": "snapkv", "window": 4, "budget": 12, "decode": {"slack_pages": 1}}
    for method in (Retention(), Retention.parse(cut)):
        assert greedy(tmp_path, "triton", method) == greedy(tmp_path, "torch", method)


def _step_of(folder: Path, max_num_seqs: int) -> DeviceDecode:
    config = EngineConfig(
        model=str(folder),
        attention_backend="triton",
        dtype="float32",
        device="cpu",
        max_num_seqs=max_num_seqs,
        kv_memory_gib=0.01,
    )
    step = Worker.local(config.for_worker())._decode._on_device
    assert step is not None
    return step


def test_the_ladder_ends_at_the_largest_batch() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(5) == (1, 2, 4, 5)
    assert graph_sizes(64)[-2:] == (56, 64)
    assert graph_sizes(10_000)[-1] == 512
    for top in (3, 64, 100, 300, 512):
        sizes = graph_sizes(top)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == top


@interpreted
def test_memory_for_graphs_is_what_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode kernel that only allocates stands in: the interpreter adds copies of its own."""
    save_tiny("llama-gqa", tmp_path, num_layers=2)
    step = _step_of(tmp_path, max_num_seqs=8)
    part = step._part

    def decode(q: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        return torch.zeros(q.shape), None

    step._kernel = SimpleNamespace(PagedRows=PagedRows, decode=decode)  # type: ignore[assignment]
    inputs = torch.from_numpy(device_decode._padding(8)).clone()
    with torch.inference_mode(), Launches(), PeakBytes() as memory:
        step._step(inputs, None, part.max_model_len, Notes())
    scratch = 8 * part.footprint.scratch_bytes(part.max_model_len)
    assert memory.peak <= scratch <= 1.5 * memory.peak
    assert sizing.graph_bytes(part) == 0  # there is no GPU
    monkeypatch.setattr(sizing, "why_no_graphs", lambda _: None)
    outputs = sum(graph_sizes(8)) * part.spec.hidden_size * 4
    assert sizing.graph_bytes(part) > memory.peak + outputs


LAUNCHES = {
    "_rms_norm_kernel": 2,  # the second adds the attention's output first
    "_rotate_kernel": 1,  # and stores keys and values
    "_decode_kernel": 1,
    "_merge_kernel": 1,
    "_silu_mul_kernel": 1,
}


@interpreted
def test_a_layer_of_a_decode_step_is_few_launches(tmp_path: Path) -> None:
    """What a step of two layers launches more than one of the first alone, with norms of heads.

    Then as a rank of two, whose sums over the other are one launch each.
    """
    save_tiny("qwen3", tmp_path)
    step = _step_of(tmp_path, max_num_seqs=2)
    assert _of_layer(step) == LAUNCHES | {"linear": 3, "addmm": 1}  # the last adds what went in
    step._part.mesh.layout = MeshLayout(tensor_size=2)
    assert _of_layer(step) == LAUNCHES | {"linear": 4, "all_reduce": 2, "add_": 1}
    assert sum(LAUNCHES.values()) + 4 <= 11
    assert sum(LAUNCHES.values()) + 7 <= 13


def _of_layer(step: DeviceDecode) -> dict[str, int]:
    """Launches of the second layer, whose rows may be long enough to be cut into parts."""
    inputs = torch.from_numpy(device_decode._padding(2)).clone()
    all_layers, launched = step._layers, []
    for layers in (all_layers[:1], all_layers[:2]):
        step._layers, launches = layers, Launches()

        def all_reduce(x: torch.Tensor, names: Counter[str] = launches.names) -> torch.Tensor:
            names["all_reduce"] += 1
            return x

        if step._part.mesh.layout.tensor_size > 1:
            step._part.mesh.all_reduce = all_reduce  # type: ignore[method-assign, assignment]
        with torch.inference_mode(), launches:
            step._step(inputs, None, 2 * SPLIT_TOKENS, Notes())
        assert launches.names["_list_kernel"] == 1, "the parts of all layers are listed at once"
        assert launches.names["_lengthen_kernel"] == 1, "all rows grow at once"
        launched.append(launches.names)
    return dict(launched[1] - launched[0])


def test_the_core_engine_loads_without_the_cluster_packages() -> None:
    """A bare GPU machine has torch, triton and transformers, but neither Ray nor a command line.

    Worker and scheduler want no checked settings and no metrics, either.
    """
    absent = "ray typer rich matplotlib gguf fastapi uvicorn"
    of_engine = "pydantic psutil prometheus_client"
    code = f"""
import sys
for name in {f"{absent} {of_engine}"!r}.split():
    sys.modules[name] = None
import saqqara.cluster.scheduling.scheduler
import saqqara.evaluation.speed.kernel_checks, saqqara.workers.worker
for name in {of_engine!r}.split():
    del sys.modules[name]
import saqqara.cluster.engine.client, saqqara.cluster.llm
from saqqara import LLM
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
