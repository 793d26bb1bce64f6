"""Decode-stage retention, counted: when rows are compacted, and what they are charged until then.

Plain loops that feed one token at a time are the oracle of the closed forms.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_replica import FakeReplica, make_workers, next_token
from support.pyramidinfer_counts import RELEASE, RETENTION

from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.ledger import Ledger
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.compression.decode import DecodeStage, TrimStage
from saqqara.compression.growth import (
    cycle_of,
    feeds_single_tokens,
    most_ring_size,
    num_ring_queries,
    ring_size,
    sums_mass,
    trimmed_rows,
)
from saqqara.compression.retention import Retention
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo
from saqqara.workers.retain.masses import remembered_mass, rows_mass
from saqqara.workers.state.rings import QueryRings
from saqqara.workers.state.sums import MassSums

BUDGET = 12


def retention(method: str = "pyramidkv", slack_pages: int = 2) -> Retention:
    settings = {"method": method, "budget": BUDGET, "window": 3, "sinks": 1}
    return Retention.parse(settings | {"decode": {"slack_pages": slack_pages}})


def lengths_of_a_row(kept: int, target: int, slack: int, num_fed: int) -> list[tuple[int, int]]:
    """Length of a row before and after each of the fed tokens' steps ends."""
    lengths = []
    for _ in range(num_fed):
        kept += 1
        peak = kept
        if kept == target + slack:
            kept = target
        lengths.append((peak, kept))
    return lengths


@given(
    prompt_tokens=st.integers(1, 40),
    slack_pages=st.integers(1, 3),
    page_tokens=st.integers(1, 5),
)
def test_rows_grow_by_the_slack_and_fall_back_to_their_target(
    prompt_tokens: int, slack_pages: int, page_tokens: int
) -> None:
    settings = retention(slack_pages=slack_pages)
    cycle = cycle_of(settings, prompt_tokens, page_tokens)
    assert cycle is not None
    slack = slack_pages * page_tokens
    for kept in set(settings.layer_tokens(prompt_tokens, 4)):
        # A prompt that was kept whole grows up to the budget first.
        target = kept if prompt_tokens > BUDGET else BUDGET
        num_compactions = 0
        before = kept
        for fed, (peak, after) in enumerate(lengths_of_a_row(kept, target, slack, 100), start=1):
            assert kept + cycle.grown(fed - 1) == before
            assert 1 <= cycle.room(fed - 1) == target + slack - before
            assert cycle.fires(fed) == (after < peak)
            num_compactions += after < peak
            assert cycle.num_compactions(fed) == num_compactions
            assert peak <= kept + cycle.most == target + slack
            before = after
        assert not cycle.fires(0)
        assert num_compactions > 0


def test_the_setting_is_read_written_and_named() -> None:
    settings = {"method": "snapkv", "budget": 64, "decode": {"slack_pages": 3}}
    parsed = Retention.parse(settings)
    assert parsed.decode == DecodeStage(3)
    assert parsed.label == "snapkv@64,decode=3"
    assert parsed.to_dict()["decode"] == {"slack_pages": 3}
    assert Retention.parse(parsed.to_dict()) == parsed
    assert hash(Retention.parse(parsed.to_dict())) == hash(parsed)
    assert Retention.parse(parsed, budget=80).decode == DecodeStage(3)
    assert Retention.parse(settings | {"decode": True}).decode == DecodeStage(4)
    off = Retention.parse({"method": "snapkv", "budget": 64})
    for value in (None, False):
        assert Retention.parse(settings | {"decode": value}) == off
    assert "decode" not in off.to_dict()
    assert Retention.parse({"method": "full", "decode": False}) == Retention()


