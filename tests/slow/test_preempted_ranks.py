"""Preempted sequences come back from the host's memory on ranks that share a model, over Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import save_tiny

from saqqara import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.ray]

PAGE_TOKENS = 4
GIB = 1024**3
PAGES = 400 * PAGE_TOKENS * 2 * 16 * 4 / GIB  # of rows of head_dim 16, fp32
HOST = 0.002
OWN = {"budget": 24, "window": 8, "sinks": 2}
TRIMMED = {"method": "pyramidinfer", "sinks": 2, "min_context": 4, "rho": 0.5}
METHODS: list[Any] = [
    "full",
    {"method": "snapkv"} | OWN,
    {"method": "adakv", "budget": 24, "window": 8},
    {"method": "snapkv", "decode": {"slack_pages": 2}} | OWN,
    {"method": "h2o", "budget": 24, "sinks": 2, "decode": {"slack_pages": 2}},
    TRIMMED | {"decode": {"trigger": "published", "exceed": 6}},
    TRIMMED | {"decode": {"trigger": "stored", "exceed": 6}},
]


def generate(folder: Path, **settings: Any) -> tuple[list[tuple[int, ...]], Any]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 199, rng.integers(5, 70)).tolist() for _ in range(16)]
    sampling = [
        SamplingParams(
            temperature=0.8 if n % 2 else 0.0,
            seed=n,
            max_tokens=int(rng.integers(20, 50)),
            ignore_eos=True,
        )
        for n in range(16)
    ]
    with LLM(
        str(folder),
        dtype="float32",
        device="cpu",
        max_model_len=256,
        max_num_seqs=16,
        page_tokens=PAGE_TOKENS,
        check_integrity=True,
        prefix_caching=False,
        **settings,
    ) as llm:
        outputs = llm.generate(
            prompt_token_ids=prompts,
            sampling_params=sampling,
            retention=[METHODS[n % len(METHODS)] for n in range(16)],
        )
        return [tuple(output.outputs[0].token_ids) for output in outputs], llm.report()


@pytest.mark.usefixtures("local_ray")
def test_ranks_put_back_what_they_had(demo_model: Path, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model)
    expected, _ = generate(tmp_path)
    for layout in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        settings: dict[str, Any] = {"executor": "ray", "host_kv_gib": HOST} | layout
        tokens, report = generate(tmp_path, kv_memory_gib=PAGES + HOST, **settings)
        assert tokens == expected
        assert report.num_preemptions > 2
        assert report.phase_seconds["resume"] > 0
        assert report.pages_leaked == 0
