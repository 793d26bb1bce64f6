"""What runs batches: beside others, by one lease each, whatever happens to it.

The store is real, its clock is turned by the tests, and what answers the lines does as they say.
The first test is a batch that nothing happens to.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.stores import ME, YOU, Stores, claimed, content_of, new_batch

from saqqara.cluster.batch_store.database import StoreBusyError
from saqqara.cluster.batch_store.outputs import finish_batch
from saqqara.cluster.batch_store.progress import LineResult
from saqqara.cluster.batch_store.records import ACTIVE, StoredBatch
from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.server.batches import run
from saqqara.cluster.server.batches.answers import LineAnswer
from saqqara.cluster.server.batches.room import Room
from saqqara.cluster.server.batches.runner import BatchRunner

LEASE_SECONDS = 30.0
DAY = 24 * 3600.0
SOON = 0.01
NEVER = 3600.0


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path)
    yield stores
    stores.close()


class Answers:
    """Answers lines, each when its gate is open.

    Attributes:
        asked: how often each prompt was.
        most: how many were under way at once, by the prompt that came last.
        statuses: what prompts get before they get 200.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.owners: set[str] = set()
        self.most: dict[str, int] = {}
        self.statuses: dict[str, list[int]] = {}
        self.held: set[str] = set()
        self.gate = asyncio.Event()
        self.num_open = 0

    async def __call__(self, owner: str, url: str, body: Mapping[str, Any]) -> LineAnswer:
        prompt = body["prompt"]
        self.asked[prompt] += 1
        self.owners.add(owner)
        self.num_open += 1
        self.most[prompt] = self.num_open
        try:
            if prompt in self.held:
                await self.gate.wait()
            await asyncio.sleep(0)
        finally:
            self.num_open -= 1
        if self.statuses.get(prompt):
            status = self.statuses[prompt].pop(0)
            if status == 0:
                raise KeyError("a fault of ours")
            return LineAnswer(status, {"error": {"message": "no"}})
        return LineAnswer(200, {"choices": [prompt], "usage": {"prompt_tokens": 2}})


@asynccontextmanager
async def running(
    store: Store, answers: Answers, capacity: int = 4, poll_seconds: float = SOON
) -> AsyncIterator[BatchRunner]:
    """A runner, stopped in the end."""
    closed = asyncio.Event()

    async def wait_closed() -> None:
        await closed.wait()

    room = Room(capacity, lambda: 1)
    runner = BatchRunner(store, answers, room, wait_closed, poll_seconds, again_seconds=SOON)
    runner.start()
    try:
        yield runner
    finally:
        await runner.stop()


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(SOON)


async def ended(store: Store, batch: StoredBatch) -> StoredBatch:
    await until(lambda: store.batches.get(batch.owner, batch.id).status not in ACTIVE)
    return store.batches.get(batch.owner, batch.id)


def records(store: Store, file_id: str | None, owner: str = ME) -> dict[str, Any]:
    """Records by custom id, each there once."""
    found = [json.loads(line) for line in content_of(store, file_id, owner).splitlines()]
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found)
    return by_id


async def test_every_line_is_answered_once(stores: Stores) -> None:
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 20)
    async with running(store, answers):
        batch = await ended(store, batch)
    assert batch.status == "completed"
    assert answers.asked == Counter({f"text {i}": 1 for i in range(1, 21)})
    assert answers.owners == {ME}
    assert max(answers.most.values()) <= 4
    found = records(store, batch.output_file_id)
    assert list(found) == [f"row-{i}" for i in range(1, 21)]
    assert found["row-7"]["response"]["body"]["choices"] == ["text 7"]
    assert batch.usage.input_tokens == 40


async def test_lines_that_a_process_was_lost_with_are_run_first_and_alone(stores: Stores) -> None:
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 6)
    dies_with(stores, store, [2, 4])
    async with running(store, answers):
        batch = await ended(store, batch)
    assert batch.status == "completed"
    assert (batch.num_completed, batch.num_failed) == (6, 0)
    assert list(answers.most)[:2] == ["text 2", "text 4"]
    assert answers.most["text 2"] == answers.most["text 4"] == 1


