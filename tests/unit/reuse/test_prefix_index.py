"""Prefixes: who shares which blocks, what is stored, and what goes first.

The replica has no model; it asserts that a block is used only by prompts that begin with its
tokens, when it is filled and before it is given up. Random traffic is in `test_scheduler.py`.
"""

import logging
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import pytest
from support.fake_replica import FakeReplica, make_workers, next_token

from saqqara.cluster.reuse import prefixes
from saqqara.cluster.reuse.cached import CachedPrefixes
from saqqara.cluster.reuse.limits import (
    Cuts,
    keeps_whole_prompt,
    least_computed_tokens,
    why_not_reused,
)
from saqqara.cluster.reuse.prefixes import Prefixes, block_keys
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Sequence, TokenRequest
from saqqara.compression.retention import Retention
from saqqara.workers.plan import SamplingSpec, StepPlan

FULL = Retention.parse("full")
SNAPKV = Retention.parse({"method": "snapkv", "window": 3, "sinks": 1, "budget": 12})
H2O = Retention.parse({"method": "h2o", "budget": 12})
ONCE = {"kind": "once", "layer": 1, "keep": 0.5, "window": 5, "sinks": 1}  # of four layers
PREFIX = tuple(range(1, 25))  # six blocks of four tokens


class Replica:
    """A scheduler over a replica without a model; pages have four tokens, a block eight pages."""

    def __init__(
        self, num_pages: int = 1000, most_shared_entries: int | None = None, **settings: Any
    ) -> None:
        workers = [
            replace(worker, most_shared_entries=most_shared_entries)
            for worker in make_workers(num_pages)
        ]
        given: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 256, "prefix_bytes": None}
        self.scheduler = Scheduler(workers, **given | settings)
        self.fake = FakeReplica(workers)
        self._num_requests = 0

    def add(
        self, own: Many[int], retention: Retention = FULL, *, num_tokens: int = 2, **of_request: Any
    ) -> Sequence:
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        request = TokenRequest(
            str(self._num_requests), (*PREFIX, *own), sampling, retention, **of_request
        )
        return self.scheduler.add(request, SamplingSpec())

    def finish(self) -> None:
        flights: deque[Any] = deque()
        while True:
            while (plan := self.scheduler.schedule()) is not None:
                flights.append((plan, self.fake.run(plan)))
            if not flights:
                return
            self.scheduler.absorb(*flights.popleft())

    def serve(self, own: Many[int], retention: Retention = FULL, **of_request: Any) -> Sequence:
        """One request, from its coming to its end."""
        sequence = self.add(own, retention, **of_request)
        self.finish()
        tokens = list(sequence.request.prompt_token_ids)
        for token in sequence.output_token_ids:
            assert token == next_token(tokens)
            tokens.append(token)
        assert sequence.error is None
        return sequence


def cached(*sequences: Sequence) -> list[int | None]:
    return [sequence.num_cached_tokens for sequence in sequences]


def test_what_came_twice_is_stored_and_the_third_computes_only_the_rest() -> None:
    replica = Replica()
    first, second, third = (replica.serve([90 + i, 1, 2]) for i in range(3))
    assert cached(first, second, third) == [0, 0, 24]
    assert (first.num_stored_tokens, second.num_stored_tokens) == (0, 24)
    assert replica.fake.prefilled_tokens == 27 + 27 + 3
    assert replica.scheduler.prefixes.num_blocks == len(replica.fake.blocks) == 6
    user = replica.add([80])
    replica.scheduler.absorb(plan := _scheduled(replica.scheduler), replica.fake.run(plan))
    assert not replica.scheduler.reset_prefix_cache(), "they are in use"
    replica.finish()
    assert cached(user) == [24]
    assert replica.scheduler.reset_prefix_cache()
    assert not replica.scheduler.is_idle, "the workers have yet to be told"
    replica.finish()
    assert len(replica.fake.blocks) == 0
    assert replica.fake.fakes[0].pages_free == 1000


