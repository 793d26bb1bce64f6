"""One replica on a simulated clock: its times are the cost model's, and nothing is ever lost."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.planned import question

from saqqara.cluster.planning.planner import Question
from saqqara.cluster.planning.workload import Workload
from saqqara.cluster.simulation.arrivals import Lengths, Trace, drawn_trace
from saqqara.cluster.simulation.deployment import Deployment
from saqqara.cluster.simulation.faults import Outage
from saqqara.cluster.simulation.measures import ReplicaRun
from saqqara.cluster.simulation.replica import Replica
from saqqara.compression.retention import Retention
from saqqara.configs.quantum import prefill_quantum

TWO_STAGES = {"gpus": 4, "tensor": 2, "pipeline": 2}


def asked(
    retention: Any = None, budget: Any = None, lengths: tuple[int, int] = (1024, 64), **of: Any
) -> Question:
    made = question("llama-3-8b", gpus=of.pop("gpus", 1), **of)
    return replace(made, workload=Workload(*lengths, Retention.parse(retention, budget)))


def run(
    asked: Question,
    trace: Trace,
    outages: tuple[Outage, ...] = (),
    max_num_seqs: int | None = None,
    prefill_quantum: int | None = None,
) -> ReplicaRun:
    asked = replace(asked, sizes=replace(asked.sizes, max_num_seqs=max_num_seqs))
    settings = Deployment.best(asked, prefill_quantum, 1024).settings()
    return Replica(settings, trace, outages, bin_seconds=1.0).simulate()


def at_once(number: int, prompt: int = 1024, new: int = 64) -> Trace:
    return Trace(np.zeros(number), np.full(number, prompt), np.full(number, new))


def test_the_quantum_is_the_engines_where_none_is_given() -> None:
    two_stages: dict[str, Any] = TWO_STAGES
    asking = asked(**two_stages)
    layer = asking.model.spec.layer_parameters
    for given in ("auto", None, 5000):
        settings = Deployment.best(asking, given, 1024).settings()
        assert settings.prefill_quantum == prefill_quantum(given, "cuda", 2, layer)


@pytest.mark.parametrize("layout", [{}, TWO_STAGES])
def test_alone_a_request_takes_what_the_plan_says(layout: dict[str, Any]) -> None:
    asking = asked(lengths=(2048, 64), **layout)
    rates = Deployment.best(asking, None, 1024).layout.kept
    assert rates is not None
    found = run(asking, at_once(1, prompt=2048))
    more_plans = (asking.pipeline or 1) - 1  # the planner counts one, however many stages
    first = rates.prompt_seconds + more_plans * asking.factors.step_seconds
    assert found.first[0] == pytest.approx(first, rel=1e-9)
    settings = Deployment.best(asking, None, 1024).settings()
    ranks = {r.layout.pipeline_rank(r.rank): r for r in settings.memory.ranks}
    expected = 0.0
    for fed in range(63):  # each stage after the other: no other plan is there to overlap with
        reads = [(2048 + fed + 1) * rank.num_rows for rank in ranks.values()]
        expected += asking.factors.step_seconds + sum(
            settings.cost.decode_seconds(rank, 1, tokens)
            for rank, tokens in zip(ranks.values(), reads, strict=True)
        )
    assert found.last[0] - found.first[0] == pytest.approx(expected, rel=1e-9)
    assert found.tokens.tolist() == [64]


@pytest.mark.parametrize("layout", [{}, TWO_STAGES])
@pytest.mark.parametrize("retention", [(None, None), ("snapkv", "25%")])
def test_a_full_replica_makes_the_tokens_that_the_plan_says(
    retention: tuple[Any, Any], layout: dict[str, Any]
) -> None:
    asking = asked(*retention, **layout)
    rates = Deployment.best(replace(asking, sizes=replace(asking.sizes, max_num_seqs=24)), None, 1)
    assert rates.layout.kept is not None
    found = run(asking, at_once(160), max_num_seqs=24)
    # Beginning and end of the run, when not all slots are in use, are the difference.
    speed = found.tokens.sum() / found.seconds
    assert speed == pytest.approx(rates.layout.kept.output_tokens_per_second, rel=0.12)
    assert 0.6 < found.busy_seconds / found.seconds / (asking.pipeline or 1) < 1.0


RETENTIONS = [
    (None, None),
    ("pyramidkv", "25%"),
    ("recommended-adaptive", "25%"),
    ({"method": "snapkv", "decode": {"slack_pages": 1}}, 256),
    ({"method": "h2o", "decode": {"slack_pages": 2}}, 256),
    ("pyramidinfer-7b", None),
    ("fastkv", "25%"),
]


@pytest.mark.parametrize("quantum", [None, 4096])
@pytest.mark.parametrize(("method", "budget"), RETENTIONS)
def test_the_ledger_is_right_at_every_step_of_any_retention(
    method: Any, budget: Any, quantum: int | None
) -> None:
    """The ranks count their pages on their own, and the scheduler compares them each time.

    So few pages that sequences are preempted, and two outages.
    """
    asking = asked(method, budget)
    memory = Deployment.best(asking, None, 1024).settings().memory
    need = int(memory.demand.most(120).max()) * 4 * memory.worker_infos(1)[0].page_bytes
    asking = replace(asking, sizes=replace(asking.sizes, kv_memory_gib=need / 2**30))
    lengths = Lengths(800, 100, spread=0.4, most=1800)
    trace = drawn_trace(30, 20.0, lengths, seed=5)
    lost = (Outage(1.0, 1.5, "rank"), Outage(2.5, 2.6, "rank"))
    found = run(asking, trace, lost, max_num_seqs=12, prefill_quantum=quantum)
    assert (found.tokens == trace.new_tokens).sum() + found.refused == 30
    assert found.refused <= 3  # longer than all pages
    assert found.recoveries == 2
    if method is None:
        assert found.preemptions > 0
    assert 0.5 < found.peak_pages <= 1.0


def test_an_outage_delays_everything_by_itself_and_what_is_made_again() -> None:
    asking = asked()
    calm = run(asking, at_once(4))
    middle = float(calm.first.max() + calm.last.max()) / 2
    hit = run(asking, at_once(4), (Outage(middle, middle + 30.0, "rank"),))
    assert hit.recoveries == 1
    assert hit.down_seconds == 30.0
    assert (hit.tokens == calm.tokens).all()
    assert (hit.first == calm.first).all()  # those tokens were there
    prefill = float(calm.first.max())
    late = hit.last.max() - calm.last.max()
    assert 30.0 + 0.8 * prefill < late < 30.0 + 1.5 * prefill
    assert hit.gaps.percentile(100) == pytest.approx(30.0 + prefill, rel=0.1)


def test_an_idle_replica_is_lost_and_started_again_without_a_trace() -> None:
    trace = Trace(np.array([0.0, 50.0]), np.array([100, 100]), np.array([4, 4]))
    found = run(asked(), trace, (Outage(20.0, 30.0, "node"),))
    calm = run(asked(), trace)
    assert (found.last == calm.last).all()
    assert (found.recoveries, found.down_seconds) == (1, 10.0)


def test_a_prompt_in_parts_takes_no_less_and_stalls_others_less() -> None:
    trace = Trace(np.array([0.0, 0.3]), np.array([64, 6000]), np.array([100, 2]))
    whole = run(asked(), trace)
    parts = run(asked(), trace, prefill_quantum=16384)
    assert parts.gaps.percentile(100) < 0.5 * whole.gaps.percentile(100)
    assert parts.first[1] > whole.first[1]


def test_a_request_that_can_never_fit_is_refused_and_the_others_are_served() -> None:
    asking = asked()
    asking = replace(asking, sizes=replace(asking.sizes, kv_memory_gib=0.3))
    trace = Trace(np.zeros(3), np.array([512, 5000, 512]), np.array([8, 8, 8]))
    found = run(asking, trace, max_num_seqs=8)
    assert found.refused == 1
    assert found.tokens.tolist() == [8, 0, 8]
    assert np.isnan(found.last).tolist() == [False, True, False]
