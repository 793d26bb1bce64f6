"""The scheduler plans steps so that every sequence gets exactly the tokens it would get alone.

All tests run it against `FakeReplica`, which asserts that every plan is one that workers can run.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_replica import (
    FakeReplica,
    RaggedRetention,
    make_workers,
    next_token,
    token_logprob,
)

from saqqara.cluster.engine.intake import sampling_of
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.events import (
    Event,
    Finished,
    NewScores,
    NewToken,
    Preempted,
    Prefilled,
)
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Sequence, Status, TokenRequest
from saqqara.compression.decode import DecodeStage
from saqqara.compression.retention import Retention
from saqqara.compression.scores import SnapKV
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo

FULL = Retention.parse("full")
PYRAMID = Retention.parse({"method": "pyramidkv", "budget": 12, "window": 3, "sinks": 1})
RAGGED = RaggedRetention(method="ragged", score=SnapKV(), budget=12, window=3)
ONCE = Retention.parse(
    {"propagate": {"kind": "once", "layer": 0, "keep": 0.3, "window": 2, "sinks": 1}}
)
COMPACTED = Retention.parse(PYRAMID.to_dict() | {"decode": {"slack_pages": 1}})
COMPACTED_RAGGED = replace(RAGGED, decode=DecodeStage(2))
EOS = 5


@dataclass
class Run:
    """A scheduler and a replica that are stepped together, with plans in flight between them."""

    scheduler: Scheduler
    replica: FakeReplica
    in_flight: deque[tuple[StepPlan, list[StepResult]]] = field(default_factory=deque)
    events: list[Event] = field(default_factory=list)
    num_plans_at_once: int = 0

    def step(self) -> bool:
        """Fill the pipeline and absorb the oldest plan; False if there was nothing to do."""
        while (plan := self.scheduler.schedule()) is not None:
            self.in_flight.append((plan, self.replica.run(plan)))
            self.check_in_flight()
        self.num_plans_at_once = max(self.num_plans_at_once, len(self.in_flight))
        if not self.in_flight:
            self.events += self.scheduler.take_events()
            return False
        self.events += self.scheduler.absorb(*self.in_flight.popleft())
        return True

    def check_in_flight(self) -> None:
        assert len(self.in_flight) <= self.scheduler.max_in_flight
        tickets = Counter(
            item.slot for plan, _ in self.in_flight for item in plan.decode if item.sample
        )
        freed = {slot for plan, _ in self.in_flight for slot in plan.free}
        for slot, count in tickets.items():
            assert count <= self.scheduler.lookahead or slot in freed

    def finish(self, most_steps: int = 20_000) -> None:
        """Step until nothing is left."""
        for _ in range(most_steps):
            if not self.step():
                break
        assert self.scheduler.is_idle
        assert not self.replica.slots
        assert not self.replica.parked.slots
        assert self.scheduler.host_memory.num_parked == 0
        assert len(self.replica.blocks) == self.scheduler.prefixes.num_blocks
        if self.scheduler.prefixes.num_blocks:
            assert self.scheduler.reset_prefix_cache()
            self.finish()
            return
        assert all(w.pages_free == w.info.num_pages for w in self.replica.fakes)
        assert (self.scheduler.ledger.free == self.scheduler.ledger.num_pages).all()

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


def make_run(workers: list[WorkerInfo], **settings: object) -> Run:
    given = {"max_num_seqs": 8, "max_model_len": 256} | settings
    return Run(Scheduler(workers, **given), FakeReplica(workers))  # type: ignore[arg-type]


def make_request(
    name: str = "r",
    prompt: Many[int] = (1, 2, 3),
    retention: Retention = FULL,
    score: tuple[int, ...] | None = None,
    priority: int = 0,
    **sampling: object,
) -> TokenRequest:
    params = SamplingParams(**({"max_tokens": 8} | sampling))
    return TokenRequest(name, tuple(prompt), params, retention, priority, score)


def add(run: Run, request: TokenRequest) -> Sequence:
    spec = sampling_of(request).spec(0, (EOS,))
    return run.scheduler.add(request, spec, eos_token_ids=(EOS,))


def expected_tokens(request: TokenRequest, max_model_len: int = 256) -> list[int]:
    """What the fake model says after a prompt, written down without any scheduling."""
    tokens = list(request.prompt_token_ids)
    sampling = request.sampling
    output: list[int] = []
    while len(output) < (sampling.max_tokens or 10**9) and len(tokens) < max_model_len:
        token = next_token(tokens)
        blocked = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))}
        while len(output) < sampling.min_tokens and token in blocked:
            token = (token + 1) % 128
        tokens.append(token)
        output.append(token)
        if token in blocked:
            break
    return output


def expected_scores(request: TokenRequest) -> list[float]:
    tokens = [*request.prompt_token_ids, *(request.score_continuation or ())]
    start = len(request.prompt_token_ids)
    return [token_logprob(tokens[:p], tokens[p])[0] for p in range(start, len(tokens))]


def check(sequence: Sequence, max_model_len: int = 256) -> None:
    """A finished sequence has what it would have had alone."""
    request = sequence.request
    assert sequence.status is Status.FINISHED
    assert sequence.slot is None
    assert sequence.num_in_flight == sequence.num_sampling == 0
    if sequence.is_score:
        assert sequence.scored_logprobs == expected_scores(request)
        return
    expected = expected_tokens(request, max_model_len)
    assert sequence.output_token_ids == expected
    stops = {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else (EOS,))}
    assert sequence.finish_reason == ("stop" if expected[-1] in stops else "length")


def random_request(rng: random.Random, name: str, longest: int = 40) -> TokenRequest:
    prompt = [rng.randrange(128) for _ in range(rng.randint(1, longest))]
    if rng.random() < 0.3:
        prompt = [rng.randrange(3)] * 17  # one that others have, too
    elif rng.random() < 0.5:  # prefixes that are shared, nested and diverge
        kind = rng.choice([1, 1, 13])
        prompt = [i // kind for i in range(rng.choice([12, 24, 30]))] + prompt[:14]
    retention = rng.choice([FULL, PYRAMID, RAGGED, ONCE, COMPACTED, COMPACTED_RAGGED])
    score = None
    if rng.random() < 0.2:
        score = tuple(rng.randrange(128) for _ in range(rng.randint(1, 20)))
    return make_request(
        name,
        prompt,
        retention,
        score,
        priority=rng.choice([0, 0, 0, 1]),
        max_tokens=rng.randint(1, 24),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice([(), (7, 8, 9, 10, 11, 12)]),
    )


# One request, step by step


def test_one_request_is_prefilled_once_then_decoded_token_by_token() -> None:
    run = make_run(make_workers(100))
    sequence = add(run, make_request(max_tokens=3, ignore_eos=True))
    run.finish()
    check(sequence)
    prefill, first, second, free = run.replica.plans
    assert [g.stop_layer for g in prefill.prefill] == [4]
    assert [(i.position, i.num_tokens, i.sample) for i in first.decode] == [(3, 1, True)]
    assert [(i.position, i.num_tokens, i.sample) for i in second.decode] == [(4, 1, True)]
    assert free == StepPlan(step=3, free=(0,))
    assert [type(e) for e in run.events[:2]] == [Prefilled, NewToken]
    assert isinstance(run.events[-1], Finished)


def test_nothing_to_do_gives_no_plan() -> None:
    run = make_run(make_workers(100))
    assert run.scheduler.schedule() is None
    assert run.scheduler.is_idle


def test_eos_and_stop_tokens_end_a_sequence_unless_told_otherwise() -> None:
    prompt = next(p for p in range(1000) if next_token([p]) == EOS)
    stopped, ignoring = (make_request("a", [prompt], ignore_eos=i) for i in (False, True))
    by_token = make_request("c", [prompt], ignore_eos=True, stop_token_ids=(EOS,))
    delayed = make_request("d", [prompt], min_tokens=4)
    run = make_run(make_workers(100))
    sequences = [add(run, r) for r in (stopped, ignoring, by_token, delayed)]
    run.finish()
    for sequence in sequences:
        check(sequence)
    assert [s.finish_reason for s in sequences[:3]] == ["stop", "length", "stop"]
    assert [s.stop_reason for s in sequences[:3]] == [None, None, EOS]
    assert len(sequences[3].output_token_ids) >= 4


def test_a_sequence_ends_at_max_model_len() -> None:
    run = make_run(make_workers(100), max_model_len=10)
    sequence = add(run, make_request(prompt=[1] * 6, max_tokens=None, ignore_eos=True))
    run.finish()
    check(sequence, max_model_len=10)
    assert len(sequence.output_token_ids) == 4


# What cannot be served


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(prompt=[]), "prompt must have at least one token"),
        (make_request(prompt=[1] * 50), "prompt has 50 tokens; max_model_len=50 leaves room"),
        (make_request(score=()), "score_continuation must have at least one"),
        (make_request(prompt=[1] * 40, score=(1,) * 11), "longer than max_model_len=50"),
        (make_request(prompt=[1] * 45), "raise kv_memory_gib"),
        (make_request(prompt=[1] * 40, score=(1,) * 9), "raise kv_memory_gib"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(
    request_: TokenRequest, message: str
) -> None:
    run = make_run(make_workers(8 * 11), max_model_len=50)
    with pytest.raises(ValueError, match=message):
        add(run, request_)
    assert run.scheduler.is_idle


def test_a_layer_that_the_model_lacks_is_refused() -> None:
    run = make_run(make_workers(100))
    far = Retention.parse({"propagate": {"kind": "once", "layer": 4}})
    with pytest.raises(
        ValueError, match=r"^retention: propagate.layer: 4 is no layer of this model"
    ):
        add(run, make_request(retention=far))
    assert run.scheduler.is_idle


def test_a_sequence_that_outgrows_the_pool_ends_with_an_error() -> None:
    # 8 rows of 4-token pages: 24 pages hold 12 tokens, the prompt and 9 more.
    run = make_run(make_workers(24))
    sequence = add(run, make_request(max_tokens=50, ignore_eos=True))
    other = add(run, make_request("b", prompt=[9], max_tokens=2, ignore_eos=True))
    run.finish()
    assert sequence.finish_reason == "error"
    assert "kv_memory_gib" in (sequence.error or "")
    assert sequence.output_token_ids == expected_tokens(sequence.request)[:10]
    check(other)


# Prefill


def test_a_group_holds_prompts_of_one_retention_up_to_max_prefill_tokens() -> None:
    run = make_run(make_workers(1000), max_prefill_tokens=20)
    requests = [
        make_request("long", [1] * 30),
        make_request("a", [2] * 8),
        make_request("b", [3] * 20, PYRAMID),
        make_request("c", [4] * 12),
        make_request("d", [5] * 1),
    ]
    sequences = [add(run, r) for r in requests]
    run.finish()
    for sequence in sequences:
        check(sequence)
    groups = [g.slots for p in run.replica.plans for g in p.prefill]
    names = [[new.prompt_tokens for new in p.new] for p in run.replica.plans if p.new]
    assert names == [[30], [8, 12], [20], [1]]
    assert [len(slots) for slots in groups] == [1, 2, 1, 1]


def test_the_quantum_bounds_prefill_only_while_others_decode() -> None:
    run = make_run(make_workers(1000), prefill_quantum=20)
    add(run, make_request("a", [1] * 10, max_tokens=20, ignore_eos=True))
    run.step()
    add(run, make_request("b", [2] * 10, ignore_eos=True))
    add(run, make_request("c", [3] * 30, ignore_eos=True))
    run.finish()
    ranges = [
        (len(g.slots), g.start_layer, g.stop_layer, len(p.decode))
        for p in run.replica.plans
        for g in p.prefill
    ]
    # Alone: all layers at once. With a decoding, 40 tokens: at least one layer, no more.
    assert ranges[0] == (1, 0, 4, 0)
    assert ranges[1:5] == [(2, i, i + 1, 1) for i in range(4)]


def test_stages_work_on_different_groups_at_once() -> None:
    run = make_run(make_workers(1000, stages=(2, 2)), max_prefill_tokens=10)
    sequences = [add(run, make_request(str(i), [i] * 10)) for i in range(4)]
    run.finish()
    for sequence in sequences:
        check(sequence)
    stages = [[g.start_layer // 2 for g in p.prefill] for p in run.replica.plans if p.prefill]
    assert stages == [[0], [1, 0], [1, 0], [1, 0], [1]]


# Decode


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_decode_is_split_over_the_plans_in_flight(num_stages: int, lookahead: int) -> None:
    run = make_run(
        make_workers(2000, stages=(2,) * num_stages), lookahead=lookahead, max_num_seqs=12
    )
    sequences = [
        add(run, make_request(str(i), [i], max_tokens=30, ignore_eos=True)) for i in range(12)
    ]
    run.finish()
    for sequence in sequences:
        check(sequence)
    assert run.num_plans_at_once == num_stages + lookahead - 1 == run.scheduler.max_in_flight
    sizes = Counter(len(p.decode) for p in run.replica.plans if p.decode)
    assert sizes.most_common(1)[0][0] == 12 // num_stages
    assert max(sizes) == 12 // num_stages


def test_tokens_that_overran_a_stop_are_dropped() -> None:
    prompt = next(p for p in range(1000) if next_token([p, next_token([p])]) == EOS)
    run = make_run(make_workers(100), lookahead=2)
    request = make_request(prompt=[prompt], max_tokens=9)
    sequence = add(run, request)
    run.finish()
    check(sequence)
    assert len(sequence.output_token_ids) == 2
    assert sum(len(p.decode) for p in run.replica.plans) == 2  # the second overran
    assert run.count(NewToken) == 2


def test_a_length_limit_is_never_overrun() -> None:
    run = make_run(make_workers(100), lookahead=2)
    add(run, make_request(max_tokens=4, ignore_eos=True))
    run.finish()
    assert sum(len(p.decode) for p in run.replica.plans) == 3


# Scoring and resuming


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 20])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_scoring_feeds_all_but_the_last_token(num_tokens: int, lookahead: int) -> None:
    run = make_run(make_workers(100), max_extend_tokens=4, lookahead=lookahead)
    sequence = add(run, make_request(score=tuple(range(num_tokens))))
    run.finish()
    check(sequence)
    items = [i for p in run.replica.plans for i in p.decode]
    assert sum(i.num_tokens for i in items) == num_tokens - 1
    assert all(i.num_tokens <= 4 and not i.sample for i in items)


def test_the_extend_limit_holds_for_all_sequences_of_a_step_together() -> None:
    run = make_run(make_workers(1000), max_extend_tokens=6)
    sequences = [add(run, make_request(str(i), score=tuple(range(10)))) for i in range(4)]
    run.finish()
    for sequence in sequences:
        check(sequence)
    fed = [sum(i.num_tokens for i in p.decode if i.num_tokens > 1) for p in run.replica.plans]
    assert max(fed) == 6


def test_the_youngest_is_preempted_and_resumes_with_its_tokens() -> None:
    # 8 rows: three prompts of a page per row, with room for 3 more pages per row.
    run = make_run(make_workers(8 * 6), max_extend_tokens=3)
    requests = [make_request(str(i), [i] * 4, max_tokens=12, ignore_eos=True) for i in range(3)]
    sequences = [add(run, r) for r in requests]
    run.finish()
    for sequence in sequences:
        check(sequence)
    assert sequences[0].num_preemptions == 0
    assert sequences[2].num_preemptions >= 1
    assert run.count(Preempted) == sum(s.num_preemptions for s in sequences)
    replays = [i for p in run.replica.plans for i in p.decode if i.num_tokens > 1]
    assert replays
    assert all(i.num_tokens <= 3 for i in replays)


def test_a_lower_priority_yields() -> None:
    run = make_run(make_workers(8 * 4))
    low = add(run, make_request("low", [1] * 4, priority=5, max_tokens=12, ignore_eos=True))
    run.step()
    high = add(run, make_request("high", [2] * 4, max_tokens=12, ignore_eos=True))
    run.finish()
    check(low)
    check(high)
    assert (low.num_preemptions > 0, high.num_preemptions) == (True, 0)


def test_waiting_goes_by_priority_then_arrival() -> None:
    run = make_run(make_workers(1000), max_num_seqs=1)
    names = [("a", 1), ("b", 0), ("c", 1), ("d", 0)]
    for name, priority in names:
        add(run, make_request(name, priority=priority, max_tokens=1))
    run.finish()
    order = [e.sequence.request.request_id for e in run.events if isinstance(e, Finished)]
    assert order == ["b", "d", "a", "c"]


# Shared prefill


def test_choices_of_one_prompt_are_prefilled_once() -> None:
    run = make_run(make_workers(1000))
    request = make_request(prompt=[1] * 10, ignore_eos=True)
    sequences = [add(run, request) for _ in range(4)]
    other = add(run, make_request("other", [2] * 10, ignore_eos=True))
    run.finish()
    for sequence in [*sequences, other]:
        check(sequence)
    [plan] = [p for p in run.replica.plans if p.new]
    assert [n.shares_prefill_with for n in plan.new] == [None, 0, 0, 0, None]
    assert [g.slots for g in plan.prefill] == [(0, 1, 2, 3, 4)]
    assert run.replica.prefilled_tokens == 20


def test_a_follower_may_have_another_retention_and_be_a_score() -> None:
    """Behind it in the queue, other prompts wait for their own turn."""
    run = make_run(make_workers(1000), max_prefill_tokens=10)
    leader = add(run, make_request("a", [1] * 10, PYRAMID))
    stranger = add(run, make_request("b", [2] * 10, PYRAMID))
    followers = [
        add(run, make_request("c", [1] * 10, FULL)),
        add(run, make_request("d", [1] * 10, RAGGED)),
        add(run, make_request("e", [1] * 10, FULL, score=(3, 4, 5))),
        add(run, make_request("f", [1] * 10, PYRAMID)),
    ]
    alone = add(run, make_request("g", [1] * 10, ONCE))  # computes other hidden states
    twin = add(run, make_request("h", [1] * 10, ONCE))
    run.finish()
    for sequence in [leader, stranger, *followers, alone, twin]:
        check(sequence)
    news = [[n.shares_prefill_with is None for n in p.new] for p in run.replica.plans if p.new]
    assert news == [[True, False, False, False, False], [True], [True, False]]
    assert run.replica.prefilled_tokens == 30


def test_a_follower_without_room_waits_for_a_prefill_of_its_own() -> None:
    # 8 rows of 4-token pages: the leader takes 24 pages at once, a second one finds 16 left.
    run = make_run(make_workers(8 * 5))
    requests = [make_request(str(i), [1] * 11, max_tokens=3, ignore_eos=True) for i in range(2)]
    small = make_request("small", [1] * 11, PYRAMID, max_tokens=1)
    sequences = [add(run, r) for r in [*requests, small]]
    run.finish()
    for sequence in sequences:
        check(sequence)
        assert sequence.num_preemptions == 0
    assert all(n.shares_prefill_with is None for p in run.replica.plans for n in p.new)
    assert run.replica.prefilled_tokens == 33


def test_a_slot_is_room_too() -> None:
    run = make_run(make_workers(1000), max_num_seqs=3)
    sequences = [add(run, make_request(str(i), [1] * 10)) for i in range(5)]
    run.finish()
    for sequence in sequences:
        check(sequence)
    assert [len(p.new) for p in run.replica.plans if p.new] == [3, 2]


def test_followers_go_on_when_their_leader_is_aborted_half_way() -> None:
    run = make_run(make_workers(1000), prefill_quantum=10)
    busy = add(run, make_request("busy", [2], max_tokens=30, ignore_eos=True))
    run.step()
    leader = add(run, make_request("leader", [1] * 10))
    follower = add(run, make_request("follower", [1] * 10))
    run.step()
    run.step()
    assert leader.status is follower.status is Status.PREFILL
    run.scheduler.finish(leader, "abort")
    run.finish()
    assert leader.finish_reason == "abort"
    assert not leader.output_token_ids
    check(follower)
    check(busy)
    assert run.replica.prefilled_tokens == 11


def test_a_refused_leader_does_no_harm_to_its_followers() -> None:
    """Ragged leaders ask more of a rank than was expected; what follows them is exact."""
    run = make_run(uneven_workers(27), max_num_seqs=3)
    pairs = []
    for i in range(6):
        prompt = [i + 20] * 30
        for retention in (RAGGED, PYRAMID):
            request = make_request(f"{i}{retention.method}", prompt, retention, max_tokens=2)
            pairs.append(add(run, request))
    run.finish()
    led = [n for p in run.replica.plans for n in p.new if n.shares_prefill_with is not None]
    assert led, "some were shared"
    assert any(
        leader.num_refusals > 0 == follower.num_refusals
        for leader, follower in zip(pairs[::2], pairs[1::2], strict=True)
    )
    for sequence in pairs:
        check(sequence)


def test_a_preempted_follower_resumes_alone() -> None:
    run = make_run(make_workers(8 * 6), max_extend_tokens=3)
    request = make_request(prompt=[1] * 4, max_tokens=12, ignore_eos=True)
    sequences = [add(run, request) for _ in range(3)]
    run.finish()
    for sequence in sequences:
        check(sequence)
    assert sequences[2].num_preemptions >= 1
    first, *resumed = [p.new for p in run.replica.plans if p.new]
    assert [n.shares_prefill_with for n in first] == [None, 0, 0]
    assert resumed
    assert all(len(n.token_ids) > 4 * n.prompt_tokens for new in resumed for n in new)


def test_the_quantum_counts_what_is_computed() -> None:
    """Shared prompts count once, and propagation leaves fewer tokens for the upper layers."""
    run = make_run(make_workers(1000, stages=(5,)), prefill_quantum=40)
    busy = add(run, make_request("busy", [2], max_tokens=30, ignore_eos=True))
    run.step()
    add(run, make_request("a", [1] * 20, ONCE))
    add(run, make_request("b", [1] * 20, ONCE))
    run.finish()
    check(busy)
    ranges = [
        (g.start_layer, g.stop_layer)
        for p in run.replica.plans
        for g in p.prefill
        if len(g.slots) == 2
    ]
    assert ONCE.entering_tokens(20, 5) == (20, 6, 6, 6, 6)
    assert ranges == [(0, 4), (4, 5)]


# Refusals and aborts


def uneven_workers(num_pages: int) -> list[WorkerInfo]:
    """Two ranks with one kv head each: ragged heads can ask more of one than was expected."""
    return make_workers(num_pages, stages=(3,), head_ranges=((0, 1), (1, 2)))


def test_a_refused_sequence_tries_again() -> None:
    # Three layers of a head hold 36 tokens if both heads share alike; room for two sequences.
    run = make_run(uneven_workers(27), max_num_seqs=2)
    requests = [
        make_request(str(i), [i + 20] * 30, RAGGED, max_tokens=2, ignore_eos=True) for i in range(6)
    ]
    sequences = [add(run, r) for r in requests]
    run.finish()
    refused = sum(s.num_refusals for s in sequences)
    assert refused > 0
    for sequence in sequences:
        check(sequence)
        assert sequence.num_preemptions >= sequence.num_refusals


def test_a_sequence_that_is_refused_alone_ends_with_an_error() -> None:
    run = make_run(uneven_workers(12), max_num_seqs=2)
    sequence = add(run, make_request(prompt=[1] * 30, retention=RAGGED))
    run.finish()
    assert sequence.finish_reason == "error"
    assert "kv_memory_gib" in (sequence.error or "")


@pytest.mark.parametrize("num_steps", range(8))
@pytest.mark.parametrize("num_stages", [1, 2])
def test_abort_frees_at_any_time(num_steps: int, num_stages: int) -> None:
    run = make_run(
        make_workers(1000, stages=(2,) * num_stages), prefill_quantum=1, max_prefill_tokens=6
    )
    first = add(run, make_request("first", max_tokens=30, ignore_eos=True))
    run.step()
    aborted = [add(run, make_request(f"a{i}", [i] * 3, ignore_eos=True)) for i in range(3)]
    kept = add(run, make_request("kept", [7] * 3, ignore_eos=True))
    for _ in range(num_steps):
        run.step()
    for sequence in aborted:
        run.scheduler.finish(sequence, "abort")
    run.finish()
    check(first)
    check(kept)
    assert {s.finish_reason for s in aborted} <= {"abort", "length"}
    done = Counter(e.sequence.request.request_id for e in run.events if isinstance(e, Finished))
    assert set(done.values()) == {1}


def test_an_abort_alone_makes_a_plan_that_only_frees() -> None:
    run = make_run(make_workers(100))
    sequence = add(run, make_request())
    run.step()
    run.scheduler.finish(sequence, "abort")
    plan = run.scheduler.schedule()
    assert plan == StepPlan(step=1, free=(0,))


def test_restart_resumes_what_ran() -> None:
    workers = make_workers(200, stages=(2, 2))
    run = make_run(workers)
    sequences = [add(run, make_request(str(i), [i] * 5, ignore_eos=True)) for i in range(10)]
    for _ in range(6):
        run.step()
    run.in_flight.clear()
    run.replica = FakeReplica(make_workers(300))
    run.scheduler.restart(run.replica.workers)
    run.finish()
    for sequence in sequences:
        check(sequence)


def test_a_continuation_that_is_scored_again_counts_each_token_once() -> None:
    """A preempted score begins anew, and its first piece is shorter than what is known."""
    run = make_run(make_workers(200), max_extend_tokens=4)
    sequence = add(run, make_request(score=tuple(range(14))))
    while len(sequence.scored_logprobs) < 8:
        run.step()
    run.in_flight.clear()
    run.replica = FakeReplica(make_workers(200))
    run.scheduler.restart(run.replica.workers)
    run.finish()
    check(sequence)
    told = [event.num_tokens for event in run.events if isinstance(event, NewScores)]
    assert min(told) >= 0
    assert sum(told) == 14


# Everything at once


@dataclass(frozen=True)
class Setting:
    """A replica and how it is used."""

    seed: int
    stages: tuple[int, ...]
    head_ranges: tuple[tuple[int, int], ...]
    pages_per_row: int
    lookahead: int
    quantum: int | None
    max_prefill_tokens: int
    max_num_seqs: int
    window: int = 0
    prefix_bytes: int | None = 0
    is_rough: bool = False
    host_pages: int = 0

    @property
    def windows(self) -> tuple[int, ...]:
        """Every third layer sees all tokens."""
        return tuple(self.window * (layer % 3 != 2) for layer in range(sum(self.stages)))


def run_random(setting: Setting, num_requests: int) -> tuple[Run, list[Sequence]]:
    rng = random.Random(setting.seed)
    most_rows = max(setting.stages) * max(stop - start for start, stop in setting.head_ranges)
    run = make_run(
        make_workers(
            setting.pages_per_row * most_rows,
            stages=setting.stages,
            head_ranges=setting.head_ranges,
            windows=setting.windows,
            host_pages=setting.host_pages,
        ),
        lookahead=setting.lookahead,
        prefill_quantum=setting.quantum,
        max_prefill_tokens=setting.max_prefill_tokens,
        max_num_seqs=setting.max_num_seqs,
        max_extend_tokens=7,
        prefix_bytes=setting.prefix_bytes,
    )
    sequences: list[Sequence] = []
    while len(sequences) < num_requests:
        for _ in range(rng.randint(0, 4)):
            with suppress(ValueError):  # larger than the whole pool
                sequences.append(add(run, random_request(rng, str(len(sequences)))))
        if setting.is_rough:
            be_rough(run, rng, sequences)
        run.step()
    run.finish()
    return run, sequences


def be_rough(run: Run, rng: random.Random, sequences: list[Sequence]) -> None:
    """Now and then a client goes, the cache is emptied, or all workers are lost."""
    if sequences and rng.random() < 0.1:
        run.scheduler.finish(rng.choice(sequences), "abort")
    if rng.random() < 0.03:
        run.scheduler.reset_prefix_cache()
    if rng.random() < 0.02:
        run.in_flight.clear()
        hits, back = run.replica.blocks.num_hits, run.replica.parked.num_back
        run.replica = FakeReplica(run.replica.workers)
        run.replica.blocks.num_hits = hits
        run.replica.parked.num_back = back
        run.scheduler.restart(run.replica.workers)


def check_all(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        if sequence.finish_reason == "abort":
            continue
        if sequence.finish_reason == "error":
            assert "kv_memory_gib" in (sequence.error or "")
        else:
            check(sequence)


settings_of_runs = st.builds(
    Setting,
    seed=st.integers(0, 10_000),
    stages=st.sampled_from([(4,), (3, 2), (2, 1, 2)]),
    head_ranges=st.sampled_from([((0, 3),), ((0, 2), (2, 3)), ((0, 1), (0, 1), (1, 2))]),
    pages_per_row=st.integers(8, 60),
    lookahead=st.sampled_from([1, 2, 3]),
    quantum=st.sampled_from([None, 1, 60]),
    max_prefill_tokens=st.sampled_from([1, 64, 1000]),
    max_num_seqs=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([0, 0, 3, 16, 40]),
    prefix_bytes=st.sampled_from([0, None, None, 200_000]),
    is_rough=st.booleans(),
    host_pages=st.sampled_from([0, 20, 60, 1000]),
)


@settings(max_examples=40)
@given(setting=settings_of_runs)
def test_whatever_the_setting_every_request_gets_its_tokens(setting: Setting) -> None:
    _, sequences = run_random(setting, num_requests=25)
    check_all(sequences)


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("stages", [(4,), (2, 2), (2, 1, 1)])
def test_two_hundred_requests_through_a_small_pool(stages: tuple[int, ...], lookahead: int) -> None:
    setting = Setting(
        1, stages, ((0, 2),), 28, lookahead, 60, 64, 12, prefix_bytes=None, host_pages=100
    )
    run, sequences = run_random(setting, num_requests=200)
    check_all(sequences)
    assert all(s.finish_reason != "error" for s in sequences)
    assert run.count(Preempted) > 10
    assert run.replica.blocks.num_hits > 10
    assert run.replica.parked.num_back > 10
