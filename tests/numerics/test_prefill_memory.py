"""Layer-major prefill: one layer at full length plus the budgets, however many layers there are."""

from pathlib import Path

import numpy as np
import pytest
from support.plans import new_sequence, prefill_plan
from support.tiny import VOCAB, save_tiny

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.worker import Worker

LAYERS, HEADS, HEAD_DIM, FP32 = 3, 3, 16, 4
TOKEN_BYTES = 2 * HEAD_DIM * FP32  # key and value of one token in one row


@pytest.mark.parametrize("page_tokens", [1, 16])
def test_peak_is_one_layer_and_the_budgets(page_tokens: int, tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    worker = Worker.local(
        EngineConfig(
            model=str(tmp_path),
            dtype="float32",
            device="cpu",
            max_num_seqs=2,
            page_tokens=page_tokens,
        ).for_worker()
    )
    prompt = np.random.default_rng(0).integers(3, VOCAB, 500).tolist()
    retention = Retention.parse("pyramidkv", budget=64)
    new = new_sequence(0, prompt, retention=retention)
    memory = worker.execute(prefill_plan(worker, [new])).memory
    one_layer = len(prompt) * HEADS * TOKEN_BYTES
    kept = retention.row_tokens(len(prompt), LAYERS, HEADS)
    budgets = int((-(-kept // page_tokens)).sum()) * page_tokens * TOKEN_BYTES
    assert memory.prefill_kv_bytes_peak == one_layer + budgets
    if page_tokens == 1:
        assert budgets == LAYERS * HEADS * 64 * TOKEN_BYTES
    assert memory.parked_activation_bytes == 0
    assert memory.prefill_activation_bytes_peak > 0