@pytest.mark.parametrize(
    ("method", "decode", "message"),
    [
        ("full", True, "decode: 'full' has no score, so nothing tells which tokens to drop"),
        ("snapkv", {"slack_pages": 0}, "decode.slack_pages: must be an integer of at least 1"),
        ("snapkv", {"slack_pages": 1.5}, "decode.slack_pages: must be an integer of at least 1"),
        ("snapkv", {"slack_pages": True}, "decode.slack_pages: must be an integer of at least 1"),
        ("snapkv", {"slack": 2}, "decode.slack: not a setting; allowed: slack_pages"),
        ("snapkv", 4, "decode: must be a mapping such as"),
    ],
)
def test_bad_settings_are_named(method: str, decode: object, message: str) -> None:
    budget = {} if method == "full" else {"budget": 64}
    with pytest.raises(ValueError, match=message):
        Retention.parse({"method": method, "decode": decode} | budget)


def test_only_scores_that_look_at_queries_need_rings() -> None:
    sizes = {m: num_ring_queries(retention(m)) for m in ("snapkv", "knorm", "streaming", "random")}
    assert sizes == {"snapkv": 3, "knorm": 0, "streaming": 0, "random": 0}
    assert num_ring_queries(Retention.parse({"method": "snapkv", "budget": 64})) == 0
    h2o = Retention.parse({"method": "h2o", "budget": 64, "decode": True})
    assert num_ring_queries(h2o) == 0
    assert sums_mass(h2o)
    assert not sums_mass(retention("snapkv"))
    assert not sums_mass(Retention.parse({"method": "h2o", "budget": 64}))
    assert ring_size(trimming("stored"), 50, 100) == 1
    assert ring_size(retention("snapkv"), 50, 100) == 3
    assert feeds_single_tokens(h2o)
    assert feeds_single_tokens(trimming("published"))
    assert not feeds_single_tokens(trimming("stored"))


def trimming(trigger: str, exceed: int = 16, **settings: object) -> Retention:
    stage = {"trigger": trigger, "exceed": exceed}
    return Retention.parse({"method": "pyramidinfer", "decode": stage} | settings)


def test_pyramidinfer_has_a_stage_of_its_own() -> None:
    parsed = trimming("published", 8)
    assert parsed.decode == TrimStage("published", 8)
    assert parsed.label == "pyramidinfer,decode=published/8"
    assert Retention.parse(parsed.to_dict()) == parsed
    assert Retention.parse({"method": "pyramidinfer", "decode": True}).decode == TrimStage()
    assert Retention.parse({"method": "pyramidinfer", "decode": False}).decode is None
    # With a score on top its rows have targets, and are compacted to them.
    scored = {"method": "snapkv", "budget": 64, "propagate": "pyramidinfer", "decode": True}
    assert Retention.parse(scored).decode == DecodeStage()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "pyramidinfer", "decode": {"slack_pages": 2}},
            r"decode.slack_pages: not a setting; allowed: trigger, exceed \(slack_pages is for",
        ),
        (
            {"method": "snapkv", "budget": 64, "decode": {"trigger": "stored"}},
            r"decode.trigger: not a setting; allowed: slack_pages \(slack_pages is for methods",
        ),
        (
            {
                "method": "snapkv",
                "budget": 64,
                "propagate": "pyramidinfer",
                "decode": {"exceed": 16},
            },
            "decode.exceed: not a setting; allowed: slack_pages",
        ),
        ({"method": "once", "decode": True}, "decode: 'once' has no score"),
        ({"method": "full", "decode": {"trigger": "stored"}}, "decode: 'full' has no score"),
        (
            {"method": "pyramidinfer", "decode": {"trigger": "always"}},
            "decode.trigger: must be 'stored' or 'published', not 'always'",
        ),
        (
            {"method": "pyramidinfer", "decode": {"exceed": 1}},
            "decode.exceed: must be an integer of at least 2",
        ),
        ({"method": "pyramidinfer", "decode": 16}, "decode: must be a mapping such as {'trigger'"),
    ],
)
def test_stages_of_the_other_kind_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retention.parse(settings)


