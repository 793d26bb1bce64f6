"""Which files a job reads, what they are called, and that no name makes a row two."""

import json
import os
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from support.fake_client import FakeClient
from unit.batch.test_many_files import make_job, records, write_lines

from saqqara.cluster.batch.parts.job import run_parts
from saqqara.cluster.batch.parts.storage import find_inputs, labels_of
from saqqara.cluster.errors import EngineDeadError


@pytest.mark.parametrize("protocol", ["s3://", "gs://", "/"])
def test_labels_are_paths_below_the_folder_of_all(protocol: str) -> None:
    def labels(*paths: str) -> list[str]:
        return list(labels_of([protocol + path for path in paths]).values())

    assert labels("bucket/in/a.jsonl") == ["a.jsonl"]
    assert labels("bucket/in/a.jsonl", "bucket/in/b/c.jsonl") == ["a.jsonl", "b/c.jsonl"]
    assert labels("bucket/a.jsonl", "other/a.jsonl") == ["bucket/a.jsonl", "other/a.jsonl"]
    assert labels("bucket/in1/a.jsonl", "bucket/in2/a.jsonl") == ["in1/a.jsonl", "in2/a.jsonl"]


def test_labels_of_several_storages_differ() -> None:
    labels = labels_of(["s3://bucket/a.jsonl", "gs://bucket/a.jsonl", "/bucket/a.jsonl"])
    assert len(set(labels.values())) == 3


def test_a_job_goes_on_when_its_files_are_named_in_another_order(tmp_path: Path) -> None:
    job = make_job(tmp_path, 6, 9)
    names = tuple(str(tmp_path / f"in/{number}.jsonl") for number in (1, 0))
    with pytest.raises(EngineDeadError):
        run_parts(replace(job, inputs=names), FakeClient(die_after=5, per_poll=1))
    assert records(job.output)
    summary = run_parts(replace(job, inputs=names[::-1]), FakeClient())
    assert summary.complete
    assert summary.resumed > 0
    assert len(records(job.output)) == 15


@pytest.mark.parametrize(
    "spelling", ["in//0.jsonl", "x/../in/0.jsonl", "./in/0.jsonl", "ln/0.jsonl"]
)
def test_a_file_in_two_spellings_is_one(tmp_path: Path, spelling: str) -> None:
    job = make_job(tmp_path, 4)
    (tmp_path / "x").mkdir()
    (tmp_path / "ln").symlink_to("in")
    client = FakeClient()
    inputs = (f"{tmp_path}/in/0.jsonl", f"{tmp_path}/{spelling}")
    assert run_parts(replace(job, inputs=inputs), client).rows == 4
    assert len(records(job.output)) == len(client.submitted) == 4


def test_a_linked_file_keeps_its_name_and_is_read_once(tmp_path: Path) -> None:
    """Caches keep files under their hashes, and link to them by their names."""
    write_lines(tmp_path / "blobs/c0ffee", [{"prompt": "x"}])
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "in" / name).symlink_to("../blobs/c0ffee")
    (file,) = find_inputs([f"{tmp_path}/in/{name}.jsonl" for name in "ba"])
    assert (file.url, file.label) == (os.path.realpath(tmp_path / "in") + "/a.jsonl", "a.jsonl")


def test_a_linked_output_folder_is_seen_to_hold_the_input(tmp_path: Path) -> None:
    job = make_job(tmp_path, 4)
    (tmp_path / "ln").symlink_to("in")
    with pytest.raises(ValueError, match=r"lies in .*; choose another folder"):
        run_parts(replace(job, output=str(tmp_path / "ln")), FakeClient())


def test_a_linked_input_is_seen_to_lie_in_the_output_folder(tmp_path: Path) -> None:
    job = make_job(tmp_path, 4)
    run_parts(job, FakeClient())
    results = (tmp_path / "out/part-000000.jsonl").read_bytes()
    (tmp_path / "in/0.jsonl").unlink()
    (tmp_path / "in/0.jsonl").symlink_to("../out/part-000000.jsonl")
    with pytest.raises(ValueError, match=r"lies in .*; choose another folder"):
        run_parts(replace(job, overwrite=True), FakeClient())
    assert (tmp_path / "out/part-000000.jsonl").read_bytes() == results


def test_a_cloud_file_in_two_spellings_is_refused() -> None:
    cloud = fsspec.filesystem("memory")
    cloud.pipe("/store/in/a.jsonl", json.dumps({"prompt": "x"}).encode())
    with pytest.raises(ValueError, match="may be one file; name each in one spelling"):
        find_inputs(["memory://store/in/a.jsonl", "memory://store/in//a.jsonl"])
    cloud.rm("/store", recursive=True)
