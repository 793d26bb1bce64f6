"""Leases: one runner a batch, and one that has lost it writes nothing more.

The first test is a batch that changes hands.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.stores import ME, YOU, Stores, claimed, new_batch

from saqqara.cluster.batch_store.leases import Lease, LeaseLostError
from saqqara.cluster.batch_store.outputs import finish_batch
from saqqara.cluster.batch_store.progress import LineResult
from saqqara.cluster.batch_store.records import Page, StoreLimitError
from saqqara.cluster.batch_store.store import Store

LEASE_SECONDS = 30.0


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path)
    yield stores
    stores.close()


def fail(store: Store, lease: Lease) -> Any:
    store.progress.fail(lease, [])


def begin(store: Store, lease: Lease) -> Any:
    store.progress.begin(lease, 3)


def start(store: Store, lease: Lease) -> Any:
    store.progress.start(lease, [1])


def commit(store: Store, lease: Lease) -> Any:
    store.progress.commit(lease, [LineResult(1, b"{}\n", is_error=False)])


def finish(store: Store, lease: Lease) -> Any:
    finish_batch(lease, store.progress, store.files, store.limits)


def renew(store: Store, lease: Lease) -> Any:
    store.leases.renew(lease)


def look(store: Store, lease: Lease) -> Any:
    store.leases.look(lease)


WRITES: list[Callable[[Store, Lease], Any]] = [fail, begin, start, commit, finish, renew, look]


def test_another_runner_takes_over_when_the_first_falls_silent(stores: Stores) -> None:
    one, two = stores.open(), stores.open()
    batch = new_batch(one)
    lease = claimed(one, "one")
    assert lease.batch.id == batch.id
    assert two.leases.claim("two", 4) is None
    stores.time += LEASE_SECONDS - 1
    one.leases.renew(lease)
    stores.time += LEASE_SECONDS - 1
    assert two.leases.claim("two", 4) is None
    stores.time += 2
    taken = claimed(two, "two")
    assert (taken.batch.id, taken.epoch) == (batch.id, lease.epoch + 1)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("again", ["two", "one"])
def test_who_has_lost_a_batch_writes_nothing(
    stores: Stores, write: Callable[[Store, Lease], Any], again: str
) -> None:
    """Nor does one that has the batch again, by the lease that it had before."""
    one, two = stores.open(), stores.open()
    batch = new_batch(one)
    lease = claimed(one, "one")
    stores.time += LEASE_SECONDS + 1
    claimed(two, again)
    with pytest.raises(LeaseLostError, match=batch.id):
        write(one, lease)
    assert two.batches.get(ME, batch.id) == batch
    assert two.progress.done_lines(batch.id) == set()
    assert one.files.list(ME, Page(100))[0] == [one.files.get(ME, batch.input_file_id)]


@pytest.mark.parametrize("write", WRITES)
def test_who_has_handed_a_batch_back_writes_nothing(
    stores: Stores, write: Callable[[Store, Lease], Any]
) -> None:
    one = stores.open()
    batch = new_batch(one)
    lease = claimed(one, "one")
    one.leases.release(lease)
    with pytest.raises(LeaseLostError):
        write(one, lease)
    assert one.batches.get(ME, batch.id) == batch
    one.leases.release(lease)  # once more does nothing


def test_a_lease_that_has_run_out_holds_until_somebody_takes_the_batch(stores: Stores) -> None:
    one = stores.open()
    new_batch(one)
    lease = claimed(one, "one")
    stores.time += 10 * LEASE_SECONDS
    one.leases.renew(lease)
    assert stores.open().leases.claim("two", 4) is None


def test_a_batch_that_is_handed_back_is_taken_at_once_and_nothing_is_lost(stores: Stores) -> None:
    one = stores.open()
    batch = new_batch(one)
    lease = claimed(one, "one")
    one.progress.begin(lease, 3)
    one.progress.start(lease, [1, 2])
    one.leases.release(lease)
    claimed(one, "two")
    assert one.progress.losses(batch.id) == {}


def test_lines_under_way_when_a_runner_dies_count_as_lost(stores: Stores) -> None:
    one = stores.open()
    batch = new_batch(one)
    for number, losses in enumerate([{}, {1: 1, 2: 1}, {1: 1, 2: 2}, {2: 2}]):
        lease = claimed(one, f"runner-{number}")
        assert one.progress.losses(batch.id) == losses
        if number == 0:
            one.progress.begin(lease, 3)
            one.progress.start(lease, [1, 2, 3])
            one.progress.commit(lease, [LineResult(3, b"{}\n", is_error=False)])
        elif number == 1:
            one.progress.start(lease, [2])
        elif number == 2:
            one.progress.start(lease, [1])
            one.progress.commit(lease, [LineResult(1, b"{}\n", is_error=False)])
        stores.time += LEASE_SECONDS + 1


def test_owners_take_turns(stores: Stores) -> None:
    one = stores.open()
    mine = [new_batch(one).id for _ in range(3)]
    yours = new_batch(one, owner=YOU).id
    assert [claimed(one).batch.id for _ in range(4)] == [mine[0], yours, mine[1], mine[2]]


def test_a_runner_has_so_many_batches_of_one_owner(stores: Stores) -> None:
    one = stores.open()
    for _ in range(3):
        new_batch(one)
    assert one.leases.claim("one", 1) is not None
    assert one.leases.claim("one", 1) is None
    assert one.leases.claim("two", 1) is not None


def test_ended_batches_are_not_claimed(stores: Stores) -> None:
    one = stores.open()
    new_batch(one)
    fail(one, claimed(one))
    new_batch(one)
    one.progress.begin(lease := claimed(one), 3)
    finish(one, lease)
    stores.time += 10 * LEASE_SECONDS
    assert one.leases.claim("two", 4) is None


def test_the_oldest_batches_that_are_done_are_forgotten(stores: Stores) -> None:
    one = stores.open(max_batches=3)
    runs = new_batch(one)
    lease = claimed(one)
    done = []
    for _ in range(3):
        done.append(new_batch(one).id)
        fail(one, claimed(one, "two"))
    yours = new_batch(one, owner=YOU)
    last = new_batch(one)
    listed, has_more = one.batches.list(ME, Page(10, ascending=True))
    assert [batch.id for batch in listed] == [runs.id, done[1], done[2], last.id]
    assert not has_more
    assert one.leases.look(lease).id == runs.id
    assert one.batches.get(YOU, yours.id) == yours


def test_an_owner_has_so_many_batches_that_are_not_done(stores: Stores) -> None:
    one = stores.open(max_active=2)
    for _ in range(2):
        new_batch(one)
    with pytest.raises(StoreLimitError, match="2 batches are not done"):
        new_batch(one)
    new_batch(one, owner=YOU)
    fail(one, claimed(one))
    new_batch(one)
