"""The native linear kernels against torch in bf16, a whole worker at a time, for every family."""

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import new_sequence, prefill_plan, run_greedy
from support.ranks import Store, run_ranks
from support.tiny import CONFIGS, VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh import shared_memory
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.native.build import unavailable_reason
from saqqara.workers.passes.decode_batch import DecodeBatch
from saqqara.workers.plan import DecodeItem, SampledToken, SamplingSpec, StepPlan, StepResult
from saqqara.workers.worker import Worker

REASON = unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")
ALL_LOGPROBS = SamplingSpec(temperature=0.0, num_logprobs=VOCAB)


def make_config(
    folder: Path, backend: str, dtype: str = "bfloat16", **settings: object
) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype=dtype,
        device="cpu",
        linear_backend=backend,
        **{"max_num_seqs": 4, "linear_chunk_tokens": 16} | settings,
    )


def make_worker(folder: Path, backend: str, dtype: str = "bfloat16", **settings: object) -> Worker:
    return Worker.local(make_config(folder, backend, dtype, **settings).for_worker())


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, length).tolist() for length in (1, 33, 64)]


def logprobs(worker: Worker) -> torch.Tensor:
    """Of the first token after each prompt, fp32 [N, V]."""

    def row(token: SampledToken) -> torch.Tensor:
        assert token.logprobs is not None
        values = torch.empty(VOCAB)
        values[list(token.logprobs.top_ids)] = torch.tensor(token.logprobs.top_logprobs)
        return values

    outputs = run_greedy(worker, prompts(), 1, sampling=ALL_LOGPROBS)
    return torch.stack([row(tokens[0]) for tokens in outputs])


@pytest.mark.parametrize("name", [*CONFIGS])
def test_as_close_to_fp32_as_torch_is(name: str, tmp_path: Path) -> None:
    """bf16 rounds at other places in the two, so each is held against fp32, not to the other."""
    save_tiny(name, tmp_path)
    exact = logprobs(make_worker(tmp_path, "torch", dtype="float32"))
    torch_error = (logprobs(make_worker(tmp_path, "torch")) - exact).abs().mean()
    native_error = (logprobs(make_worker(tmp_path, "native")) - exact).abs().mean()
    assert native_error < 1.5 * torch_error + 1e-3, (native_error, torch_error)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-moe"])
def test_batched_says_what_alone_says(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    worker = make_worker(tmp_path, "native")
    together = run_greedy(worker, prompts(), 6)
    alone = [run_greedy(worker, [prompt], 6)[0] for prompt in prompts()]
    assert [[t.token_id for t in ts] for ts in alone] == [
        [t.token_id for t in ts] for ts in together
    ]


METHODS = (
    {"method": "snapkv", "budget": 24, "window": 4, "decode": {"slack_pages": 1}},
    {"method": "pyramidinfer", "decode": {"trigger": "published", "exceed": 4}},
    {"method": "adakv", "budget": 24, "window": 4},
    None,
)


def answers(worker: Worker, prompts: list[list[int]], num_steps: int) -> list[StepResult]:
    """Decode prompts together, each under one of the methods."""
    new = [
        new_sequence(slot, prompt, sampling=ALL_LOGPROBS, retention=Retention.parse(method))
        for slot, (prompt, method) in enumerate(zip(prompts, cycle(METHODS), strict=False))
    ]
    results = [worker.execute(prefill_plan(worker, [sequence])) for sequence in new]
    for step in range(num_steps):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
        results.append(worker.execute(StepPlan(step + 1, decode=items)))
        worker.check_integrity()
    worker.execute(StepPlan(num_steps + 1, free=tuple(n.slot for n in new)))
    return results


@pytest.mark.parametrize(
    ("name", "num_prompts", "page_tokens"),
    [("llama-bias", 6, 16), ("llama-mqa", 2, 8), ("qwen2-moe", 1, 16), ("qwen3-moe", 6, 8)],
)
def test_one_call_says_what_call_after_call_says(
    name: str, num_prompts: int, page_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode step of all layers in one call, over rows of any lengths, bit for bit.

    Queries and normalisers are remembered on the way: cuts that look at them choose the same.
    """
    save_tiny(name, tmp_path)
    worker = make_worker(tmp_path, "native", max_num_seqs=8, page_tokens=page_tokens)
    rng = np.random.default_rng(0)
    lengths = (64, 490, 33, 5, 30, 17)[:num_prompts]
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in lengths]
    one_call = worker._decode._native
    assert one_call is not None
    sizes: list[int] = []
    run = one_call.run

    def counted(batch: DecodeBatch, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return run(batch, hidden)

    monkeypatch.setattr(one_call, "run", counted)
    found = answers(worker, prompts, 18)
    monkeypatch.setattr(worker._decode, "_native", None)
    wanted = answers(worker, prompts, 18)
    assert [result.sampled for result in found] == [result.sampled for result in wanted]
    assert [result.kept for result in found] == [result.kept for result in wanted]
    assert sizes == 18 * [num_prompts]


def _logprobs_of_rank(folder: Path, rank: int, stores: Sequence[Store]) -> Any:
    config = make_config(folder, "native", linear_chunk_tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "_SLOT_BYTES_PER_THREAD", 4096)  # 98 tokens: several pieces
        worker = Worker(config.for_worker(), MeshLayout(tensor_size=2), rank, stores[0])
    mesh = worker._shard.part.mesh
    assert mesh.shares_memory
    assert mesh.piece_rows(torch.empty(1, worker.spec.hidden_size).bfloat16()) < 64
    if rank == 0:
        found = logprobs(worker).numpy()
    else:
        run_greedy(worker, prompts(), 1, sampling=ALL_LOGPROBS)
        found = None
    worker.close()
    return found


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "qwen2-moe"])
def test_two_ranks_are_as_close_to_fp32_as_one(name: str, tmp_path: Path) -> None:
    """Each rank's part of a sum is rounded to bf16 once more than in one rank."""
    save_tiny(name, tmp_path)
    exact = logprobs(make_worker(tmp_path, "torch", dtype="float32"))
    alone = (logprobs(make_worker(tmp_path, "native")) - exact).abs().mean()
    found, _ = run_ranks(partial(_logprobs_of_rank, tmp_path), 2)
    error = (torch.from_numpy(found) - exact).abs().mean()
    assert error < 2 * alone + 1e-3, (error, alone)


def test_native_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    with pytest.raises(ValueError, match=r"linear_backend=.native.*float32"):
        make_worker(tmp_path, "native", dtype="float32")
