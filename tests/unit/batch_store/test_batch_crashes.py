"""A runner that dies at any commit loses no line and doubles none.

A runner in few lines takes each line through start and commit, and dies where the test says; the
next one goes on. What the files say at the end is the same as without a crash.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stores import ME, CrashError, Stores, claimed, content_of, new_batch

from saqqara.cluster.batch_store.inputs import check_input, read_input
from saqqara.cluster.batch_store.outputs import finish_batch, record
from saqqara.cluster.batch_store.progress import LineResult
from saqqara.cluster.batch_store.records import NotPossibleError, Usage
from saqqara.cluster.batch_store.store import Store

NUM_LINES = 4
LEASE_SECONDS = 30.0
BAD_LINE = 3
# The commits of a batch, and those of a line at the first, the bad and the last one.
ONCE = ["claim", "begin", "finalizing", "finish"]
EACH = [(name, hit) for name in ("start", "results") for hit in (1, BAD_LINE, NUM_LINES)]
CRASHES = [
    (name, side, hit)
    for name, hit in [*((name, 1) for name in ONCE), *EACH]
    for side in ("before", "after")
]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path)
    yield stores
    stores.close()


def run(store: Store, ran: Counter[int]) -> None:
    """Run a batch to its end."""
    lease = claimed(store)
    batch, progress = lease.batch, store.progress
    with store.files.open(store.files.get(ME, batch.input_file_id)) as file:
        if batch.status == "validating":
            num_lines, errors = check_input(file, batch.endpoint, store.limits)
            assert not errors
            progress.begin(lease, num_lines)
        file.seek(0)
        done = progress.done_lines(batch.id)
        for line in read_input(file, store.limits):
            if line.number not in done:
                progress.start(lease, [line.number])
                ran[line.number] += 1
                response = {"status_code": 200, "body": line.body}
                data = record(batch.id, line.number, line.custom_id, response, None)
                is_bad = line.number == BAD_LINE
                progress.commit(lease, [LineResult(line.number, data, is_bad, Usage(10, 1, 5, 2))])
    finish_batch(lease, progress, store.files, store.limits)


@pytest.mark.parametrize(("name", "side", "hit"), CRASHES)
def test_a_crash_at_any_commit_costs_no_line_and_doubles_none(
    stores: Stores, name: str, side: str, hit: int
) -> None:
    store = stores.open()
    batch = new_batch(store, NUM_LINES)
    ran: Counter[int] = Counter()
    crash_at(stores, f"{side} {name}", hit)
    with pytest.raises(CrashError):
        run(store, ran)
    stores.time += LEASE_SECONDS + 1
    store = stores.open()
    if (name, side) != ("finish", "after"):
        run(store, ran)
    ended = store.batches.get(ME, batch.id)
    assert (ended.status, ended.num_lines) == ("completed", NUM_LINES)
    assert (ended.num_completed, ended.num_failed) == (NUM_LINES - 1, 1)
    assert ended.usage == Usage(40, 4, 20, 8)
    output = [json.loads(line) for line in content_of(store, ended.output_file_id).splitlines()]
    errors = [json.loads(line) for line in content_of(store, ended.error_file_id).splitlines()]
    assert [r["custom_id"] for r in output] == ["row-1", "row-2", "row-4"]
    assert [r["custom_id"] for r in errors] == ["row-3"]
    again = hit if (name, side) in (("results", "before"), ("start", "after")) else None
    if name == "start":
        again = None  # it died before the line was run
    assert ran == Counter({n: 1 + (n == again) for n in range(1, NUM_LINES + 1)})
    with store.database.read() as db:
        for table in ("results", "started"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0
    assert store.leases.claim("two", 4) is None


def crash_at(stores: Stores, point: str, hit: int) -> None:
    """Crash at the `hit`-th of the commits of a name."""
    left = hit

    class Counting(list[str]):
        def append(self, name: str) -> None:
            nonlocal left
            left -= name == point
            stores.crash_at = point if name == point and left == 0 else None
            super().append(name)

    stores.commits = Counting()


def half_run(store: Store) -> str:
    """A batch of which line 1 is done and line 2 is under way."""
    batch = new_batch(store, NUM_LINES)
    lease = claimed(store)
    store.progress.begin(lease, NUM_LINES)
    store.progress.start(lease, [1, 2])
    data = record(batch.id, 1, "row-1", {"status_code": 200}, None)
    store.progress.commit(lease, [LineResult(1, data, is_error=False)])
    return batch.id


@pytest.mark.parametrize("status", ["cancelled", "expired"])
def test_a_batch_that_ends_early_has_what_is_done_and_names_the_rest(
    stores: Stores, status: str
) -> None:
    store = stores.open()
    batch_id = half_run(store)
    if status == "cancelled":
        assert store.batches.cancel(ME, batch_id).status == "cancelling"
        assert store.batches.cancel(ME, batch_id).status == "cancelling"
    stores.time += LEASE_SECONDS + 1
    finish_batch(claimed(store, "two"), store.progress, store.files, store.limits)
    ended = store.batches.get(ME, batch_id)
    assert ended.status == status
    assert (ended.num_completed, ended.num_failed) == (1, NUM_LINES - 1)
    assert json.loads(content_of(store, ended.output_file_id))["custom_id"] == "row-1"
    errors = [json.loads(line) for line in content_of(store, ended.error_file_id).splitlines()]
    assert [r["custom_id"] for r in errors] == ["row-2", "row-3", "row-4"]
    code = {"cancelled": "batch_cancelled", "expired": "batch_expired"}[status]
    assert {r["error"]["code"] for r in errors} == {code}
    assert {r["response"] for r in errors} == {None}
    if status == "cancelled":
        assert store.batches.cancel(ME, batch_id) == ended
        return
    with pytest.raises(NotPossibleError, match="expired"):
        store.batches.cancel(ME, batch_id)


def test_a_batch_that_is_cancelled_before_it_was_read_has_no_files(stores: Stores) -> None:
    store = stores.open()
    batch = new_batch(store)
    store.batches.cancel(ME, batch.id)
    finish_batch(claimed(store), store.progress, store.files, store.limits)
    ended = store.batches.get(ME, batch.id)
    assert (ended.status, ended.output_file_id, ended.error_file_id) == ("cancelled", None, None)


def test_a_second_result_of_a_line_changes_nothing(stores: Stores) -> None:
    store = stores.open()
    batch_id = half_run(store)
    stores.time += LEASE_SECONDS + 1
    lease = claimed(store, "two")
    store.progress.commit(
        lease, [LineResult(1, b"other\n", is_error=True, usage=Usage(9, 9, 9, 9))]
    )
    batch = store.batches.get(ME, batch_id)
    assert (batch.num_completed, batch.num_failed, batch.usage) == (1, 0, Usage())
    assert b"other" not in b"".join(r for _, r in store.progress.results(batch_id, is_error=False))
