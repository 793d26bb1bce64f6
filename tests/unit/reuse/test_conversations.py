"""Conversations: the next turn computes only what is new, and whatever happens, nothing is wrong.

The replica has no model: it asserts that a turn goes on from the very tokens that were fed, that
every page has one owner, and its next token is a hash of all before it, so that an answer which
went on from anything else would be another one.
"""

from collections.abc import Sequence as Many
from dataclasses import replace

import numpy as np
import pytest
from support.fake_replica import FakeReplica, next_token
from support.talks import CUT, FULL, HALF, ME, PROMPT, RAGGED, SHAPES, Talks, check_answer

from saqqara.cluster.errors import ConversationBusyError
from saqqara.cluster.reuse.cached import Use
from saqqara.cluster.reuse.conversations import Conversations, Kept, goes_on
from saqqara.compression.retention import Retention


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "retention", [FULL, HALF, RAGGED, CUT], ids=["full", "half", "ragged", "cut"]
)
def test_each_turn_computes_only_what_is_new(retention: Retention, shape: str) -> None:
    talks = Talks(**SHAPES[shape])
    tokens, num_computed = talks.turn(PROMPT, retention=retention)
    assert num_computed == len(PROMPT)
    for turn in range(1, 5):
        fed = talks.scheduler.conversations.get((ME, "a"))
        assert fed is not None
        prompt = (*tokens, 50 + turn, 60 + turn, 70 + turn)
        tokens, num_computed = talks.turn(prompt, retention=retention)
        assert num_computed == len(prompt) - len(fed.token_ids) <= 4
    assert (talks.counts.resumed, talks.counts.anew.total()) == (4, 0)
    talks.close()


@pytest.mark.parametrize("stages", [(4,), (2, 2)])
def test_a_layer_with_a_window_goes_on_too(stages: tuple[int, ...]) -> None:
    talks = Talks(windows=(0, 8, 0, 8), stages=stages, prefill_quantum=1)
    tokens, _ = talks.turn(PROMPT, retention=HALF)
    talks.add((7, 8), None, max_tokens=40)  # beside it prefill goes layer by layer
    for _ in range(2 * len(stages)):
        talks.step()
    talks.add(PROMPT[:9], None, RAGGED)  # whose pages nobody knows until it is through
    _, num_computed = talks.turn((*tokens, 90, 91), retention=HALF)
    assert num_computed == 3 + 9
    talks.close()


def test_what_differs_earlier_goes_where_rows_are_whole() -> None:
    talks = Talks()
    tokens, _ = talks.turn(PROMPT)
    _, num_computed = talks.turn((*tokens[:10], 99, 98))  # its template rewrites the past
    assert num_computed == 2
    _, num_computed = talks.turn(tokens[:10])  # the same once more
    assert num_computed == 1
    assert talks.counts.anew == {}
    talks.turn(PROMPT, "b", HALF)
    _, num_computed = talks.turn((*PROMPT[:10], 99, 98), "b", HALF)
    assert num_computed == 12
    assert talks.counts.anew == {"tokens": 1}
    talks.close()


def test_a_turn_that_cannot_go_on_is_computed_anew_and_says_why() -> None:
    h2o = Retention.parse({"method": "h2o", "budget": 8, "sinks": 1})
    for first, second, reason in [
        (FULL, HALF, "retention"),
        (h2o, h2o, "method"),
    ]:
        talks = Talks()
        tokens, _ = talks.turn(PROMPT, retention=first)
        _, num_computed = talks.turn((*tokens, 90), retention=second)
        assert num_computed == len(tokens) + 1
        assert talks.counts.anew == {reason: 1}
        talks.close()


def test_one_turn_of_a_conversation_runs_at_a_time() -> None:
    talks = Talks()
    first = talks.add(PROMPT)
    with pytest.raises(ConversationBusyError, match=r"conversation_id: a turn of .* 'a'"):
        talks.add((*PROMPT, 1))
    talks.add(PROMPT, "b")  # another one
    talks.add(PROMPT, "a", owner="you")  # another one, too
    with pytest.raises(ConversationBusyError):
        talks.scheduler.end_conversation(ME, "a")
    talks.scheduler.finish(first, "abort")
    talks.add((*PROMPT, 1))
    talks.run()
    talks.close()