def trimmed_by_hand(
    trigger: str, exceed: int, stored: list[int], prompt_tokens: int, num_fed: int
) -> list[tuple[list[int], list[int]]]:
    """Lengths by layer, at the peak of each fed token's step and after it; sinks 4, recent 0.2."""
    num_layers, mark, lengths = len(stored), list(stored), []
    published = trigger == "published"
    for seen in range(prompt_tokens + 1, prompt_tokens + num_fed + 1):
        recent = (stored[0] + 1) * 2 // 10
        stored = [length + 1 for length in stored]
        peak = list(stored)
        for layer, length in enumerate(peak):
            before = length - 1 - recent
            if (seen - recent if published else length) - mark[layer] < exceed:
                continue
            if not published and before - exceed < 4:
                continue
            looked_at = min(exceed, before)
            share = 0.1 + 0.9 * (1 + math.cos(math.pi * layer / num_layers)) / 2
            keep = min(max(int(round(0.9 * share * looked_at, 9)), 1), looked_at)
            stored[layer] -= looked_at - keep
            mark[layer] = stored[layer] - (recent if published else 0)
        lengths.append((peak, list(stored)))
    return lengths


@pytest.mark.parametrize(
    "run", RELEASE, ids=[f"{run['prompt_tokens']}+{run['fed_tokens']}" for run in RELEASE]
)
def test_the_published_stage_stores_what_the_release_stores(run: dict[str, Any]) -> None:
    rows = trimmed_rows(RETENTION, run["prompt_tokens"], 30)
    assert rows is not None
    for _ in range(run["fed_tokens"]):
        rows.feed(1)
    assert rows.stored.tolist() == run["stored"]
    assert rows.stored.sum() == run["total"]


@settings(max_examples=60, deadline=None)
@given(
    exceed=st.integers(2, 40),
    recent_ratio=st.sampled_from([0, 0.05, 0.2, 0.5, 0.95]),
    prompt_tokens=st.integers(1, 300),
    num_fed=st.sampled_from([1, 30, 700]),
)
def test_a_ring_has_room_for_every_cut(
    exceed: int, recent_ratio: float, prompt_tokens: int, num_fed: int
) -> None:
    settings = trimming("published", exceed, recent_ratio=recent_ratio, min_context=8)
    rows = trimmed_rows(settings, prompt_tokens, 2)
    assert rows is not None
    most = 0
    for _ in range(num_fed):
        recent = int(round(recent_ratio * (int(rows.stored[0]) + 1), 9))
        most = max(most, 1 + recent)
        assert all(trim.num_queries == 1 + recent for trim in rows.feed(1))
        assert rows.stored.min() >= 1
    max_tokens = prompt_tokens + num_fed
    assert ring_size(settings, prompt_tokens, max_tokens) == most
    assert most <= most_ring_size(settings, max_tokens)