def dies_with(stores: Stores, store: Store, lines: list[int]) -> None:
    """A runner begins a batch, or goes on with it, and dies while these lines are under way."""
    lease = claimed(store, "dead")
    if lease.batch.status == "validating":
        store.progress.begin(lease, 6)
    store.progress.start(lease, lines)
    stores.time += LEASE_SECONDS + 1


async def test_a_line_that_ends_its_process_each_time_is_given_up(stores: Stores) -> None:
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 6)
    dies_with(stores, store, [2, 4])
    for _ in range(run.MAX_LOSSES - 1):
        dies_with(stores, store, [2])
    async with running(store, answers):
        batch = await ended(store, batch)
    assert (batch.num_completed, batch.num_failed) == (5, 1)
    assert answers.asked["text 2"] == 0
    [error] = records(store, batch.error_file_id).values()
    assert (error["custom_id"], error["response"]) == ("row-2", None)
    assert error["error"]["code"] == "request_lost"
    assert "3 times" in error["error"]["message"]


async def test_a_batch_expires_with_what_is_done(stores: Stores) -> None:
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 6)
    answers.held = {f"text {i}" for i in range(3, 7)}
    async with running(store, answers):
        await until(lambda: len(store.progress.done_lines(batch.id)) == 2)
        stores.time += DAY + 1
        batch = await ended(store, batch)
    assert batch.status == "expired"
    assert batch.expired_at == stores.time
    assert (batch.num_completed, batch.num_failed) == (2, 4)
    errors = records(store, batch.error_file_id)
    assert {e["error"]["code"] for e in errors.values()} == {"batch_expired"}
    assert answers.num_open == 0


async def test_a_batch_is_cancelled_at_once_where_it_runs(stores: Stores) -> None:
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 6)
    answers.held = {f"text {i}" for i in range(1, 7)}
    async with running(store, answers, poll_seconds=NEVER) as runner:
        await until(lambda: answers.num_open == 4)
        store.batches.cancel(ME, batch.id)
        runner.wake()
        batch = await ended(store, batch)
    assert batch.status == "cancelled"
    assert answers.num_open == 0


async def test_a_line_waits_while_the_server_has_no_room(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FIRST_RETRY_SECONDS", SOON)
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 3)
    answers.statuses = {"text 2": [429, 503, 429]}
    async with running(store, answers):
        batch = await ended(store, batch)
    assert (batch.num_completed, batch.num_failed) == (3, 0)
    assert answers.asked["text 2"] == 4


@pytest.mark.parametrize("status", [400, 404, 413, 500, 0])
async def test_any_other_answer_is_an_error_of_its_line(stores: Stores, status: int) -> None:
    """Also a fault of ours."""
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 3)
    answers.statuses = {"text 2": [status]}
    async with running(store, answers):
        batch = await ended(store, batch)
    assert (batch.status, batch.num_completed, batch.num_failed) == ("completed", 2, 1)
    assert answers.asked["text 2"] == 1
    [error] = records(store, batch.error_file_id).values()
    assert error["response"]["status_code"] == (status or 500)


async def test_a_runner_that_is_stopped_hands_its_batches_back(stores: Stores) -> None:
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 6)
    answers.held = {f"text {i}" for i in range(3, 7)}
    async with running(store, answers):
        await until(lambda: answers.num_open == 4)
    assert answers.num_open == 0
    lease = claimed(store, "two")
    assert store.progress.losses(batch.id) == {}
    store.leases.release(lease)
    answers.held = set()
    async with running(store, answers):
        batch = await ended(store, batch)
    assert batch.num_completed == 6
    assert answers.asked["text 1"] == answers.asked["text 2"] == 1


async def test_a_runner_that_was_stopped_for_too_long_changes_nothing(stores: Stores) -> None:
    """It was, say, suspended with its machine; another has run the batch meanwhile."""
    store, other = stores.open(), stores.open()
    answers = Answers()
    batch = new_batch(store, 3)
    answers.held = {"text 3"}
    async with running(store, answers, poll_seconds=NEVER):
        await until(lambda: len(store.progress.done_lines(batch.id)) == 2)
        await until(lambda: answers.num_open == 1)
        stores.time += LEASE_SECONDS + 1
        lease = claimed(other, "two")
        assert other.progress.losses(batch.id) == {3: 1}
        answers.gate.set()
        await until(lambda: answers.num_open == 0)
        theirs = LineResult(3, b'{"custom_id": "row-3", "from": "two"}\n', is_error=False)
        other.progress.commit(lease, [theirs])
        finish_batch(lease, other.progress, other.files, other.limits)
    batch = store.batches.get(ME, batch.id)
    assert (batch.status, batch.num_completed) == ("completed", 3)
    assert records(store, batch.output_file_id)["row-3"]["from"] == "two"


