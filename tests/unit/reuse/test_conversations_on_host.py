"""Conversations whose pages are needed go to the host's memory, and come back from there.

What of it is free is counted by the scheduler; the replica keeps books of its own.
"""

import random
from typing import Any

import pytest
from support.talks import CUT, FULL, HALF, ME, PROMPT, RAGGED, SHAPES, Talks, check_answer

from saqqara.cluster.scheduling.sequence import Sequence

PAGES = 48  # of a turn with `PROMPT`: 8 rows of 24 tokens, in pages of 4
LARGE = range(1, 60)  # it needs 136 pages at least


def keeps(talks: Talks) -> str:
    """Names of conversations of which something is kept; of those on the host in capitals."""
    host, names = talks.scheduler.host_memory, ""
    for (_, name), kept in talks.scheduler.conversations.oldest_first():
        names += name.upper() if kept.parked_id in host else name
    return names


def test_who_was_quiet_for_longest_goes_to_the_host_and_comes_back() -> None:
    talks = Talks(num_pages=200, host_pages=3 * PAGES, conversation_bytes=2**20)
    texts = {name: talks.turn(PROMPT, name)[0] for name in "abc"}
    assert talks.scheduler.ledger.free == 200 - 3 * PAGES
    talks.turn(LARGE, None)
    assert keeps(talks) == "ABc"
    host = talks.scheduler.host_memory
    assert (host.num_quiet, host.quiet_bytes) == (2, 2 * PAGES * 1024)
    assert host.counts.copied_bytes == host.quiet_bytes
    for name in "ab":
        _, num_computed = talks.turn((*texts[name], 90, 91), name)
        assert num_computed == 3
    assert keeps(talks) == "cab"
    assert (talks.counts.offloaded, talks.counts.brought_back, talks.counts.dropped) == (2, 2, 0)
    assert (host.num_quiet, host.counts.copied_bytes) == (0, 4 * PAGES * 1024)
    talks.close()


def test_those_who_lie_there_go_for_newer_ones_of_the_same_size_or_larger() -> None:
    talks = Talks(num_pages=190, host_pages=PAGES + 8, conversation_bytes=2**20)
    talks.turn(PROMPT, "a")
    talks.turn(LARGE, None)
    talks.turn(LARGE, None)
    assert keeps(talks) == "a"  # there was room for all
    for name in "bcd":
        talks.turn(PROMPT, name)
    assert keeps(talks) == "Abcd"
    talks.turn(LARGE, None)
    assert keeps(talks) == "Cd"
    assert (talks.counts.offloaded, talks.counts.dropped) == (3, 2)
    talks.turn(range(1, 50), "e")  # larger than the host's memory
    assert keeps(talks) == "Cde"
    talks.turn(LARGE, None)
    assert keeps(talks) == "D"
    talks.close()


def test_what_is_cheaper_computed_again_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    talks = Talks(num_pages=200, host_pages=1000, conversation_bytes=2**20)
    for name in "abc":
        talks.turn(PROMPT, name)
    talks.scheduler.host_memory.prices.note(1000, 1000.0, 1, 1e-9)
    talks.turn(LARGE, None)
    assert keeps(talks) == "c"
    assert (talks.counts.offloaded, talks.counts.dropped) == (0, 2)
    talks.close()


def test_a_preempted_sequence_goes_before_conversations_on_the_host() -> None:
    talks = Talks(num_pages=200, host_pages=3 * PAGES, conversation_bytes=2**20)
    for name in "abc":
        talks.turn(PROMPT, name)
    talks.turn(range(60), None)
    assert keeps(talks) == "ABc"
    first, second = (talks.add(PROMPT, None, max_tokens=60) for _ in range(2))
    events: list[Any] = []
    while not (first.is_finished and second.is_finished):
        talks.step()
        events += [second.num_preemptions]
        if second.parked_id is not None:
            assert keeps(talks) in ("", "C")
    assert second.num_preemptions == 1
    assert talks.scheduler.host_memory.counts.resumed == 1
    check_answer(first)
    check_answer(second)
    talks.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_who_comes_back_alone_is_computed_again_where_a_host_had_no_memory(rank: int) -> None:
    talks = Talks(num_pages=100, host_pages=1000, head_ranges=((0, 1), (1, 2)))
    first, second = (talks.add(PROMPT, None, max_tokens=60) for _ in range(2))
    while second.parked_id is None:
        talks.step()
    talks.replica.parked.lose(rank)
    talks.run()
    assert (second.finish_reason, second.num_refusals) == ("length", 1)
    check_answer(first)
    check_answer(second)
    talks.close()