@settings(max_examples=40)
@given(
    trigger=st.sampled_from(["stored", "published"]),
    exceed=st.integers(2, 20),
    prompt_tokens=st.integers(1, 300),
    rho=st.sampled_from([0.2, 0.6, 0.9]),
    reserved=st.integers(0, 60),
    pieces=st.lists(st.integers(1, 9), max_size=60),
)
def test_trimmed_rows_are_charged_layer_by_layer(
    trigger: str, exceed: int, prompt_tokens: int, rho: float, reserved: int, pieces: list[int]
) -> None:
    workers = make_workers(100_000, stages=(4, 3), head_ranges=((0, 2), (2, 3)), page_tokens=4)
    ledger = Ledger(workers, 2)
    settings = trimming(trigger, exceed, rho=rho, min_context=8)
    demand = ledger.demand(settings, prompt_tokens)
    rows = list(settings.entering_tokens(prompt_tokens, 7))
    by_hand = trimmed_by_hand(trigger, exceed, rows, prompt_tokens, max(sum(pieces), reserved))

    def pages(lengths: list[int]) -> list[int]:
        return [pages_of(np.array([lengths] * 3).T, worker) for worker in workers]

    most = np.max([pages(rows), *(pages(peak) for peak, _ in by_hand[:reserved])], axis=0)
    assert demand.most(reserved).tolist() == most.tolist()
    ledger.admit(1, demand, prompt_tokens, reserved)
    ledger.advance_prefill([1], 7)
    assert (100_000 - ledger.free).tolist() == most.tolist()
    fed = 0
    for piece in pieces:
        room = ledger.room(1)
        assert room is not None
        assert room >= 1
        num = min(piece, room)
        # No layer is cut before the last token of what may be fed at once.
        assert all(peak == after for peak, after in by_hand[fed : fed + num - 1])
        charged = 100_000 - ledger.free
        slots, nums = np.array([1]), np.array([num])
        fed += num
        peak, after = by_hand[fed - 1]
        expected = np.maximum(pages(peak), charged)
        assert (charged + ledger.append_cost(slots, nums)[0]).tolist() == expected.tolist()
        ledger.append(slots, nums)
        assert (100_000 - ledger.free).tolist() == expected.tolist()
        ledger.settle()
        assert ledger.allocated().tolist() == pages(after)
        charges = most.tolist() if fed < reserved else pages(after)
        assert (100_000 - ledger.free).tolist() == charges
    ledger.set_refused(1, 2)
    assert ledger.free[2] == 100_000
    ledger.release(1)
    assert (ledger.free == 100_000).all()
    assert ledger.room(1) is None


# Rings and sums


def test_sums_follow_their_tokens_through_storage() -> None:
    """Against a dictionary of lists; slots come and go, and rows have lengths of their own."""
    generator = torch.Generator().manual_seed(1)
    sums = MassSums(3, 2, 2, torch.device("cpu"))
    expected: dict[tuple[int, int], list[float]] = {}
    masses = torch.rand(2, 9, generator=generator)
    for slot, indices in ((2, [torch.tensor([0, 3, 8]), torch.tensor([1, 2, 4, 5])]), (0, None)):
        sums.open(slot)
        sums.store(slot, 1, masses, indices, more_tokens=4)
        for head in range(2):
            start = masses[head] if indices is None else masses[head, indices[head]]
            expected[slot, head] = start.tolist()
    assert sums.has(np.array([0, 1, 2])).tolist() == [True, False, True]
    assert sums.num_bytes == 2 * 2 * 2 * (9 + 4) * 4  # layers, slots, heads, tokens, fp32
    for _ in range(4):
        step = torch.zeros(2, 2, 20)
        for i, slot in enumerate((0, 2)):
            for head in range(2):
                row = expected[slot, head]
                row.append(0.0)
                new = torch.rand(len(row), generator=generator)
                step[i, head, : len(row)] = new
                expected[slot, head] = [a + b for a, b in zip(row, new.tolist(), strict=True)]
        sums.add(np.array([0, 2]), 1, step)
    slots, heads = np.array([2, 0]), np.array([1, 0])
    chosen = torch.tensor([[0, 2, 5, 7], [1, 2, 11, 12]])
    sums.compact(slots, 1, heads, chosen)
    for slot, head, places in ((2, 1, chosen[0]), (0, 0, chosen[1])):
        stays = [expected[slot, head][j] for j in places.tolist()]
        expected[slot, head] = [*stays, 0.0, 0.0, 0.0]
    for (slot, head), row in expected.items():
        got = sums.read(np.array([slot]), 1, np.array([head]), len(row))[0]
        # Added in single precision there, in double precision here.
        torch.testing.assert_close(got, torch.tensor(row), atol=1e-6, rtol=0)
    assert not sums.read(np.array([0, 2]), 0, np.array([0, 1]), 13).any()
    sums.close(2)
    sums.open(1)
    assert not sums.read(np.array([1, 1]), 1, np.array([0, 1]), 13).any()
    for slot in range(3):
        sums.close(slot)
    assert sums.num_bytes == sums.num_open == 0


