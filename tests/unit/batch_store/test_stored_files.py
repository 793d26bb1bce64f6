"""Files of a store: whole or not there, their owner's alone, and bounded in bytes and number.

The first test says what a file is.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stores import ME, YOU, CrashError, Stores, content_of, new_batch, upload

from saqqara.cluster.batch_store.database import StoreBusyError
from saqqara.cluster.batch_store.files import STALE_SECONDS
from saqqara.cluster.batch_store.records import (
    NotFoundError,
    NotPossibleError,
    Page,
    StoreLimitError,
)
from saqqara.cluster.batch_store.store import Store

HOSTILE_NAMES = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "a\nb\r\nX: y",
    "'; DROP TABLE files; --",
    "\x00\x1b[31m",
    "名前.jsonl",
    "CON",
    " ",
]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    stores = Stores(tmp_path)
    yield stores
    stores.close()


def contents(stores: Stores) -> list[str]:
    return sorted(path.name for path in (stores.folder / "files").iterdir())


def age_of_all(stores: Stores, seconds: float) -> None:
    for path in (stores.folder / "files").iterdir():
        os.utime(path, (stores.time - seconds, stores.time - seconds))


def test_a_file_is_there_for_its_owner_in_every_process_and_after_a_restart(
    stores: Stores,
) -> None:
    file = upload(stores.open(), b"one\ntwo\n", name="rows.jsonl")
    other = stores.open()
    assert other.files.get(ME, file.id) == file
    assert (file.filename, file.num_bytes, file.purpose) == ("rows.jsonl", 8, "batch")
    assert content_of(other, file.id) == b"one\ntwo\n"
    for look in (other.files.get, other.files.delete):
        with pytest.raises(NotFoundError, match="no file"):
            look(YOU, file.id)
    assert other.files.list(YOU, Page(10)) == ([], False)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_of_any_kind_are_text_and_no_path(stores: Stores, name: str) -> None:
    store = stores.open()
    file = upload(store, b"x", name=name)
    assert store.files.get(ME, file.id).filename == name
    assert contents(stores) == [file.id]


@pytest.mark.parametrize("file_id", [*HOSTILE_NAMES, "", "%", "file-", "x" * 10_000])
def test_ids_of_any_kind_find_nothing(stores: Stores, file_id: str) -> None:
    store = stores.open()
    upload(store, b"x")
    with pytest.raises(NotFoundError) as caught:
        store.files.get(ME, file_id)
    assert len(str(caught.value)) < 200


def test_an_upload_that_is_given_up_leaves_nothing(stores: Stores) -> None:
    store = stores.open()
    with store.files.begin(ME) as file:
        file.write(b"half")
    assert contents(stores) == []
    assert store.files.list(ME, Page(10)) == ([], False)


@pytest.mark.parametrize("point", ["before add file", "after add file"])
def test_a_crash_at_the_commit_leaves_a_whole_file_or_none(stores: Stores, point: str) -> None:
    stores.crash_at = point
    with pytest.raises(CrashError):
        upload(stores.open(), b"content")
    store = stores.open()
    files, _ = store.files.list(ME, Page(10))
    assert len(files) == (point == "after add file")
    assert [content_of(store, file.id) for file in files] == [b"content"] * len(files)
    assert len(contents(stores)) == 1
    age_of_all(stores, STALE_SECONDS + 1)
    store.files.sweep()
    assert contents(stores) == [file.id for file in files]


def test_a_larger_file_than_may_be_is_refused_as_it_comes(stores: Stores) -> None:
    store = stores.open(max_file_bytes=10)
    with store.files.begin(ME) as file:
        file.write(b"0123456789")
        with pytest.raises(StoreLimitError, match="at most 10 bytes"):
            file.write(b"x")
    assert contents(stores) == []


def test_an_owner_has_so_many_bytes_and_files_and_others_theirs(stores: Stores) -> None:
    store = stores.open(max_stored_bytes=10, max_files=2)
    first = upload(store, b"01234")
    with pytest.raises(StoreLimitError, match="10 bytes in all"):
        upload(store, b"012345")
    upload(store, b"01234")
    with pytest.raises(StoreLimitError, match="2 files already"):
        upload(store, b"")
    upload(store, b"0123456789", owner=YOU)
    store.files.delete(ME, first.id)
    upload(store, b"01234")


def test_uploads_side_by_side_do_not_fill_more_than_the_room(stores: Stores) -> None:
    one, two = stores.open(max_stored_bytes=10), stores.open(max_stored_bytes=10)
    with one.files.begin(ME) as first, two.files.begin(ME) as second:
        first.write(b"0123456")
        second.write(b"0123456")
        first.finish("batch", "a")
        with pytest.raises(StoreLimitError, match="10 bytes in all"):
            second.finish("batch", "b")
    assert len(contents(stores)) == 1


def test_a_list_goes_on_where_it_ended_in_both_orders(stores: Stores) -> None:
    store = stores.open()
    ids = [upload(store, b"x", purpose="batch" if i % 2 else "batch_output").id for i in range(5)]
    upload(store, b"x", owner=YOU)

    def pages(ascending: bool, purpose: str | None = None) -> list[str]:
        found: list[str] = []
        has_more = True
        while has_more:
            page = Page(2, found[-1] if found else None, ascending)
            files, has_more = store.files.list(ME, page, purpose)
            found += [file.id for file in files]
        return found

    assert pages(ascending=True) == ids
    assert pages(ascending=False) == ids[::-1]
    assert pages(ascending=True, purpose="batch") == ids[1::2]
    with pytest.raises(NotFoundError, match="after"):
        store.files.list(YOU, Page(2, after=ids[0]))


def test_what_is_open_can_be_read_to_its_end_though_it_is_deleted(stores: Stores) -> None:
    store = stores.open()
    file = upload(store, b"content")
    with store.files.open(file) as opened:
        store.files.delete(ME, file.id)
        assert opened.read() == b"content"
    with pytest.raises(NotFoundError):
        store.files.open(file)
    assert contents(stores) == []


def test_the_input_of_a_batch_stays_until_the_batch_has_ended(stores: Stores) -> None:
    store = stores.open()
    batch = new_batch(store)
    with pytest.raises(NotPossibleError, match=f"the input of {batch.id}"):
        store.files.delete(ME, batch.input_file_id)
    lease = store.leases.claim("one", 4)
    assert lease is not None
    store.progress.fail(lease, [])
    store.files.delete(ME, batch.input_file_id)


def test_expired_files_go_and_so_does_what_dead_writers_left(stores: Stores) -> None:
    store = stores.open()
    kept = upload(store, b"kept")
    with store.files.begin(ME) as file:
        gone = file.finish("batch", "gone", seconds=3600)
    left = stores.folder / "files" / ".file-left.part"
    left.write_bytes(b"half")
    fresh = stores.folder / "files" / ".file-fresh.part"
    fresh.write_bytes(b"half")
    stores.time += 3601
    for path, age in ((left, STALE_SECONDS + 1), (fresh, STALE_SECONDS - 1)):
        os.utime(path, (stores.time - age, stores.time - age))
    with pytest.raises(NotFoundError):
        store.files.get(ME, gone.id)
    assert store.files.sweep() == 2
    assert contents(stores) == sorted([kept.id, fresh.name])
    assert store.files.sweep() == 0


def test_a_folder_that_does_not_serve_any_more_is_an_error_for_now(stores: Stores) -> None:
    store = stores.open()
    file = upload(store, b"x")
    content = stores.folder / "files" / file.id
    content.unlink()
    content.symlink_to(content.name)
    with pytest.raises(StoreBusyError, match="cannot be read"):
        store.files.open(file)
    content.unlink()
    (stores.folder / "files").rmdir()
    with pytest.raises(StoreBusyError, match="cannot be written"):
        upload(store, b"x")
    with pytest.raises(StoreBusyError), store.database.read() as db:
        db.execute("SELECT * FROM nothing")
    with pytest.raises(StoreBusyError), store.database.write("nothing") as db:
        db.execute("DELETE FROM nothing")
    assert store.files.list(ME, Page(10)) == ([file], False)


def test_a_folder_of_another_version_is_refused(stores: Stores) -> None:
    store = stores.open()
    with store.database.write("version") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(ValueError, match="another version"):
        stores.open()


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="batch_dir: cannot use"):
        Store(tmp_path / "file" / "below")