def test_prompts_that_come_together_wait_for_the_one_that_stores() -> None:
    replica = Replica()
    sequences = [replica.add([90 + i]) for i in range(4)]
    other = replica.add([7], H2O)  # which nothing keeps waiting
    replica.finish()
    assert cached(*sequences) == [0, 24, 24, 24]
    assert cached(other) == [0]
    assert replica.fake.prefilled_tokens == 25 + 3 + 25
    groups = [len(plan.new) for plan in replica.fake.plans if plan.new]
    assert sorted(groups) == [1, 1, 3], "those that waited go together"


@pytest.mark.parametrize(
    "of_requests",
    [
        [{"owner": "a"}, {"owner": "b"}],
        [{"cache_salt": "a"}, {"cache_salt": "b"}],
        [{"owner": "a", "cache_salt": "b"}, {"owner": "ab"}],
        [{"owner": "a", "cache_salt": "\ud800"}, {"owner": "a", "cache_salt": ""}],
    ],
)
def test_owners_and_salts_share_nothing(of_requests: list[dict[str, Any]]) -> None:
    replica = Replica()
    for own in range(3):
        one = replica.serve([own], **of_requests[0])
    assert cached(one) == [24]
    before = replica.fake.blocks.num_hits
    others = [replica.serve([own], **of_requests[1]) for own in range(2)]
    assert cached(*others) == [0, 0]
    assert replica.fake.blocks.num_hits == before
    # Not even a prefill is shared, by which one could tell that another asks the same right now.
    before = replica.fake.prefilled_tokens
    for of_request in of_requests:
        replica.add([50], H2O, **of_request)
    replica.finish()
    assert replica.fake.prefilled_tokens == before + 2 * 25


def test_choices_of_a_request_count_once_and_have_one_hit() -> None:
    replica = Replica()
    sampling = SamplingParams(n=3, max_tokens=2, ignore_eos=True)
    for number in range(3):
        request = TokenRequest(f"n{number}", (*PREFIX, number), sampling, SNAPKV)
        choices = [replica.scheduler.add(request, SamplingSpec(), index=i) for i in range(3)]
        replica.finish()
        assert len({*map(id, {choice.block_keys for choice in choices})}) == 1
        assert cached(*choices) == [[0] * 3, [0] * 3, [20] * 3][number], "a window is computed"


def test_the_least_recently_used_goes_first_and_of_a_chain_its_end() -> None:
    replica = Replica(num_pages=8 * 40, prefix_bytes=8 * 8 * 1024)  # eight blocks
    for suffix in ([70], [71], [70, 70, 70, 70, 70], [70, 70, 70, 70, 71]):
        replica.serve(suffix)
    assert replica.scheduler.prefixes.num_blocks == 7  # one more behind the six
    for own in (1, 2):  # of another owner: six blocks, so five of the old go
        replica.serve([own], owner="b")
    assert replica.scheduler.prefixes.num_blocks == 8
    assert cached(replica.serve([9], owner="b"), replica.serve([70])) == [24, 8]


def test_blocks_make_room_before_anybody_waits_or_is_preempted() -> None:
    replica = Replica(num_pages=8 * 16)
    for own in range(3):
        replica.serve([own])
    assert replica.scheduler.prefixes.num_blocks == 6
    long = replica.add(range(100, 112), owner="another", num_tokens=20)
    replica.finish()
    assert (long.num_preemptions, long.error) == (0, None)
    assert replica.scheduler.prefixes.counts.evicted > 0


def test_rows_that_keep_all_hold_the_pages_of_blocks() -> None:
    replica = Replica(num_pages=8 * 22)
    for own in range(2):
        replica.serve([own])
    sequences = [replica.add([own]) for own in range(4)]  # seven pages a row, six of them shared
    replica.finish()
    assert cached(*sequences) == [24] * 4
    together = next(plan for plan in replica.fake.plans if len(plan.new) == 4)
    assert all(new.prefix is not None and new.prefix.is_shared for new in together.new)