def test_a_ring_holds_the_last_queries_of_its_slot() -> None:
    rings = QueryRings(4, 2, 3, 5, torch.float32, torch.device("cpu"))
    sizes = {0: 4, 2: 3, 3: 1}
    seen: dict[int, list[torch.Tensor]] = {slot: [] for slot in sizes}
    generator = torch.Generator().manual_seed(0)
    for slot, size in sizes.items():
        rings.open(slot, size)
        prompt = torch.randn(slot + 1, 3, 5, generator=generator)
        for layer in range(2):
            rings.store(slot, layer, prompt + layer, slot + 1)
        seen[slot] += list(prompt)
    rings.open(1, 0)
    for step in range(12):
        slots, counts = np.array([3, 1, 0, 2]), np.array([1, 2, 1 + step % 5, 1])
        positions = np.concatenate(
            [
                len(seen.get(s, [])) + np.arange(c)
                for s, c in zip(slots.tolist(), counts.tolist(), strict=True)
            ]
        )
        queries = torch.randn(int(counts.sum()), 3, 5, generator=generator)
        writes = rings.writes(slots, counts, positions)
        assert writes is not None
        for layer in range(2):
            rings.append(writes, layer, queries + layer)
        for slot, new in zip(slots.tolist(), torch.split(queries, counts.tolist()), strict=True):
            if slot in seen:
                seen[slot] += list(new)
        for slot, size in sizes.items():
            if len(seen[slot]) >= size:
                got = rings.read(np.array([slot]), 1, np.array([len(seen[slot])]))
                assert torch.equal(got[0], torch.stack(seen[slot][-size:]) + 1)
    assert rings.writes(np.array([1]), np.array([1]), np.array([0])) is None


def test_rings_share_a_buffer_that_is_used_again_and_given_back() -> None:
    rings = QueryRings(6, 1, 1, 2, torch.float32, torch.device("cpu"))
    for slot in range(4):
        rings.open(slot, 4)
    most = rings.num_bytes
    assert most == 4 * 4 * 2 * 4  # rings, queries, numbers, bytes
    rings.close(1)
    rings.open(5, 4)
    assert rings.num_bytes == most
    for slot in (1, 4):
        rings.open(slot, 4)
    assert rings.num_bytes == most / 4 * 6
    for slot in range(6):
        rings.close(slot)
    rings.close(0)  # it has none any more
    assert rings.num_bytes == 0
    assert rings.num_open == 0


def test_rings_move_together_before_they_grow_and_keep_normalisers() -> None:
    """Rings of several sizes, some with normalisers, opened and closed in turns."""
    rings = QueryRings(6, 2, 3, 5, torch.float32, torch.device("cpu"))
    numbers = np.random.default_rng(0)
    held: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for step in range(60):
        slot = int(numbers.integers(6))
        if slot in held:
            rings.close(slot)
            del held[slot]
            continue
        size = int(numbers.integers(1, 9))
        rings.open(slot, size, with_normalisers=slot % 2 == 0)
        queries, lse = torch.randn(size, 3, 5), torch.randn(size, 3) if slot % 2 == 0 else None
        for layer in range(2):
            rings.store(slot, layer, queries, 100 + step, lse)
        held[slot] = queries, lse
        assert rings.num_bytes <= 2 * 6 * 8 * 3 * (5 + 1) * 4  # layers, rings, queries, heads
        for other, (queries, lse) in held.items():
            end, some = np.array([97]), np.array([other])
            size, last = rings.size(other), len(queries) // 2 + 1
            got = rings.read(some, 1, end, size)[0]
            assert sorted(got[:, 0, 0].tolist()) == sorted(queries[:, 0, 0].tolist())
            if lse is not None:
                got = rings.read_normalisers(some, 1, end, last)[0]
                assert set(got[:, 0].tolist()) <= set(lse[:, 0].tolist())
    place = rings.places(np.array([4]), np.array([33]))
    if rings.size(4):
        rings.normalise(place, 0, torch.full((1, 3), 7.0))
        assert (rings.read_normalisers(np.array([4]), 0, np.array([34]), 1) == 7).all()