def test_a_conversation_is_its_owners() -> None:
    talks = Talks()
    tokens, _ = talks.turn(PROMPT)
    _, num_computed = talks.turn((*tokens, 90), owner="you")
    assert num_computed == len(tokens) + 1
    assert not talks.scheduler.end_conversation("they", "a")
    assert len(talks.scheduler.conversations) == 2
    talks.close()


def test_a_conversation_ends_by_word_and_by_time() -> None:
    talks = Talks(conversation_seconds=10.0)
    talks.scheduler.expire(5.0)
    tokens, _ = talks.turn(PROMPT)
    talks.turn(PROMPT, "b")
    last = talks.add((*PROMPT, 1), "c")
    while not last.is_finished:
        talks.step()
    assert talks.scheduler.end_conversation(ME, "c")  # before a plan has parked it
    assert talks.scheduler.end_conversation(ME, "b")
    assert not talks.scheduler.end_conversation(ME, "b")
    assert not talks.scheduler.is_idle  # the workers have yet to be told
    talks.run()
    assert len(talks.replica.parked) == 1
    talks.scheduler.expire(14.9)
    assert len(talks.scheduler.conversations) == 1
    talks.scheduler.expire(15.0)
    assert len(talks.scheduler.conversations) == 0
    assert (talks.counts.ended, talks.counts.expired) == (2, 1)
    _, num_computed = talks.turn((*tokens, 90))
    assert num_computed == len(tokens) + 1
    talks.close()


def test_a_turn_that_waits_finds_its_conversation_however_long_that_takes() -> None:
    talks = Talks(conversation_seconds=10.0, max_num_seqs=1)
    tokens, _ = talks.turn(PROMPT)
    talks.turn(PROMPT, "b")
    talks.scheduler.expire(9.0)
    long = talks.add(range(40, 50), None, max_tokens=20)
    waiting = talks.add((*tokens, 90))
    assert [name for (_, name), _ in talks.scheduler.conversations.oldest_first()] == ["b", "a"]
    while not long.is_finished:
        talks.scheduler.expire(18.0)
        talks.step()
    assert len(talks.scheduler.conversations) == 1
    talks.run()
    assert waiting.num_cached_tokens == len(tokens) - 1
    assert talks.counts.expired == 1
    talks.close()


def test_who_was_quiet_for_longest_goes_when_bytes_or_pages_are_short() -> None:
    per_turn = 8 * 6 * 1024  # rows of 24 tokens, in pages of 4
    talks = Talks(conversation_bytes=2 * per_turn)
    for name in "abc":
        talks.turn(PROMPT, name)
    assert [talks.scheduler.conversations.get((ME, name)) is None for name in "abc"] == [
        True,
        False,
        False,
    ]
    assert talks.counts.dropped == 1
    talks.turn((*PROMPT, 1), "a")
    assert talks.counts.anew == {"lost": 1}
    talks.close()
    talks = Talks(num_pages=200, conversation_bytes=2**20)
    for name in "abc":
        talks.turn(PROMPT, name)
    talks.turn(range(1, 60), None)
    assert talks.counts.dropped == 2
    assert talks.scheduler.conversations.get((ME, "c")) is not None
    talks.close()


def test_blocks_that_only_a_quiet_conversation_shares_make_room() -> None:
    talks = Talks(num_pages=120, prefix_bytes=2**20, conversation_bytes=2**20)
    for name in (None, None, "a", "b"):
        talks.turn(PROMPT, name)  # stored by the second, shared by those after it
    blocks, kept = talks.scheduler.prefixes, talks.scheduler.conversations
    assert (blocks.num_blocks, len(kept)) == (4, 2)
    own = 2 * 8 * 2  # pages of the last tokens' rows
    assert talks.scheduler.ledger.free == 120 - 4 * 8 - own
    assert not blocks.idle_pages.any()
    assert talks.scheduler.idle_pages == 4 * 8 + own, "no sequence needs any page"
    talks.turn(range(60, 113), None)  # needs nearly all
    assert (blocks.num_blocks, len(kept)) == (0, 0)
    talks.close()