def test_shared_blocks_stay_until_nothing_else_is_left() -> None:
    talks = Talks(num_pages=120, host_pages=1000, prefix_bytes=2**20, conversation_bytes=2**20)
    for name in (None, None, "a", "b"):
        talks.turn(PROMPT, name)  # stored by the second, shared by those after it
    blocks = talks.scheduler.prefixes
    own = 2 * 8 * 2  # pages of the last tokens' rows
    assert talks.scheduler.ledger.free == 120 - 4 * 8 - own
    talks.turn(range(60, 84), None)  # 64 pages: more than are free
    assert (keeps(talks), blocks.num_blocks) == ("Ab", 4)
    _, num_computed = talks.turn((*PROMPT, 1), "a")
    assert num_computed == 1
    assert talks.counts.brought_back == 1
    talks.turn(range(60, 113), None)  # needs nearly all
    assert (keeps(talks), blocks.num_blocks) == ("", 0)
    talks.close()


def test_a_past_that_was_rewritten_comes_back_whole_before_it_is_cut() -> None:
    talks = Talks(num_pages=200, host_pages=1000, conversation_bytes=2**20)
    talks.turn(range(1, 80), "a")
    talks.turn(range(80, 150), None)
    assert keeps(talks) == "A"
    busy = talks.add(range(150, 170), None, max_tokens=2)
    _, num_computed = talks.turn((1, 2, 3, 99), "a")
    assert busy.is_finished
    assert num_computed == 20 + 1
    assert talks.replica.parked.num_from_host == 1
    assert talks.counts.anew == {}
    talks.close()


def test_all_that_is_kept_there_goes_by_word_by_time_and_with_its_workers() -> None:
    talks = Talks(
        num_pages=200, host_pages=1000, conversation_bytes=2**20, conversation_seconds=10.0
    )
    for now, name in enumerate("abcd"):
        talks.scheduler.expire(float(now))
        talks.turn(PROMPT, name)
    talks.turn(range(1, 100), None, max_tokens=50)
    assert keeps(talks) == "ABCD"
    assert talks.scheduler.end_conversation(ME, "b")
    talks.scheduler.expire(10.0)
    assert keeps(talks) == "CD"
    talks.run()
    assert talks.scheduler.host_memory.num_quiet == len(talks.replica.parked) == 2
    waiting = talks.add((*PROMPT, 1), "c")
    talks.scheduler.finish(waiting, "abort")  # one that never ran costs nothing
    assert keeps(talks) == "DC"
    talks.lose_workers()
    assert keeps(talks) == ""
    assert talks.turn((*PROMPT, 1), "d")[1] == len(PROMPT) + 1
    talks.close()


@pytest.mark.parametrize("seed", range(9))
def test_any_traffic_leaves_no_page_no_host_byte_and_no_wrong_answer(seed: int) -> None:
    rng = random.Random(seed)
    shape = list(SHAPES.values())[seed % 3]
    talks = Talks(
        num_pages=rng.choice([120, 160, 200]) // (2 if seed % 3 else 1),
        host_pages=rng.choice([40, 150, 400]) if seed > 2 else 0,
        prefix_bytes=rng.choice([0, 2**18]),
        conversation_bytes=2**20,
        windows=(0, 8, 0, 8) if seed % 2 else (),
        **shape,
    )
    texts: dict[str, tuple[int, ...]] = {}
    running: dict[str, Sequence] = {}
    asked = 0
    while asked < 60 or running:
        for name, sequence in list(running.items()):
            if sequence.is_finished:
                del running[name]
                check_answer(sequence)
                texts[name] = (*sequence.request.prompt_token_ids, *sequence.output_token_ids)
        name = rng.choice("abcdefg")
        if asked < 60 and name not in running and rng.random() < 0.5:
            asked += 1
            text = texts.get(name, tuple(rng.choices(range(9), k=rng.randrange(1, 20))))
            if len(text) > 40 or rng.random() < 0.2:
                text = text[: rng.randrange(1, 20)]
            prompt = (*text, *rng.choices(range(9), k=rng.randrange(1, 6)))
            retention = {"a": HALF, "b": HALF, "c": RAGGED, "d": CUT}.get(name, FULL)
            conversation = None if name == "g" else name
            num = rng.randrange(1, 30 if name == "g" else 12)
            running[name] = talks.add(prompt, conversation, retention, max_tokens=num)
        elif running and rng.random() < 0.05:
            talks.scheduler.finish(rng.choice(list(running.values())), "abort")
        elif name not in running and rng.random() < 0.05:
            talks.scheduler.end_conversation(ME, name)
        elif rng.random() < 0.01:
            talks.lose_workers()
        talks.scheduler.expire(float(asked))
        talks.step()
    assert talks.counts.resumed > (5 if seed > 2 else 0)
    assert (talks.counts.brought_back > 0) == (seed > 2)
    talks.run()
    talks.close()