def test_remembered_attention_is_that_of_the_time() -> None:
    """Queries saw more keys than are left; their weights on these are what they were."""
    generator = torch.Generator().manual_seed(0)
    num, window, heads, group, dim = 2, 4, 3, 2, 6
    q = torch.randn(num, window, heads * group, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(num, heads, 9, dim, generator=generator, dtype=torch.float64)
    weights = torch.linspace(1, 1.2, window)
    lse = torch.empty(num, window, heads * group)
    expected = torch.zeros(num, heads, 3, dtype=torch.float64)
    for n, i, head in np.ndindex(num, window, heads * group):
        scores = k[n, head // group] @ q[n, i, head] * 0.3
        lse[n, i, head] = scores.logsumexp(dim=0)
        expected[n, head // group] += weights[i] * torch.softmax(scores, dim=0)[[1, 4, 5]]
    got = remembered_mass(q.float(), lse, k[:, :, [1, 4, 5]].float(), 0.3, weights)
    # fp32 against float64: sums of 8 weights of about 1.
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_mass_of_many_rows_is_that_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, group, window, num_keys, dim = 5, 2, 4, 9, 6
    q = torch.randn(window, rows * group, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(num_keys, rows, dim, generator=generator, dtype=torch.float64)
    expected = torch.zeros(rows, num_keys, dtype=torch.float64)
    for row in range(rows):
        for i in range(window):
            last = num_keys - window + i
            for g in range(group):
                scores = k[: last + 1, row] @ q[i, row * group + g] * 0.3
                expected[row, : last + 1] += torch.softmax(scores, dim=0)
    got = rows_mass(q.float(), k.float(), 0.3)
    assert got.dtype == torch.float32
    # fp32 against float64: sums of 8 weights of at most 1.
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


# Ledger and scheduler


def pages_of(rows: np.ndarray, worker: WorkerInfo) -> int:
    mine = rows[worker.start_layer : worker.stop_layer, worker.start_head : worker.stop_head]
    return sum(-(-int(length) // worker.page_tokens) for length in mine.ravel())


@given(
    prompt_tokens=st.integers(1, 40),
    slack_pages=st.integers(1, 3),
    page_tokens=st.sampled_from([1, 3, 4]),
    reserved=st.integers(0, 40),
    pieces=st.lists(st.integers(1, 5), max_size=40),
)
def test_a_step_is_charged_its_peak_and_settled_for_what_stays(
    prompt_tokens: int, slack_pages: int, page_tokens: int, reserved: int, pieces: list[int]
) -> None:
    workers = make_workers(
        10_000, stages=(3, 2), head_ranges=((0, 2), (2, 3)), page_tokens=page_tokens
    )
    ledger = Ledger(workers, 2)
    settings = retention(slack_pages=slack_pages)
    demand = ledger.demand(settings, prompt_tokens)
    ledger.admit(1, demand, prompt_tokens, reserved)
    ledger.advance_prefill([1], 5)
    rows = settings.row_tokens(prompt_tokens, 5, 3).copy()
    slack = slack_pages * page_tokens
    grace = 0 if prompt_tokens > BUDGET else BUDGET - prompt_tokens
    limit = rows + grace + slack
    most = [pages_of(np.minimum(limit, rows + reserved), w) for w in workers]
    assert demand.most(reserved).tolist() == most
    assert (10_000 - ledger.free).tolist() == most
    fed = 0
    for piece in pieces:
        num = min(piece, ledger.room(1) or 0)
        assert num >= 1
        rows += num
        slots, nums = np.array([1]), np.array([num])
        held = 10_000 - ledger.free
        assert (held + ledger.append_cost(slots, nums)[0]).tolist() == [
            max(pages_of(rows, w), h) for w, h in zip(workers, held.tolist(), strict=True)
        ]
        ledger.append(slots, nums)
        fed += num
        peak = [pages_of(rows, w) for w in workers]
        assert ((10_000 - ledger.free) >= peak).all()
        if (rows == limit).all():
            rows -= slack
        assert not (rows >= limit).any()
        ledger.settle()
        stays = [pages_of(rows, w) for w in workers]
        assert ledger.allocated().tolist() == stays
        if fed >= reserved:
            assert (10_000 - ledger.free).tolist() == stays
        else:
            assert (10_000 - ledger.free).tolist() == most
    ledger.release(1)
    assert (ledger.free == 10_000).all()
    assert ledger.room(1) is None


def step(scheduler: Scheduler, replica: FakeReplica) -> tuple[StepPlan, list[StepResult]] | None:
    plan = scheduler.schedule()
    if plan is None:
        return None
    results = replica.run(plan)
    scheduler.absorb(plan, results)
    return plan, results


@pytest.mark.parametrize("score", [None, tuple(range(90))])
def test_long_outputs_fit_a_pool_that_never_has_to_refuse(score: tuple[int, ...] | None) -> None:
    """Pages are counted at their peak: workers, which append before they compact, never refuse."""
    # 8 rows of at most 12 + 8 tokens on average (26 in the lowest layer), in pages of 4.
    workers = make_workers(8 * 6 * 3)
    settings = {"max_num_seqs": 8, "max_model_len": 256, "max_extend_tokens": 7}
    scheduler = Scheduler(workers, **settings, expected_output_tokens=1)
    replica = FakeReplica(workers)
    sequences = []
    for number in range(12):
        prompt = tuple((number * 7 + i) % 128 for i in range(3 + 4 * number))
        params = SamplingParams(max_tokens=90, ignore_eos=True)
        request = TokenRequest(str(number), prompt, params, retention(), 0, score)
        sequences.append(scheduler.add(request, params.spec(0)))
    refused, most_items = 0, 0
    while (done := step(scheduler, replica)) is not None:
        refused += sum(len(result.refused) for result in done[1])
        most_items = max(most_items, *(i.num_tokens for i in done[0].decode), 0)
    assert refused == 0
    assert scheduler.is_idle
    # What scoring will feed is charged from the start, so only generation preempts.
    assert (sum(s.num_preemptions for s in sequences) > 0) == (score is None)
    # Generated tokens are replayed one by one, scored ones fed in pieces.
    assert (most_items == 1) == (score is None)
    for sequence in sequences:
        if score is None:
            tokens = list(sequence.request.prompt_token_ids)
            for _ in range(90):
                tokens.append(next_token(tokens))
            assert sequence.output_token_ids == tokens[-90:]
        else:
            assert len(sequence.scored_logprobs) == 90


def test_what_a_compaction_returns_is_given_away_in_the_next_plan_not_in_its_own() -> None:
    """Within a plan, prompts are written before rows are compacted."""
    # 8 rows: 3 pages each after prefill, 5 at the peak (12 + 8 tokens), 4 right after it.
    workers = make_workers(8 * (4 + 3))
    scheduler = Scheduler(workers, max_num_seqs=2, max_model_len=256)
    replica = FakeReplica(workers)
    # The second asks for one token, which takes no room: it needs the 3 pages that it starts with.
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first, second = (
        TokenRequest(name, tuple(range(16)), sampling, retention("streaming"), 0)
        for name, sampling in (("a", params), ("b", SamplingParams(max_tokens=1)))
    )
    scheduler.add(first, params.spec(0))
    fed, started = 0, None
    while (done := step(scheduler, replica)) is not None:
        plan, results = done
        assert not any(result.refused for result in results)
        fed += len(plan.decode) if started is None else 0
        if fed == 5 and started is None:
            scheduler.add(second, params.spec(0))
        if plan.new and plan.step > 0 and started is None:
            started = fed
    assert started == 9  # the first token after the compaction, which came with the eighth