def test_a_turn_that_must_wait_leaves_its_conversation_where_it_was() -> None:
    conversations = Conversations(1000, 10.0)
    for now, name in enumerate("abc"):
        conversations.expire(float(now))
        it = replace(kept((1,), is_whole=True), last_used=float(now))
        conversations.keep((ME, name), it)
    for name in "acb":
        conversations.put_back((ME, name), conversations.take((ME, name)))
    assert conversations.num_bytes == 30
    assert [len(conversations.expire(now)) for now in (9.0, 10.0, 11.0, 12.0)] == [0, 1, 1, 1]


def test_a_turn_that_does_not_end_well_leaves_nothing() -> None:
    talks = Talks()
    tokens, _ = talks.turn(PROMPT)
    sequence = talks.add((*tokens, 90), max_tokens=50)
    for _ in range(5):
        talks.step()
    talks.scheduler.finish(sequence, "abort")
    _, num_computed = talks.turn((*tokens, 90))
    assert num_computed == len(tokens) + 1
    assert talks.counts.anew == {"lost": 1}
    waiting = talks.add((*tokens, 90))  # one that never ran costs nothing
    talks.scheduler.finish(waiting, "abort")
    assert talks.turn((*tokens, 90))[1] < 5
    talks.close()


@pytest.mark.parametrize("goes_on_at_once", [False, True])
def test_what_a_worker_refuses_behind_the_end_of_a_turn_is_not_kept(goes_on_at_once: bool) -> None:
    """A step that was in flight when the turn ended is at fault: that worker holds nothing."""
    talks = Talks(lookahead=2, head_ranges=((0, 1), (1, 2)))
    end = next_token(PROMPT)
    talks.replica = FakeReplica(talks.workers, faults={(1, 0): "broken"})
    first = talks.add(PROMPT, stop_token_ids=[end])
    while not first.is_finished:
        talks.step()
    assert (first.finish_reason, first.num_in_flight) == ("stop", 1)
    if not goes_on_at_once:
        talks.run()
        assert len(talks.scheduler.conversations) == 0
    second = talks.add((*PROMPT, end, 9))
    talks.run()
    assert second.finish_reason == "length"
    check_answer(second)
    assert second.num_refusals == 0  # else ranks would go on from different lengths
    talks.close()


def test_lost_workers_lose_conversations_and_no_answer() -> None:
    talks = Talks()
    tokens, _ = talks.turn(PROMPT)
    talks.turn(PROMPT, "b")
    sequence = talks.add((*tokens, 90))
    talks.step()
    talks.step()
    talks.lose_workers()
    talks.run()
    check_answer(sequence)
    _, num_computed = talks.turn((*PROMPT, 1), "b")
    assert num_computed == len(PROMPT) + 1
    assert talks.counts.anew == {"lost": 1}
    talks.close()


def kept(tokens: Many[int], *, is_whole: bool, retention: Retention = FULL) -> Kept:
    rows, pages = np.zeros((1, 1), dtype=np.int32), np.zeros(1, dtype=np.int64)
    fed = np.array(tokens, dtype=np.int32)
    return Kept(1, fed, retention, rows, is_whole, pages, 10 + pages, 10, Use(()), 0.0)


@pytest.mark.parametrize(
    ("prompt", "whole", "other"),
    [
        ((1, 2, 3, 4, 5), 4, 4),
        ((1, 2, 3, 4), 3, "tokens"),  # one token is computed in any case
        ((1, 2, 9, 4, 5), 2, "tokens"),
        ((1, 2), 1, "tokens"),
        ((9, 2, 3, 4, 5), "tokens", "tokens"),
        ((1,), "tokens", "tokens"),
    ],
)
def test_how_far_a_prompt_goes_on(prompt: Many[int], whole: object, other: object) -> None:
    ids = np.array(prompt, dtype=np.int32)
    assert goes_on(kept((1, 2, 3, 4), is_whole=True), ids, FULL) == whole
    assert goes_on(kept((1, 2, 3, 4), is_whole=False), ids, FULL) == other
    assert goes_on(kept((1, 2, 3, 4), is_whole=True), ids, HALF) == "retention"


def test_a_conversation_larger_than_all_may_be_is_not_kept() -> None:
    conversations = Conversations(max_bytes=9, max_seconds=1.0)
    [gone] = conversations.keep((ME, "a"), kept((1,), is_whole=True))
    assert gone.num_bytes == 10
    assert (len(conversations), conversations.num_bytes) == (0, 0)
