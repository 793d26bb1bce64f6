"""The shapes of Llama-3-70B on real ranks: the same tokens as one process, the bytes as planned.

Ranks are processes that meet over gloo, as those of a replica do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.llama_70b import write
from support.planned import Bytes, planned_bytes, real_bytes
from support.plans import new_sequence
from support.ranks import Store, leave_together, run_ranks

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.footprint import Footprint
from saqqara.workers.host_memory import resident_bytes
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.models.decoder import Decoder
from saqqara.workers.models.spec import load_spec
from saqqara.workers.models.weights import open_weights
from saqqara.workers.plan import DecodeItem, PrefillGroup, StepPlan
from saqqara.workers.worker import Worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_TOKENS = 12
VOCAB = 500
LAYOUTS = [MeshLayout(1, 1), MeshLayout(8, 1), MeshLayout(1, 4), MeshLayout(4, 2)]
RETENTIONS = [
    Retention.parse(None),
    Retention.parse("pyramidkv", "25%"),
    Retention.parse({"method": "snapkv", "budget": 20, "window": 8}),
]


WIDE = {"num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 8192}
MIB = 2**20


def _load(folder: Path, layout: MeshLayout, rank: int, stores: Sequence[Store]) -> list[int]:
    """Bytes of this rank's weights, and the most that reading them took, sampled by the kernel."""
    spec, cpu = load_spec(str(folder)), torch.device("cpu")
    part = Footprint.of_ranks(spec, torch.float32, layout)[rank]
    mesh = Mesh(layout, rank, spec.num_kv_heads, cpu, stores[0])
    mesh.barrier()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes()
    with open_weights(folder, spec) as source:
        decoder = Decoder(spec, mesh, part.heads, part.layers, source, 64)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [peak_kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    mesh.barrier()
    mesh.close()
    return [decoder.weight_bytes(), int(peak_kib) * 1024 - before]


@pytest.mark.parametrize("layout", [MeshLayout(2, 1), MeshLayout(1, 2)], ids=["tp2", "pp2"])
def test_loading_takes_at_most_a_slice_more_than_the_shard(
    layout: MeshLayout, tmp_path: Path
) -> None:
    folder = write(tmp_path, **WIDE)
    largest = 4 * WIDE["hidden_size"] * WIDE["intermediate_size"] // layout.tensor_size
    for shard, peak in run_ranks(partial(_load, folder, layout), layout.world_size):
        assert shard > 8 * largest
        assert peak <= shard + largest, f"{peak / MIB:.1f}, {shard / MIB:.1f} MiB"


@dataclass(frozen=True)
class Ran:
    """What one rank held, and what it sampled: (slot, token), in order."""

    held: Bytes
    sampled: list[tuple[int, int]]


def _config(folder: Path, layout: MeshLayout) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="float32",
        linear_backend="torch",
        attention_backend="torch",
        warmup=False,
        kv_memory_gib=2**-6,
        max_num_seqs=len(RETENTIONS),
        max_model_len=256,
        executor="ray" if layout.world_size > 1 else "local",
        tensor_parallel_size=layout.tensor_size,
        pipeline_parallel_size=layout.pipeline_size,
    )


def _plans() -> list[StepPlan]:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (120, 90, 61)]
    new = [
        new_sequence(slot, prompt, retention=retention)
        for slot, (prompt, retention) in enumerate(zip(prompts, RETENTIONS, strict=True))
    ]
    groups = [PrefillGroup((n.slot,), 0, 80) for n in new]
    plans = [
        StepPlan(step, new=(n,), prefill=(group,))
        for step, (n, group) in enumerate(zip(new, groups, strict=True))
    ]
    for fed in range(NUM_TOKENS - 1):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + fed) for n in new)
        plans.append(StepPlan(len(plans), decode=items))
    return [*plans, StepPlan(len(plans), free=tuple(n.slot for n in new))]


def _run(folder: Path, rank: int, stores: Sequence[Store]) -> list[Ran | None]:
    ran: list[Ran | None] = []
    for layout, store in zip(LAYOUTS, stores, strict=True):
        if rank >= layout.world_size:
            ran.append(None)
            continue
        settings = _config(folder, layout).for_worker()
        worker = Worker(settings, layout, rank, store if layout.world_size > 1 else None)
        held, sampled = real_bytes(worker), []
        for plan in _plans():
            result = worker.execute(plan)
            worker.check_integrity()
            sampled += [(token.slot, token.token_id) for token in result.sampled]
        leave_together(worker)
        ran.append(Ran(held, sampled))
    return ran


def test_ranks_of_a_70b_topology_say_what_one_process_says_and_hold_what_was_planned(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, vocab_size=VOCAB)
    by_rank = run_ranks(partial(_run, folder), 8, len(LAYOUTS), timeout_seconds=1200)
    alone = by_rank[0][0].sampled
    assert len(alone) == NUM_TOKENS * len(RETENTIONS)
    assert len({token for _, token in alone}) > 2 * len(RETENTIONS)  # none says one word for ever
    for number, layout in enumerate(LAYOUTS):
        ran = [by_rank[rank][number] for rank in range(layout.world_size)]
        assert [one.held for one in ran] == planned_bytes(_config(folder, layout), layout)
        assert [token for one in ran for token in one.sampled] == alone, layout