def test_rows_get_copies_where_page_tables_are_full_of_shared_pages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever leaves, also half-way, makes place for another that shares."""
    caplog.set_level(logging.INFO)
    replica = Replica(most_shared_entries=2 * 6 * 8 + 7)
    for own in range(2):
        replica.serve([own])
    gone = replica.add([9])
    assert replica.scheduler.schedule() is not None
    replica.scheduler.restart(replica.fake.workers)
    replica.fake = FakeReplica(replica.fake.workers)
    replica.finish()
    for own in range(2):
        replica.serve([own])
    for _ in range(2):
        sequences = [replica.add([own]) for own in range(4)]
        replica.finish()
        assert cached(*sequences) == [24] * 4
        together = next(p for p in reversed(replica.fake.plans) if len(p.new) == 4)
        shares = [new.prefix.is_shared for new in together.new if new.prefix is not None]
        assert shares == [True, True, False, False]
    assert gone.error is None
    told = [r for r in caplog.records if "page tables are full" in r.getMessage()]
    assert len(told) == 1


def test_what_a_method_looks_at_is_computed() -> None:
    assert least_computed_tokens(FULL, 100, 200) == 1
    assert least_computed_tokens(SNAPKV, 100, 200) == 3
    assert least_computed_tokens(SNAPKV, 10, 200) == 1, "nothing is dropped"
    decoding = Retention.parse(SNAPKV.to_dict() | {"decode": {"slack_pages": 1}})
    assert least_computed_tokens(decoding, 10, 200) == 3, "these queries are remembered"
    assert keeps_whole_prompt(FULL, 100)
    assert keeps_whole_prompt(SNAPKV, 12)
    assert not keeps_whole_prompt(SNAPKV, 13)
    assert not keeps_whole_prompt(decoding, 10), "it is cut later"
    assert least_computed_tokens(Retention.parse({"propagate": ONCE}), 100, 200) == 5
    assert why_not_reused(H2O) is not None


def test_prompts_that_drop_tokens_share_what_lies_below_their_first_cut() -> None:
    """With each other only: their blocks have other contents."""
    replica = Replica(max_num_seqs=2, max_prefill_tokens=30)
    once = Retention.parse({"propagate": ONCE})
    later = Retention.parse({"propagate": {**ONCE, "layer": 2}})
    scored = Retention.parse({**SNAPKV.to_dict(), "propagate": ONCE})
    for retention in (once, scored, FULL, FULL):
        replica.serve([1, 2, 3], retention)
    assert cached(*(replica.serve([9, 2, 3], r) for r in (once, scored, later))) == [20, 20, 0]
    assert cached(replica.serve([4, 2, 3])) == [24]
    computed = replica.fake.prefilled_tokens
    together = [replica.add([own, 2, 3], once) for own in range(2)]
    replica.finish()
    assert cached(*together) == [20, 20]
    assert replica.fake.prefilled_tokens == computed + 2 * 7
    # Above the cut 13 tokens of each are computed: they fit together, and nothing else does.
    assert [len(plan.new) for plan in replica.fake.plans][-4:].count(2) == 1
    half = Replica(max_num_seqs=2, max_prefill_tokens=25)
    for own in range(2):
        half.serve([own, 2, 3], once)
    together = [half.add([own, 2, 3], once) for own in range(2)]
    half.finish()
    assert cached(*together) == [20, 20]
    assert max(len(plan.new) for plan in half.fake.plans) == 1


def test_cuts_for_which_blocks_are_no_use_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    early = Retention.parse({"propagate": {**ONCE, "layer": 1}})
    workers = make_workers(100, stages=(5, 4))
    assert Cuts(workers).first(early, 100) == 1
    assert Cuts(workers).first(early, 6) is None, "too short to drop any"
    assert Cuts(workers).why_not_reused(early, 6) is None
    assert "2 of 9 layers" in str(Cuts(workers).why_not_reused(early, 100))
    middle = Retention.parse({"propagate": {**ONCE, "layer": 4}})
    page, most = workers[0].page_bytes, 8 * workers[0].page_bytes // 4  # of 4 x 2 rows
    assert page > 0
    for hidden_bytes, fits in ((most, True), (most + 1, False)):
        wide = [replace(worker, hidden_bytes=hidden_bytes) for worker in workers]
        why_not = Cuts(wide).why_not_reused(middle, 100)
        assert fits is (why_not is None), "stage 1 has them, whose first layer is behind the cut"
    replica = Replica()
    replica.serve([1], Retention.parse({"propagate": {**ONCE, "layer": 0}}))
    assert replica.scheduler.prefixes.num_blocks == 0


def test_who_takes_no_part_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    replica = Replica()
    for own in range(3):
        assert cached(replica.serve([own], H2O)) == [0]
    assert [r.getMessage() for r in caplog.records if "takes no part" in r.getMessage()] == [
        "prefix caching: h2o takes no part: it looks at the attention of all queries of a prompt"
    ]
    assert replica.scheduler.prefixes.num_blocks == 0


def test_a_restart_forgets_blocks_but_not_what_was_seen() -> None:
    replica = Replica()
    for own in range(3):
        replica.serve([own])
    replica.fake = FakeReplica(replica.fake.workers)
    replica.scheduler.restart(replica.fake.workers)
    assert cached(replica.serve([3]), replica.serve([4])) == [0, 24]


def test_what_a_prefill_filled_that_is_given_up_half_way_is_gone() -> None:
    replica = Replica(prefill_quantum=1)
    scheduler, fake = replica.scheduler, replica.fake
    replica.serve([1])
    replica.add([2], owner="another", num_tokens=40)  # beside which prefill goes layer by layer
    for _ in range(3):
        scheduler.absorb(plan := _scheduled(scheduler), fake.run(plan))
    storing = replica.add([3])
    scheduler.absorb(plan := _scheduled(scheduler), fake.run(plan))
    assert storing.num_stored_tokens == 24
    assert 0 < plan.prefill[0].stop_layer < fake.num_layers
    scheduler.finish(storing, "abort")
    replica.finish()
    assert scheduler.prefixes.num_blocks == len(fake.blocks) == 0
    assert cached(replica.serve([4]), replica.serve([5])) == [0, 24]


def test_what_a_prefill_at_fault_filled_is_used_by_nobody() -> None:
    replica = Replica()
    replica.serve([1])
    replica.fake = FakeReplica(replica.fake.workers, faults={(0, 0): "its numbers are broken"})
    replica.scheduler.restart(replica.fake.workers)
    storing, waiting = replica.add([2]), replica.add([3])
    replica.finish()
    assert storing.error == "its numbers are broken"
    assert (storing.num_stored_tokens, waiting.num_stored_tokens) == (24, 24)
    assert cached(storing, waiting, replica.serve([4])) == [0, 0, 24]


def _scheduled(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def test_what_is_remembered_of_other_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MAX_SEEN", 8)
    index = Prefixes()
    old, new = block_keys(range(16), 4), block_keys(range(100, 132), 4)
    index.see(old)
    index.see(new)
    index.see(old)  # of which nothing was known any more
    assert index.find(old, 9).storable == ()
    index.see(old)
    assert index.find(old, 9).storable == old


def test_off_is_off() -> None:
    replica = Replica(prefix_bytes=0)
    sequences = [replica.serve([own]) for own in range(3)]
    assert cached(*sequences) == [0, 0, 0]
    assert isinstance(replica.scheduler.prefixes, CachedPrefixes)
    assert all(new.prefix is None for plan in replica.fake.plans for new in plan.new)
