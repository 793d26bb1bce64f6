"""The output and the error file of a batch, written from its results when no more will come."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from saqqara.configs.schema import BatchLimits

from .files import FileStore, new_file_id, put_in_place
from .inputs import read_input
from .leases import Lease
from .progress import Progress
from .records import Status, StoredBatch, StoredFile

_LEFT = {
    "expired": (
        "batch_expired",
        "the batch's completion window was over before this request was run",
    ),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was run"),
}


def record(
    batch_id: str, line: int, custom_id: str, response: Any, error: tuple[str, str] | None
) -> bytes:
    """A line of an output or an error file.

    Args:
        batch_id: the batch.
        line: of its input.
        custom_id: what the client calls it.
        response: `status_code`, `request_id` and `body`; None where there is none.
        error: code and message where it never was answered.
    """
    failure = None if error is None else {"code": error[0], "message": error[1]}
    data = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{line}",
        "custom_id": custom_id,
        "response": response,
        "error": failure,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def finish_batch(
    lease: Lease, progress: Progress, files: FileStore, limits: BatchLimits
) -> StoredBatch:
    """Write what there is of a batch, and end it. Done again after a crash, it ends alike.

    Raises:
        LeaseLostError: another runner has it.
    """
    batch = progress.begin_finalizing(lease)
    status: Status = "completed"
    if batch.cancelling_at is not None:
        status = "cancelled"
    elif batch.num_done < batch.num_lines or not batch.num_lines:
        status = "expired"
    output = _write(lease, files, batch, "output", _answers(progress, batch))
    errors = _write(lease, files, batch, "errors", _errors(progress, files, batch, status, limits))
    try:
        progress.finish(lease, status, output, errors)
    except Exception:
        for file in (output, errors):
            if file is not None:
                files.path(file.blob).unlink(missing_ok=True)
        raise
    return replace(batch, status=status)


def _answers(progress: Progress, batch: StoredBatch) -> Iterator[bytes]:
    for _, data in progress.results(batch.id, is_error=False):
        yield data


def _errors(
    progress: Progress, files: FileStore, batch: StoredBatch, status: Status, limits: BatchLimits
) -> Iterator[bytes]:
    """Error records, those of lines that were never run among them, in order of the input."""
    failed = progress.results(batch.id, is_error=True)
    if status == "completed" or not batch.num_lines:
        for _, data in failed:
            yield data
        return
    done = progress.done_lines(batch.id)
    line, data = next(failed, (0, b""))
    with files.open(files.get(batch.owner, batch.input_file_id)) as file:
        for given in read_input(file, limits):
            if given.number == line:
                yield data
                line, data = next(failed, (0, b""))
            elif given.number not in done:
                yield record(batch.id, given.number, given.custom_id, None, _LEFT[status])


def _write(
    lease: Lease, files: FileStore, batch: StoredBatch, what: str, records: Iterable[bytes]
) -> StoredFile | None:
    """The content of a file, in place and not yet named; None where there is nothing to write."""
    file_id = new_file_id()
    part = files.path(f".{file_id}.part")
    num_bytes = 0
    try:
        with part.open("xb") as file:
            num_bytes = _write_all(file, records)
            if num_bytes:
                put_in_place(file, part, files.path(file_id))
    finally:
        part.unlink(missing_ok=True)
    if not num_bytes:
        return None
    now = files.now()
    expires_at = None if batch.output_seconds is None else now + batch.output_seconds
    name = f"{batch.id}_{what}.jsonl"
    return StoredFile(
        file_id, batch.owner, "batch_output", name, num_bytes, now, expires_at, blob=file_id
    )


def _write_all(file: BinaryIO, records: Iterable[bytes]) -> int:
    num_bytes = 0
    for data in records:
        num_bytes += file.write(data)
    return num_bytes
