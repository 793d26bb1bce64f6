"""What the authors' release of PyramidInfer stores, and what a worker of ours does.

`pyramidinfer_counts.json` has the tokens that each of 30 layers stores after a prompt and so many
fed tokens, at the 7B setting with the generation stage; the release gave these counts (the longest
run is a simulation of them).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import DecodeItem, StepPlan
from saqqara.workers.worker import Worker

from .plans import new_sequence, prefill_plan
from .tiny import VOCAB, save_tiny

RELEASE: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "pyramidinfer_counts.json").read_text()
)
RETENTION = Retention.parse({"method": "pyramidinfer-7b", "decode": {"trigger": "published"}})


def stored_by_a_worker(folder: Path, prompt_tokens: int, num_fed: int) -> list[list[int]]:
    """Stored tokens of 30 narrow layers, [layer][kv head]: they do not depend on weights."""
    save_tiny("llama-gqa", folder, num_layers=30)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = prompt_tokens + num_fed
    (folder / "config.json").write_text(json.dumps(config))
    settings = EngineConfig(
        model=str(folder), dtype="float32", device="cpu", max_num_seqs=1, kv_memory_gib=0.1
    )
    worker = Worker.local(settings.for_worker())
    prompt = np.random.default_rng(0).integers(3, VOCAB, prompt_tokens).tolist()
    worker.execute(prefill_plan(worker, [new_sequence(0, prompt, retention=RETENTION)]))
    for step in range(num_fed):
        item = DecodeItem(0, prompt_tokens + step)
        assert not worker.execute(StepPlan(step, decode=(item,))).refused
    worker.check_integrity()
    stored: list[list[int]] = worker.kv.kept(0).tolist()
    worker.close()
    return stored
