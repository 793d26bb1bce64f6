"""Every family computes what transformers computes, on one rank and on two, with full rows and cut.

A prompt of each tiny model is decoded under `full`, `snapkv` and `pyramidkv` together: 3 kv heads
are 2 + 1 of tensor ranks, windows are shorter than the prompt. What is expected comes from
transformers' own model, whose attention is one that drops what the definitions say. The table in
`docs/models.md` is what is compared here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.coverage import LAYOUTS, SHOWN, methods_of, table
from support.dropping import logits_under
from support.methods import METHODS, PAGE, PREFILL
from support.plans import new_sequence
from support.ranks import Job, run_on_ranks, sampled_tokens
from support.slow_llama import NEAR_CUT
from support.tiny import CONFIGS, VOCAB, save_tiny

from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.models.reading.families import FAMILIES
from saqqara.workers.plan import (
    DecodeItem,
    PrefillGroup,
    SampledToken,
    SamplingSpec,
    StepPlan,
)
from saqqara.workers.worker import Worker

ALL_LOGPROBS = SamplingSpec(temperature=0.0, num_logprobs=VOCAB)
PROMPT_TOKENS, NUM_TOKENS = 41, 4
SEED = 3  # no selection of its prompt is near its cut
# fp32 with another order of summation: logits of size ~10 agree to about 1e-5.
TOLERANCE = 2e-4


def prompt() -> list[int]:
    tokens: list[int] = np.random.default_rng(SEED).integers(3, VOCAB, PROMPT_TOKENS).tolist()
    return tokens


def job_of(name: str, folder: Path, layout: MeshLayout) -> Job:
    """A prompt under each method, prefilled in one group and decoded together."""
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=4,
        max_model_len=128,  # the original length of longrope's tiny model
        page_tokens=PAGE,
        num_threads=1,
        kv_memory_gib=0.02,
        warmup=False,
        tensor_parallel_size=layout.tensor_size,
        pipeline_parallel_size=layout.pipeline_size,
        executor="local" if layout.world_size == 1 else "ray",
    )
    new = tuple(
        new_sequence(slot, prompt(), None, ALL_LOGPROBS, METHODS[method].retention(method, PREFILL))
        for slot, method in enumerate(methods_of(name))
    )
    slots = tuple(each.slot for each in new)
    num_layers = CONFIGS[name].num_hidden_layers
    plans = [StepPlan(0, new=new, prefill=(PrefillGroup(slots, 0, num_layers),))]
    for step in range(NUM_TOKENS - 1):
        items = tuple(DecodeItem(slot, PROMPT_TOKENS + step) for slot in slots)
        plans.append(StepPlan(step + 1, decode=items))
    return Job(config, layout, plans)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """By name, the transformers model and its folder."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SHOWN}
    return {name: (save_tiny(name, folder), folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def sampled(models: Any) -> dict[tuple[str, str], dict[int, list[SampledToken]]]:
    """By name and layout, the tokens of each slot; processes that play ranks do all in turn."""
    keys = [(name, layout) for name in SHOWN for layout in LAYOUTS if layout != "one rank"]
    jobs = [job_of(name, models[name][1], LAYOUTS[layout]) for name, layout in keys]
    runs = run_on_ranks(jobs)
    found = {}
    for (name, layout), of_ranks in zip(keys, runs, strict=True):
        is_tensor = LAYOUTS[layout].tensor_size > 1
        found[name, layout] = sampled_tokens(of_ranks[:1] if is_tensor else of_ranks)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHOWN)
def test_a_family_is_that_of_transformers(
    name: str, layout: str, models: Any, sampled: Any
) -> None:
    model, folder = models[name]
    if layout == "one rank":
        job = job_of(name, folder, LAYOUTS[layout])
        worker = Worker.local(job.config.for_worker())
        by_slot: dict[int, list[SampledToken]] = {}
        for plan in job.plans:
            for token in worker.execute(plan).sampled:
                by_slot.setdefault(token.slot, []).append(token)
            worker.check_integrity()
    else:
        by_slot = sampled[name, layout]
    for slot, method in enumerate(methods_of(name)):
        tokens = [token.token_id for token in by_slot[slot]]
        assert len(tokens) == NUM_TOKENS
        logits, dropping = logits_under(model, METHODS[method].rules, prompt(), tokens)
        assert dropping.cuts.closest > NEAR_CUT, (method, dropping.cuts)
        expected = logits.log_softmax(-1)
        got = torch.empty(NUM_TOKENS, VOCAB)
        for row, token in zip(got, by_slot[slot], strict=True):
            assert token.logprobs is not None
            row[list(token.logprobs.top_ids)] = torch.tensor(token.logprobs.top_logprobs)
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
        assert tokens == expected.argmax(-1).tolist()


def test_the_oracle_without_drops_is_transformers(models: Any) -> None:
    """Its masks are our own; and what is dropped does matter."""
    for name in ("gemma2", "qwen2"):
        model, _ = models[name]
        tokens = prompt()[:3]
        plain = model(torch.tensor([prompt() + tokens[:-1]]), logits_to_keep=3).logits[0]
        same, _ = logits_under(model, METHODS["full"].rules, prompt(), tokens)
        torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)
        cut, dropping = logits_under(model, METHODS["snapkv"].rules, prompt(), tokens)
        assert {*dropping.kept} == {n for n, window in dropping.windows.items() if not window}
        assert (cut[1:] - plain[1:]).abs().max() > 0.01


def test_every_family_is_compared() -> None:
    assert {CONFIGS[name].model_type for name in SHOWN} == {*FAMILIES}


def test_the_docs_list_what_is_compared() -> None:
    lines = (Path(__file__).parents[3] / "docs" / "models.md").read_text("utf-8").splitlines()
    shown = [line for line in lines if line.startswith("|")][: len(table())]
    assert shown == table(), "run `PYTHONPATH=tests:src python -m support.coverage`"
