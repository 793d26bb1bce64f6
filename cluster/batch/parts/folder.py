"""The output folder of a job: one file a part, there as a whole or not at all.

A part is written under `_staging/` and moved into its place when it is complete: that is its
commit. What a killed job leaves there is nobody's, and the next run removes it. Names with an
underscore in front are no results; tools that read folders of data leave them out.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

from saqqara.cluster.batch.files import WriteError
from saqqara.cluster.batch.records import Record
from saqqara.configs.json_text import json_text

from .parquet import arrow
from .storage import filesystem, is_local

Kind = Literal["jsonl", "parquet"]

STAGING = "_staging"
SUMMARY = "_summary.json"
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """Where records go. Small and picklable: every replica has one.

    Args:
        url: path or URL of the folder.
        kind: what its files are.
    """

    url: str
    kind: Kind

    def path(self, name: str) -> str:
        """The path of a file in the folder, on its file system."""
        _, folder = filesystem(self.url)
        return f"{folder.rstrip('/')}/{name}"

    def name(self, index: int) -> str:
        """The file of a part."""
        return f"part-{index:06d}.{self.kind}"

    def is_committed(self, index: int) -> bool:
        """Whether a part is there."""
        fs, _ = filesystem(self.url)
        return bool(fs.exists(self.path(self.name(index))))

    def records(self, index: int) -> Iterator[Record]:
        """The records of a part that is there."""
        fs, _ = filesystem(self.url)
        with fs.open(self.path(self.name(index)), "rb") as file:
            if self.kind == "jsonl":
                for line in file:
                    yield json.loads(line)
            else:
                for batch in arrow().parquet.ParquetFile(file).iter_batches(columns=["record"]):
                    for text in batch.column(0).to_pylist():
                        yield json.loads(text)

    def stage(self, index: int) -> "StagedPart":
        """A part to write, which is no result until it is committed."""
        return StagedPart(self, index)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None if there is none.

        Raises:
            ValueError: it is damaged.
        """
        fs, _ = filesystem(self.url)
        try:
            with fs.open(self.path(name), "rb") as file:
                data = json.loads(file.read())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise ValueError(
                f"output: {name} in {self.url} is damaged, so nothing says what the results were "
                "made with; start anew with --overwrite, or choose another folder"
            )
        return data

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Write a JSON file that is there as a whole or not at all."""
        fs, _ = filesystem(self.url)
        staged = self.path(f"{STAGING}/{name}.{uuid.uuid4().hex}")
        with _writing(self.url):
            fs.makedirs(self.path(STAGING), exist_ok=True)
            with fs.open(staged, "wb") as file:
                file.write(json_text(data, indent=2).encode() + b"\n")
                _sync(fs, file)
            fs.mv(staged, self.path(name))


class StagedPart:
    """A part while it is written; leaving it without a commit removes it.

    Raises:
        WriteError: the storage does not take it.
    """

    def __init__(self, folder: OutputFolder, index: int) -> None:
        self._folder = folder
        self._fs, _ = filesystem(folder.url)
        self._path = folder.path(f"{STAGING}/{folder.name(index)}.{uuid.uuid4().hex}")
        self._target = folder.path(folder.name(index))
        with _writing(folder.url):
            self._fs.makedirs(folder.path(STAGING), exist_ok=True)
            self._file = self._fs.open(self._path, "wb")
        self._table = ParquetRecords(self._file) if folder.kind == "parquet" else None

    def write(self, record: Record) -> None:
        """Add a record.

        Raises:
            WriteError: the storage does not take it.
            ValueError: it is no JSON; nothing was written.
        """
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        with _writing(self._folder.url):
            if self._table is not None:
                self._table.add(record, text)
            else:
                self._file.write(text.encode() + b"\n")

    def commit(self) -> None:
        """Make it a result, all of it at once."""
        with _writing(self._folder.url):
            if self._table is not None:
                self._table.close()
            _sync(self._fs, self._file)
            self._file.close()
            self._fs.mv(self._path, self._target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._fs.exists(self._path):
            self._fs.rm(self._path)


class ParquetRecords:
    """Writes records as rows of Parquet, with the columns of `SCHEMA`."""

    def __init__(self, file: Any) -> None:
        pa = arrow()
        kinds = {"string": pa.string(), "int64": pa.int64()}
        self._schema = pa.schema([(name, kinds[kind]) for name, kind in SCHEMA])
        self._writer = pa.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, record: Record, text: str) -> None:
        """Add a record, and its text in JSON."""
        self._rows.append(_columns(record, text))
        if len(self._rows) >= _BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        table = arrow().Table.from_pylist(self._rows, schema=self._schema)
        self._writer.write_table(table)
        self._rows = []


SCHEMA = (
    ("file", "string"),
    ("line", "int64"),
    ("custom_id", "string"),
    ("text", "string"),  # of the first answer
    ("finish_reason", "string"),
    ("prompt_tokens", "int64"),
    ("completion_tokens", "int64"),
    ("error", "string"),  # its message
    ("record", "string"),  # all of it, as JSON
)
"""The columns of Parquet output."""


def _columns(record: Record, text: str) -> dict[str, Any]:
    body = (record.get("response") or {}).get("body")
    answer: dict[str, Any] = record if body is None else body["choices"][0]
    usage = (record if body is None else body).get("usage") or {}
    error = record["error"]
    return {
        "file": record["file"],
        "line": record["line"],
        "custom_id": record["custom_id"],
        "text": answer.get("text", (answer.get("message") or {}).get("content")),
        "finish_reason": answer.get("finish_reason"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error": None if error is None else str(error["message"]),
        "record": text,
    }


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Turn what a storage says of a write into one line."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {url}: {error.strerror or error}") from None


def _sync(fs: Any, file: Any) -> None:
    if is_local(fs):
        file.flush()
        os.fsync(file.fileno())
