"""Layouts: which are legal, what fits, and how they are ranked."""

import math
import time
from collections import deque
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_replica import FakeReplica
from support.planned import question

from saqqara.cluster.engine.intake import sampling_of
from saqqara.cluster.planning.cost_model import Factors
from saqqara.cluster.planning.devices import DEVICES, device_of
from saqqara.cluster.planning.memory import EngineSizes, ReplicaMemory
from saqqara.cluster.planning.models import model_of
from saqqara.cluster.planning.planner import DTYPES, LayoutPlan, plan
from saqqara.cluster.planning.workload import Workload
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.events import Event, Preempted
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.compression.retention import Retention
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import StepPlan, StepResult

GIB = 1024**3


def sizes(plans: list[LayoutPlan]) -> set[tuple[int, int, int]]:
    return {(p.tensor, p.pipeline, p.replicas) for p in plans}


def test_every_layout_uses_all_gpus_and_the_fastest_comes_first() -> None:
    plans = plan(question())
    expected = {(t, p, 8 // (t * p)) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if t * p <= 8}
    assert sizes(plans) == expected
    speeds = [p.kept.output_tokens_per_second for p in plans if p.kept is not None]
    assert speeds == sorted(speeds, reverse=True)
    last = plans[-1]
    assert (last.tensor, last.pipeline) == (1, 1)
    assert last.why_not is not None
    assert last.why_not.startswith("weights (131.4 GiB on rank 0 of 1)")


def test_nothing_is_larger_than_a_gpu_and_the_rest_is_filled() -> None:
    for each in plan(question()):
        for rank in each.ranks:
            assert 0.88 * 79.1 * GIB < rank.total_bytes < 79.1 * GIB
            assert rank.pool_bytes == rank.num_pages * 16 * 2 * 128 * 2


def test_a_quarter_of_the_keys_lets_more_sequences_run() -> None:
    for each in plan(question(retention="pyramidkv", budget="25%")):
        if each.kept is None or each.full is None:
            continue
        # 1,024 + 511 of 4,096 + 511 tokens, less where a stage has the large layers.
        assert 1.5 < each.kept.sequences / each.full.sequences <= 3.41
        assert each.kept.output_tokens_per_second > each.full.output_tokens_per_second


def test_full_is_compared_with_itself() -> None:
    assert all(each.kept == each.full for each in plan(question()))


@pytest.mark.parametrize(
    ("settings", "why_not"),
    [
        ({"gpus": 4, "nodes": 4, "tensor": 2}, "a tensor group of 2 does not fit on a node of 1"),
        ({"gpus": 6, "nodes": 2, "tensor": 2}, "nodes of 3 cannot be filled with tensor groups"),
        ({"gpus": 2, "pipeline": 2, "gpu": "h100-80gb", "split": (70, 10)}, "weights ("),
    ],
    ids=str,
)
def test_layouts_that_cannot_be_say_why(settings: dict[str, Any], why_not: str) -> None:
    for each in plan(question(**settings)):
        assert each.kept is None
        assert each.why_not is not None
        assert why_not in each.why_not


def test_stages_are_cut_by_what_their_layers_keep() -> None:
    """More sequences at once, and as many tokens, as with as many layers in each stage."""
    asked = question(retention="pyramidkv", budget="25%", tensor=2, pipeline=4)
    [balanced], [even] = plan(asked), plan(replace(asked, split=(20, 20, 20, 20)))
    assert [held.layers for held in balanced.ranks[::2]] == [(0, 17), (17, 37), (37, 58), (58, 80)]
    assert balanced.kept is not None
    assert even.kept is not None
    assert balanced.kept.sequences > 1.2 * even.kept.sequences
    assert balanced.kept.output_tokens_per_second > even.kept.output_tokens_per_second


def test_a_split_that_fits_is_named_where_the_balanced_one_does_not() -> None:
    asked = question(retention="pyramidkv", budget="25%", tensor=1, pipeline=2)
    [refused] = plan(asked)
    assert refused.why_not is not None
    assert refused.why_not.endswith("; --layer-split 40,40 fits")
    [fits] = plan(replace(asked, split=(40, 40)))
    assert fits.kept is not None


def test_what_cannot_be_asked() -> None:
    with pytest.raises(
        ValueError, match=r"8 cannot be spread evenly over 3 nodes, .* over 1, 2, 4"
    ):
        question(nodes=3)
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size: 128 .* the model's 64 query heads"
    ):
        question(gpus=128, tensor=128)
    with pytest.raises(ValueError, match=r"pipeline_parallel_size: 81 is more .* 80 layers"):
        question(gpus=81, nodes=1, pipeline=81)
    with pytest.raises(ValueError, match="no layout of this shape uses all of 8 GPUs"):
        question(tensor=3)
    for split in ((0, 80), (-1, 81), (40, 41)):
        with pytest.raises(ValueError, match=r"layer_split: .* add up to the model's 80 layers"):
            question(split=split)
    with pytest.raises(ValueError, match="it names 2 stages, not pipeline_parallel_size=4"):
        question(split=(40, 40), pipeline=4)
    with pytest.raises(ValueError, match=r"4096 tokens in and 512 out .* max_model_len=4096"):
        question(model="llama-2-7b")


@pytest.mark.parametrize("layout", [MeshLayout(), MeshLayout(4, 2)], ids=str)
@pytest.mark.parametrize(("method", "budget"), [(None, None), ("pyramidkv", "25%")])
def test_the_scheduler_runs_as_many_at_once_as_planned_and_preempts_none(
    method: str | None, budget: str | None, layout: MeshLayout
) -> None:
    """The real scheduler over ranks as planned; admitted at once, more are preempted."""
    model, gpu = model_of("llama-3-8b"), device_of("h100-80gb")
    ranks = Footprint.of_ranks(model.spec, DTYPES["bfloat16"], layout)
    sizes = EngineSizes(max_model_len=512, kv_memory_gib=0.25)
    workload = Workload(160, 80, Retention.parse(method, budget))
    replica = ReplicaMemory(model, gpu, ranks, sizes, workload)
    most = replica.most_sequences()
    assert 5 < most < 40
    assert not replica.fits(most + 1, most + 1)
    for num_seqs, preempts in ((most, False), (most + most // 2, True)):
        scheduler = Scheduler(
            replica.worker_infos(num_seqs),
            max_num_seqs=num_seqs,
            max_model_len=512,
            max_prefill_tokens=2048,
            expected_output_tokens=1 if preempts else 512,
        )
        fakes = FakeReplica(list(scheduler.ledger.workers))
        params = SamplingParams(max_tokens=80, ignore_eos=True)
        for number in range(num_seqs):
            request = TokenRequest(str(number), (number,) * 160, params, workload.retention)
            scheduler.add(request, sampling_of(request).spec(0, ()))
        flights: deque[tuple[StepPlan, list[StepResult]]] = deque()
        events, running = list[Event](), 0
        while not scheduler.is_idle:
            while (step := scheduler.schedule()) is not None:
                flights.append((step, fakes.run(step)))
            running = max(running, scheduler.num_running)
            if flights:
                events += scheduler.absorb(*flights.popleft())
        assert any(isinstance(event, Preempted) for event in events) == preempts
        assert preempts or running == most


def test_a_job_takes_as_many_turns_as_fit() -> None:
    [one] = plan(question(tensor=8, pipeline=1, num_requests=100))
    [two] = plan(question(tensor=8, pipeline=1, num_requests=200))
    assert one.job_seconds is not None
    assert two.job_seconds is not None
    assert one.job_seconds < two.job_seconds < 2 * one.job_seconds


def test_a_prompt_of_a_job_goes_through_all_stages() -> None:
    """One alone, of which only the first token is wanted, takes what a prompt takes."""
    asked = question(tensor=2, pipeline=4, num_requests=1)
    asked = replace(asked, workload=replace(asked.workload, new_tokens=1))
    [each] = plan(asked)
    assert each.kept is not None
    waiting = asked.factors.step_seconds  # once in each stage, once in all
    assert each.job_seconds == pytest.approx(each.kept.prompt_seconds - waiting, rel=0.1)


def test_money_follows_from_price_and_rate() -> None:
    [each] = plan(question(tensor=4, pipeline=2, hour_price=2.5))
    assert each.kept is not None
    dollars = 8 * 2.5 / 3600 / each.kept.output_tokens_per_second * 1e6
    assert each.dollars_per_million == pytest.approx(dollars)


@pytest.mark.parametrize("name", DEVICES)
def test_known_gpus_have_plausible_figures(name: str) -> None:
    device = DEVICES[name]
    stated = float(name.rsplit("-", 1)[1].removesuffix("gb"))
    assert 0.85 * stated < device.memory_gib * 1.0737 < 1.1 * stated  # GiB of the stated GB
    assert 100 < device.flops / device.bandwidth < 500  # products a byte


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("memory_gib", None, "must be a number from 0.01 to 1e+06, not None"),
        ("memory_gib", math.inf, "not inf"),
        ("bandwidth", math.nan, "not nan"),
        ("bandwidth", 1e-300, "must be a number from 1e+06"),
        ("flops", 10**400, "must be a number"),
        ("link_seconds", math.inf, "from 0 to 60"),
        ("node_bandwidth", None, "not None"),
        ("gpus_per_node", 0.5, "must be a whole number from 1 to 1024"),
        ("gpus_per_node", True, "must be a whole number"),
        ("hour_price", math.inf, "from 0 to 1e+06"),
        ("name", [1], "must be a text"),
        ("name", None, "must be a text"),
    ],
)
def test_a_gpu_of_ones_own_has_figures_that_can_be(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: ") as error:
        replace(DEVICES["l4-24gb"], **{field: value})
    assert message in str(error.value)


def test_a_gpu_that_is_not_known_gets_the_closest() -> None:
    with pytest.raises(ValueError, match="gpu: 'h100-80g' is not known; did you mean 'h100-80gb'"):
        device_of("h100-80g")


def test_a_plan_takes_no_time() -> None:
    plan(question())
    started = time.process_time()
    plan(question(retention="recommended-adaptive", budget="20%"))
    assert time.process_time() - started < 0.5


def test_the_page_names_every_known_gpu_and_factor() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "planning.md").read_text("utf-8")
    for name in (*DEVICES, *(field.name for field in fields(Factors))):
        assert f"`{name}`" in text


def test_short_prompts_are_computed_together() -> None:
    """So 16 prompts of 128 tokens cost about as much as one of 2,048, and not 16 launches."""
    rates = []
    for prompt_tokens in (128, 2048):
        asked = question(tensor=4, pipeline=2)
        workload = replace(asked.workload, prompt_tokens=prompt_tokens)
        sizes = replace(asked.sizes, max_prefill_tokens=2048)
        [each] = plan(replace(asked, workload=workload, sizes=sizes))
        assert each.kept is not None
        rates.append(each.kept.prefill_tokens_per_second)
    assert rates[0] == pytest.approx(rates[1], rel=0.2)