@pytest.mark.parametrize("point", ["before begin", "before start", "before results"])
async def test_a_batch_rests_while_the_disk_is_full(stores: Stores, point: str) -> None:
    class FullStore(Stores):
        left = 3

        def _at_commit(self, name: str) -> None:
            if name == point and self.left:
                self.left -= 1
                raise StoreBusyError("the disk is full")

    full = FullStore(stores.folder)
    store, answers = full.open(), Answers()
    batch = new_batch(store, 6)
    async with running(store, answers):
        batch = await ended(store, batch)
    full.close()
    assert (batch.status, batch.num_completed) == ("completed", 6)


async def test_a_batch_writes_no_more_than_it_may(stores: Stores) -> None:
    store, answers = stores.open(max_output_bytes=500), Answers()
    batch = new_batch(store, 40)
    async with running(store, answers):
        batch = await ended(store, batch)
    assert batch.num_completed == answers.asked.total()
    assert 0 < batch.num_completed < 12
    assert batch.num_completed + batch.num_failed == 40
    errors = records(store, batch.error_file_id)
    assert {e["error"]["code"] for e in errors.values()} == {"output_too_large"}


async def test_owners_are_served_side_by_side(stores: Stores) -> None:
    store, answers = stores.open(), Answers()
    mine, yours = new_batch(store, 2), new_batch(store, 3, owner=YOU)
    answers.held = {"text 2"}
    async with running(store, answers):
        await until(lambda: answers.num_open == 2)
        answers.gate.set()
        for batch, count in ((mine, 2), (yours, 3)):
            assert (await ended(store, batch)).num_completed == count
    assert answers.owners == {ME, YOU}


@pytest.mark.parametrize("status", ["validating", "in_progress"])
async def test_a_batch_whose_input_is_gone_fails(stores: Stores, status: str) -> None:
    store, answers = stores.open(), Answers()
    batch = new_batch(store, 6)
    if status == "in_progress":
        dies_with(stores, store, [1])
    (stores.folder / "files" / batch.input_file_id).unlink()
    async with running(store, answers):
        batch = await ended(store, batch)
    assert batch.status == "failed"
    assert [e.code for e in batch.errors] == ["file_not_found"]


async def test_a_room_lets_in_who_came_first_and_no_more_than_fit() -> None:
    room = Room(3, lambda: 1)
    came: list[str] = []

    async def stay(name: str, count: int, leave: asyncio.Event) -> None:
        await room.enter(count)
        came.append(name)
        await leave.wait()
        room.leave(count)

    leaves = [asyncio.Event() for _ in range(4)]
    sizes = [("a", 2), ("b", 1), ("alone", 3), ("c", 1)]
    tasks = []
    for (name, size), leave in zip(sizes, leaves, strict=True):
        tasks.append(asyncio.ensure_future(stay(name, size, leave)))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert came == ["a", "b"]
    leaves[0].set()
    await asyncio.sleep(SOON)
    assert came == ["a", "b"]  # `c` would fit and does not pass `alone`
    for leave in leaves[1:]:
        leave.set()
    await asyncio.gather(*tasks)
    assert came == ["a", "b", "alone", "c"]


async def test_a_room_waits_for_a_slot_that_nobody_wants() -> None:
    num_free = 0
    room = Room(3, lambda: num_free)
    entering = asyncio.ensure_future(room.enter(1))
    await asyncio.sleep(0.1)
    assert not entering.done()
    num_free = 1
    await asyncio.wait_for(entering, 60)


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": 100}, 8),
        ({"n": "x"}, 1),
        ({"n": -1}, 1),
        ({"n": True}, 1),
        ({"prompt": "abc"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [[1], [2], [3]]}, 3),
        ({"prompt": []}, 1),
        ({"prompt": {"a": 1}}, 1),
    ],
)
def test_places_of_a_request_are_its_sequences(body: Any, count: int) -> None:
    assert Room(8, lambda: 1).fitting(body) == count
