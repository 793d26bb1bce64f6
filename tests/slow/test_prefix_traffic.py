"""Random traffic that reuses memory, on real ranks: the same tokens as without, nothing left.

Integrity is checked on every rank after every step, and the ledger against every rank's free pages
whenever no plan is in flight (`Scheduler.absorb`).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks
from support.scheduled_ranks import METHODS, PROPAGATING, Outcome, Traffic, serve
from support.tiny import save_tiny

from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAYOUTS = {"tp2": MeshLayout(2, 1), "pp2": MeshLayout(1, 2)}
SMALL, MEDIUM = 2**-11, 2**-9  # GiB


@pytest.fixture(scope="module", params=["llama-gqa", "gemma3"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder, num_layers=6 if request.param == "llama-gqa" else None)
    return folder


def traffic_of(
    model: Path, layout: MeshLayout, seed: int, gib: float, host_gib: float = 0.0
) -> Traffic:
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        device="cpu",
        num_threads=1,
        page_tokens=4,
        warmup=False,
        max_model_len=256,
        max_num_seqs=8,
        kv_memory_gib=gib + host_gib,
        host_kv_gib=host_gib,
        executor="ray",
        tensor_parallel_size=layout.tensor_size,
        pipeline_parallel_size=layout.pipeline_size,
    )
    methods = METHODS if model.name.startswith("gemma") else METHODS + PROPAGATING
    return Traffic(config, layout, seed, num_requests=60, prefix_bytes=None, methods=methods)


def outcome(traffic: Traffic) -> Outcome:
    """What all ranks say of it."""
    found = run_ranks(partial(serve, traffic), traffic.layout.world_size, 3)
    assert [one.tokens for one in found] == [found[0].tokens] * len(found)
    assert [one.pages_left for one in found] == [0] * len(found)
    assert [one.host_bytes_left for one in found] == [0] * len(found)
    first: Outcome = found[0]
    assert not first.errors
    return first


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gib", [SMALL, MEDIUM])
def test_tokens_are_those_without_a_cache(model: Path, layout: str, gib: float) -> None:
    traffic = traffic_of(model, LAYOUTS[layout], seed=len(layout), gib=gib)
    cached, plain = outcome(traffic), outcome(replace(traffic, prefix_bytes=0))
    assert cached.tokens == plain.tokens
    assert plain.hit_tokens == 0
    assert cached.hit_tokens > (500 if gib == MEDIUM else 50)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lost_ranks_and_clients_change_no_token(model: Path, layout: str) -> None:
    traffic = traffic_of(model, LAYOUTS[layout], seed=7, gib=MEDIUM)
    plain = outcome(replace(traffic, prefix_bytes=0))
    lost = outcome(replace(traffic, restart_at=40, may_abort=True))
    assert lost.hit_tokens > 300
    for name, tokens in lost.tokens.items():
        assert tokens == plain.tokens[name][: len(tokens)], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations_on_the_host_change_no_token(model: Path, layout: str) -> None:
    """Beside others that need their pages, and are preempted; then ranks and clients are lost."""
    traffic = traffic_of(model, LAYOUTS[layout], seed=6, gib=SMALL, host_gib=SMALL)
    traffic = replace(traffic, num_requests=40, num_talks=4)
    plain = outcome(replace(traffic, prefix_bytes=0, keeps_talks=False))
    kept = outcome(traffic)
    assert kept.tokens == plain.tokens
    assert kept.num_brought_back > 2
    lost = outcome(replace(traffic, restart_at=60, may_abort=True))
    for name, tokens in lost.tokens.items():
        assert tokens == plain.tokens[name][: len(tokens)], name
